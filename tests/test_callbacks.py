"""OverestimationCallback: Q(s₀, a₀) against the discounted return that π then collects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from gymnasium.wrappers import TimeLimit, TransformReward
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.callbacks import OverestimationCallback
from sb3_lecture_dqn.envs import GymVectorVecEnv

GAMMA = 0.9
# Nothing falls over in five steps, and every step gives r = 1.
FIVE_REWARDS = (1 - GAMMA**5) / (1 - GAMMA)


def make_env() -> gymnasium.Env[Any, Any]:
    return TimeLimit(gymnasium.make("CartPole-v1"), 5)


def make_three_envs() -> DummyVecEnv:
    return DummyVecEnv([make_env] * 3)


class HalfReward(gymnasium.RewardWrapper[Any, Any]):
    """A wrapper that Gymnasium cannot make again, because it does not record its arguments."""

    def reward(self, reward: Any) -> float:
        return float(reward) / 2


def make_model(env: Any, q_values: tuple[float, float] = (2.0, 1.0), gamma: float = GAMMA, **arguments: Any) -> LectureDQN:
    """A model that does not learn, and whose Q is the same in every state."""
    model = LectureDQN(
        "MlpPolicy", env, gamma=gamma, policy_kwargs={"final_layer_std": 0.0}, learning_starts=1_000_000, seed=0, **arguments
    )
    final_layer = model.q_net.q_net[-1]
    assert isinstance(final_layer, th.nn.Linear)
    final_layer.bias.data = th.tensor(q_values, device=model.device)
    return model


def run(model: LectureDQN, callback: BaseCallback | list[BaseCallback], folder: Path, steps: int = 20) -> list[dict[str, Any]]:
    """The lines with an evaluation that the logger wrote."""
    model.set_logger(configure(str(folder), ["json"]))
    model.learn(steps, callback=callback, log_interval=1_000_000)
    lines = (json.loads(line) for line in (folder / "progress.json").read_text().splitlines())
    return [line for line in lines if "eval/overestimation" in line]


def test_the_gap_is_q_minus_the_discounted_return(tmp_path: Path) -> None:
    lines = run(make_model(make_env()), OverestimationCallback(make_env(), eval_freq=10, n_eval_episodes=2), tmp_path)
    assert [line["time/total_timesteps"] for line in lines] == [10, 20]
    for line in lines:
        assert line["eval/first_q_value"] == pytest.approx(2)
        assert line["eval/discounted_return"] == pytest.approx(FIVE_REWARDS)
        assert line["eval/overestimation"] == pytest.approx(2 - FIVE_REWARDS)


@pytest.mark.parametrize(("gamma", "expected"), [(0.0, 1.0), (1.0, 5.0)])
def test_the_smallest_and_the_largest_discount(gamma: float, expected: float, tmp_path: Path) -> None:
    model = make_model(make_env(), gamma=gamma)
    (line,) = run(model, OverestimationCallback(make_env(), eval_freq=20), tmp_path)
    assert line["eval/discounted_return"] == pytest.approx(expected)
    assert line["eval/first_q_value"] == pytest.approx(2)


def test_q_is_that_of_the_first_action_in_the_first_state(tmp_path: Path) -> None:
    model = LectureDQN("MlpPolicy", make_env(), gamma=GAMMA, learning_starts=1_000_000, seed=0)
    eval_env = Monitor(make_env())
    eval_env.reset(seed=1)
    (line,) = run(model, OverestimationCallback(eval_env, eval_freq=20, n_eval_episodes=1), tmp_path)
    same_env = make_env()
    same_env.reset(seed=1)
    state, _ = same_env.reset()
    with th.no_grad():
        expected = model.q_net(th.as_tensor(state, device=model.device)[None]).max().item()
    assert line["eval/first_q_value"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("make", [make_env, make_three_envs])
def test_the_number_of_environments_changes_nothing(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make_model(make_three_envs())
    (line,) = run(model, OverestimationCallback(make(), eval_freq=5, n_eval_episodes=4), tmp_path, steps=15)
    assert line["eval/discounted_return"] == pytest.approx(FIVE_REWARDS)


def test_in_a_run_with_evaluations_it_follows_them(tmp_path: Path) -> None:
    # As in rl_zoo3, where the hyperparameter file names the callback and nothing else.
    eval_callback = EvalCallback(make_env(), eval_freq=4, n_eval_episodes=1, warn=False, verbose=0)
    callbacks = CallbackList([OverestimationCallback(), eval_callback])
    lines = run(make_model("CartPole-v1"), callbacks, tmp_path, steps=8)
    assert [line["time/total_timesteps"] for line in lines] == [4, 8]
    assert lines[0]["eval/discounted_return"] == pytest.approx(FIVE_REWARDS)


def test_alone_it_makes_the_training_environment_again_with_its_wrappers(tmp_path: Path) -> None:
    env = TransformReward(make_env(), lambda reward: 2 * reward)
    (line,) = run(make_model(env), OverestimationCallback(eval_freq=20), tmp_path)
    assert line["eval/discounted_return"] == pytest.approx(2 * FIVE_REWARDS)


def test_the_environment_that_it_made_is_closed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[CartPoleEnv] = []
    monkeypatch.setattr(CartPoleEnv, "close", lambda env: closed.append(env))
    model = make_model("CartPole-v1")
    run(model, OverestimationCallback(eval_freq=20), tmp_path)
    assert len(closed) == 1
    assert model.env is not None
    assert closed != model.env.get_attr("unwrapped")  # which stays open


def test_a_seeded_run_logs_the_same_gaps_again(tmp_path: Path) -> None:
    def gaps(folder: Path) -> list[float]:
        model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=1_000, seed=0)
        lines = run(model, OverestimationCallback(eval_freq=10, n_eval_episodes=1), folder)
        return [line["eval/overestimation"] for line in lines]

    first, second = gaps(tmp_path / "first"), gaps(tmp_path / "second")
    assert len(first) == 2
    assert first == second


@pytest.mark.parametrize("eval_freq", [0, -1])
def test_an_eval_callback_that_never_evaluates_gives_no_frequency(eval_freq: int, tmp_path: Path) -> None:
    eval_callback = EvalCallback(make_env(), eval_freq=eval_freq, warn=False, verbose=0)
    assert run(make_model("CartPole-v1"), CallbackList([OverestimationCallback(), eval_callback]), tmp_path) == []


def test_alone_it_makes_a_native_vector_environment_again(tmp_path: Path) -> None:
    env = GymVectorVecEnv(gymnasium.make_vec("RoboParking-v0", num_envs=4))
    model = make_model(env, q_values=(0.0, 0.0, 0.0, 0.0))
    (line,) = run(model, OverestimationCallback(eval_freq=5), tmp_path)
    assert line["eval/discounted_return"] < 0


def test_a_pause_between_two_episodes_is_none(tmp_path: Path) -> None:
    eval_env = GymVectorVecEnv(CartPoleVectorEnv(num_envs=2))
    callback = OverestimationCallback(eval_env, eval_freq=20, n_eval_episodes=10)
    (line,) = run(make_model("CartPole-v1"), callback, tmp_path)
    # to push in one direction falls after 8 to 10 steps
    assert sum(GAMMA**t for t in range(8)) <= line["eval/discounted_return"] <= sum(GAMMA**t for t in range(10))


@pytest.mark.parametrize("norm_reward", [False, True])
def test_the_return_is_in_the_unit_of_normalised_rewards(norm_reward: bool, tmp_path: Path) -> None:
    env = VecNormalize(DummyVecEnv([make_env]), norm_obs=False, training=False, epsilon=0.0)
    env.ret_rms.var = np.array(4.0)  # rewards are divided by 2
    # one that normalises them itself must not have them divided twice
    eval_env = VecNormalize(DummyVecEnv([make_env]), norm_obs=False, norm_reward=norm_reward, training=False, epsilon=0.0)
    (line,) = run(make_model(env), OverestimationCallback(eval_env, eval_freq=20), tmp_path)
    assert line["eval/discounted_return"] == pytest.approx(FIVE_REWARDS / 2)


def test_an_evaluation_normalises_observations_as_the_training_does(tmp_path: Path) -> None:
    env = VecNormalize(DummyVecEnv([make_env]))
    eval_env = VecNormalize(DummyVecEnv([make_env]), training=False)
    run(make_model(env), OverestimationCallback(eval_env, eval_freq=20), tmp_path)
    np.testing.assert_array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)
    np.testing.assert_array_equal(eval_env.obs_rms.var, env.obs_rms.var)


def test_it_changes_nothing_in_the_training(tmp_path: Path) -> None:
    def train(callback: BaseCallback | None) -> LectureDQN:
        return LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=50, batch_size=16, seed=0).learn(200, callback=callback)

    alone, watched = train(None), train(OverestimationCallback(eval_freq=50, n_eval_episodes=1))
    for ours, theirs in zip(alone.q_net.parameters(), watched.q_net.parameters(), strict=True):
        assert th.equal(ours, theirs)


def test_it_prints_a_line_if_asked_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(make_model(make_env()), OverestimationCallback(make_env(), eval_freq=20, verbose=1), tmp_path)
    assert "Step 20: Q(s0, a0) = 2.00, discounted return = 4.10, overestimation = -2.10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: VecNormalize(DummyVecEnv([make_env])), "VecNormalize"),
        (lambda: HalfReward(make_env()), "HalfReward"),
    ],
)
def test_an_environment_that_it_cannot_make_again_has_to_be_given(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"eval_env must be given when the training environment is wrapped in {reason}"):
        make_model(make()).learn(5, callback=OverestimationCallback())


@pytest.mark.parametrize(("argument", "value"), [("eval_freq", 0), ("n_eval_episodes", 0), ("n_eval_episodes", 2.5)])
def test_numbers_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be an integer of at least 1, got {value}"):
        OverestimationCallback(**{argument: value})  # type: ignore[arg-type]
