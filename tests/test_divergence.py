"""Training that diverges ends with an error that says what, where and since when."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import VecNormalize

from sb3_lecture_dqn import DivergenceError, LectureDQN, ResumableCheckpointCallback, divergence
from sb3_lecture_dqn.metrics import RunningMeans
from sb3_lecture_dqn.resume.checkpoint_files import newest_checkpoint


class PoisonedEnv(gymnasium.Env[Any, int]):
    """
    Gives a reward and observations that are not finite from a step on.

    :param reward: The reward from then on
    :param observation: Every number of the observations from then on
    :param poisoned_from: That step
    """

    def __init__(
        self,
        reward: float = 1.0,
        observation: float = 0.5,
        poisoned_from: int = 10**9,
        dictionary: bool = False,
        dtype: type[np.floating] = np.float32,
    ) -> None:
        box = spaces.Box(-1, 1, (2,), dtype)
        self.observation_space = spaces.Dict({"a": box, "b": box}) if dictionary else box
        self.action_space = spaces.Discrete(2)
        self.reward, self.observation, self.poisoned_from, self.dictionary = reward, observation, poisoned_from, dictionary
        self.n_steps, self.dtype = 0, dtype

    def _observe(self) -> Any:
        value = self.observation if self.n_steps >= self.poisoned_from else 0.5
        observation = np.full(2, value, dtype=self.dtype)
        return {"a": np.zeros(2, dtype=self.dtype), "b": observation} if self.dictionary else observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        reward = self.reward if self.n_steps >= self.poisoned_from else 1.0
        return self._observe(), reward, self.n_steps % 50 == 0, False, {}


def make_model(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> LectureDQN:
    settings: dict[str, Any] = {"learning_starts": 10, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}, "train_freq": 1}
    return LectureDQN(policy, env, seed=0, device="cpu", **{**settings, **kwargs})


@pytest.mark.parametrize(
    ("env", "policy", "name"),
    [
        (lambda: PoisonedEnv(reward=float("nan"), poisoned_from=300), "MlpPolicy", "rewards"),
        (lambda: PoisonedEnv(reward=float("-inf"), poisoned_from=300), "MlpPolicy", "rewards"),
        (lambda: PoisonedEnv(observation=float("nan"), poisoned_from=300), "MlpPolicy", "observations"),
        (
            lambda: PoisonedEnv(observation=float("inf"), poisoned_from=300, dictionary=True),
            "MultiInputPolicy",
            "observations",
        ),
    ],
)
def test_what_the_environment_gives_is_named_with_its_step(env: Callable[[], PoisonedEnv], policy: str, name: str) -> None:
    model = make_model(env(), policy)
    with pytest.raises(DivergenceError, match=rf"{name} of the environment are not finite since step 300; the usual cause"):
        model.learn(1_000)
    assert model.num_timesteps <= 300 + model.metrics_interval


def test_observations_that_float32_cannot_hold_are_named_unless_they_are_normalized() -> None:
    vec_env = make_vec_env(lambda: PoisonedEnv(observation=1e39, poisoned_from=100, dtype=np.float64), n_envs=1)
    make_model(VecNormalize(vec_env)).learn(300)
    with pytest.raises(DivergenceError, match="observations of the environment are not finite since step 100"):
        make_model(PoisonedEnv(observation=1e39, poisoned_from=100, dtype=np.float64)).learn(300)


def test_it_is_noticed_before_learning_starts_too() -> None:
    model = make_model(PoisonedEnv(reward=float("nan"), poisoned_from=30), learning_starts=10_000)
    with pytest.raises(DivergenceError, match="rewards of the environment are not finite since step 30"):
        model.learn(1_000, log_interval=1)
    assert model.num_timesteps <= 50  # the first episode's end


def test_the_step_counts_the_steps_of_all_environments() -> None:
    env = make_vec_env(lambda: PoisonedEnv(reward=float("nan"), poisoned_from=30), n_envs=3)
    model = make_model(env, learning_starts=10_000)
    with pytest.raises(DivergenceError, match="rewards of the environment are not finite since step 90;"):
        model.learn(120, log_interval=1_000)


def test_a_ring_that_began_anew_is_still_looked_at() -> None:
    env = PoisonedEnv(observation=float("nan"), poisoned_from=70)
    model = make_model(env, buffer_size=64, learning_starts=10_000).learn(50)
    with pytest.raises(DivergenceError, match="observations of the environment are not finite since step 70;"):
        model.learn(40, reset_num_timesteps=False)


def test_a_ring_that_was_filled_between_two_looks_is_looked_at_whole() -> None:
    env = PoisonedEnv(reward=float("nan"), poisoned_from=30)
    model = make_model(env, buffer_size=20, learning_starts=10_000)
    with pytest.raises(DivergenceError, match="rewards of the environment are not finite"):
        model.learn(40, log_interval=1_000)


def test_a_smaller_buffer_in_the_place_of_another_is_looked_at() -> None:
    env = PoisonedEnv()
    model = make_model(env, learning_starts=10_000).learn(60)
    model.buffer_size = 50
    del model.replay_buffer
    env.reward, env.poisoned_from = float("nan"), 0
    with pytest.raises(DivergenceError, match="rewards of the environment are not finite since step 61;"):
        model.learn(10, reset_num_timesteps=False)


class BreakNetwork(BaseCallback):
    """Puts a value that is not finite into θ at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            parameter = next(self.model.policy.parameters())
            with th.no_grad():
                parameter.view(-1)[0] = float("nan")
        return True


@pytest.mark.parametrize("activation_fn", [th.nn.LeakyReLU, th.nn.Tanh], ids=["fast update", "plain update"])
def test_a_loss_that_is_not_finite_is_named_with_its_gradient_steps(activation_fn: type[th.nn.Module]) -> None:
    model = make_model(PoisonedEnv(), policy_kwargs={"net_arch": [8], "activation_fn": activation_fn})
    with pytest.raises(DivergenceError, match="the loss is nan at step") as error:
        model.learn(2_000, callback=BreakNetwork(500))
    since, until = map(int, re.findall(r"between (\d+) and (\d+)", str(error.value))[0])
    assert since <= 490 <= until <= 490 + model.metrics_interval
    assert "learning_rate too high" in str(error.value)


def test_metrics_that_are_read_late_are_of_all_gradient_steps_since_the_last_time() -> None:
    """A training call may make more steps than lie between two reads."""
    model = make_model(PoisonedEnv(), gradient_steps=128)
    model.learn(12)
    assert model._n_updates == 256
    with pytest.raises(DivergenceError, match="since a gradient step between 384 and 512"):
        model.learn(4, callback=BreakNetwork(14), reset_num_timesteps=False)


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_only_a_buffer_that_drops_nothing_is_called_finite(optimize_memory_usage: bool) -> None:
    model = make_model(PoisonedEnv(), optimize_memory_usage=optimize_memory_usage)
    with pytest.raises(DivergenceError, match="the loss is nan at step") as error:
        model.learn(300, callback=BreakNetwork(50))
    assert ("rewards and observations are finite" in str(error.value)) == (not optimize_memory_usage)


def test_an_exploding_q_is_told_from_a_large_one() -> None:
    env = PoisonedEnv(reward=1e4, poisoned_from=0)
    model = make_model(env, gamma=0.9, learning_rate=0.05)
    model.learn(800)  # Q goes towards 1e5, as it should
    assert model.q_net(th.full((1, 2), 0.5)).max() > 3e3
    with th.no_grad():
        model.q_net.q_net[-1].bias += 1e9
        model.q_net_target.q_net[-1].bias += 1e9
    with pytest.raises(DivergenceError, match=r"Q explodes, its size is .* where the rewards allow 1e\+05"):
        model.learn(500, reset_num_timesteps=False)


def test_an_explosion_is_judged_by_the_rewards_that_the_update_sees() -> None:
    env = VecNormalize(make_vec_env(lambda: PoisonedEnv(reward=1e6, poisoned_from=0)), norm_obs=False)
    model = make_model(env, gamma=0.9).learn(200)
    with th.no_grad():
        model.q_net.q_net[-1].bias += 1e6
        model.q_net_target.q_net[-1].bias += 1e6
    with pytest.raises(DivergenceError, match="Q explodes"):
        model.learn(300, reset_num_timesteps=False)


def test_normalised_observations_change_nothing_in_what_the_rewards_allow() -> None:
    env = VecNormalize(make_vec_env(lambda: PoisonedEnv(reward=1e6, poisoned_from=0)), norm_reward=False)
    model = make_model(env, gamma=0.9)
    with th.no_grad():
        model.q_net.q_net[-1].bias += 1e7
        model.q_net_target.q_net[-1].bias += 1e7
    model.learn(300)
    assert model._n_updates == 290


def test_numbers_that_go_wrong_in_the_last_steps_are_noticed() -> None:
    model = make_model(PoisonedEnv())
    with pytest.raises(DivergenceError, match=r"not finite|is nan"):
        model.learn(597, callback=BreakNetwork(594))


def test_an_explosion_in_the_last_steps_is_noticed() -> None:
    model = make_model(PoisonedEnv()).learn(100)
    with th.no_grad():
        model.q_net.q_net[-1].bias += 1e9
    with pytest.raises(DivergenceError, match="Q explodes"):
        model.learn(20, reset_num_timesteps=False)


def test_a_large_q_that_was_trained_on_rewards_of_the_past_is_no_explosion(tmp_path: Path) -> None:
    model = make_model(PoisonedEnv(reward=0.0, poisoned_from=0), gamma=0.9)
    with th.no_grad():
        model.q_net.q_net[-1].bias += 5e3
        model.q_net_target.q_net[-1].bias += 5e3
    model.save(tmp_path / "model")
    loaded = LectureDQN.load(tmp_path / "model", env=PoisonedEnv(reward=0.0, poisoned_from=0))
    loaded.learn(400, reset_num_timesteps=False)
    with pytest.raises(DivergenceError, match="Q explodes"):
        model.learn(400)


class BufferOfTensors(ReplayBuffer):
    """Keeps its rewards as PyTorch's tensor, as one on a GPU would."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rewards = th.zeros(self.rewards.shape)  # type: ignore[assignment]

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: Any) -> None:
        with self._rewards_as_an_array():
            super().add(obs, next_obs, action, reward, done, infos)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        with self._rewards_as_an_array():
            return super()._get_samples(batch_inds, env)

    @contextmanager
    def _rewards_as_an_array(self) -> Iterator[None]:
        tensor: Any = self.rewards
        self.rewards = tensor.numpy()  # of the same memory
        yield
        self.rewards = tensor


class BufferThatScalesRewards(ReplayBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(rewards=samples.rewards * 1e6)


@pytest.mark.parametrize("buffer_class", [BufferOfTensors, BufferThatScalesRewards])
def test_what_a_buffer_of_a_users_own_holds_and_gives_is_no_explosion(buffer_class: Any) -> None:
    model = make_model(PoisonedEnv(), replay_buffer_class=buffer_class, gamma=0.9)
    model.learn(300)
    assert model._n_updates == 290


class Paying(BitFlippingEnv):
    """Pays well at the goal, which is never reached."""

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return (super().compute_reward(achieved_goal, desired_goal, info) + 1) * 1e4


def test_rewards_of_the_goals_that_hindsight_puts_in_the_place_of_others_are_no_explosion() -> None:
    env = Paying(n_bits=12, continuous=False, max_steps=12)
    model = make_model(env, "MultiInputPolicy", gamma=0.9, learning_rate=0.05, replay_buffer_class=HerReplayBuffer)
    model.learn(300)
    assert model.replay_buffer is not None
    assert model.replay_buffer.rewards.max() == 0


def test_a_second_training_does_not_look_at_old_transitions_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(PoisonedEnv()).learn(600)
    n_rows: list[int] = []
    look = divergence._first_row_not_finite
    monkeypatch.setattr(
        divergence, "_first_row_not_finite", lambda a, rows, *b: (n_rows.append(len(a[rows])), look(a, rows, *b))[1]
    )
    model.learn(150)
    assert sum(n_rows) == 3 * 150  # rewards, observations and next observations


def test_a_diverged_network_does_not_push_out_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = make_model(PoisonedEnv())
    callbacks = [ResumableCheckpointCallback(100, tmp_path, keep_last=1), BreakNetwork(590)]
    with pytest.raises(DivergenceError, match=r"not finite|is nan"):
        model.learn(2_000, callback=callbacks)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.num_timesteps == 500
    saved = th.load(checkpoint.file("parameters.pt"), weights_only=True)["policy"]
    assert all(bool(th.isfinite(tensor).all()) for tensor in saved.values())


def test_watching_reads_nothing_more_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(PoisonedEnv())
    model.learn(300)
    reads = []
    original = th.Tensor.tolist
    monkeypatch.setattr(th.Tensor, "tolist", lambda tensor: reads.append("tolist") or original(tensor))
    for name in ("item", "__float__", "__bool__"):
        monkeypatch.setattr(th.Tensor, name, lambda tensor, _name=name: reads.append(_name))
    means = RunningMeans(("loss", "q_values", "td_target", "gradient_norm"))
    means.add(lambda _: th.ones(4, 1), None)
    model._training_metrics = means
    model._record_training_metrics()
    assert reads == ["tolist"]


def test_it_is_the_error_that_the_zoo_prunes_a_trial_for() -> None:
    assert issubclass(DivergenceError, ValueError)
