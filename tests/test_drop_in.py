"""What users of ``stable_baselines3.DQN`` do, done with LectureDQN."""

import inspect
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import (
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize
from torch import nn

from sb3_lecture_dqn import LectureDQN

SMALL: dict[str, Any] = {
    "learning_starts": 20,
    "batch_size": 8,
    "buffer_size": 500,
    "policy_kwargs": {"net_arch": [8]},
    "seed": 0,
}


def test_it_derives_from_off_policy_algorithm_and_not_from_dqn() -> None:
    assert issubclass(LectureDQN, OffPolicyAlgorithm)
    assert not issubclass(LectureDQN, DQN)


def test_constructor_takes_the_arguments_of_dqn_in_the_same_order() -> None:
    assert list(inspect.signature(LectureDQN).parameters) == list(inspect.signature(DQN).parameters)


@pytest.mark.parametrize("method", ["learn", "predict", "train", "save", "load", "set_parameters", "save_replay_buffer"])
def test_methods_take_the_arguments_of_dqn_in_the_same_order(method: str) -> None:
    ours, theirs = (inspect.signature(getattr(algorithm, method)).parameters for algorithm in (LectureDQN, DQN))
    assert list(ours) == list(theirs)


def test_attributes_of_dqn_are_there() -> None:
    ours, theirs = (algorithm("MlpPolicy", "CartPole-v1", buffer_size=10) for algorithm in (LectureDQN, DQN))
    missing = [name for name in vars(theirs) if not hasattr(ours, name)]
    # SB3 gives an unfinished model no logger, and neither do we
    assert missing == []
    for name in ("q_net", "q_net_target", "replay_buffer", "exploration_schedule", "batch_norm_stats", "policy"):
        assert getattr(ours, name) is not None


def test_policy_arguments_of_dqn_are_taken_in_the_same_order() -> None:
    ours, theirs = (list(inspect.signature(a.policy_aliases["MlpPolicy"]).parameters) for a in (LectureDQN, DQN))
    assert ours[: len(theirs)] == theirs


def test_it_learns_an_identity_and_predicts_greedily() -> None:
    env = IdentityEnv(dim=3)
    model = LectureDQN(
        "MlpPolicy",
        env,
        learning_starts=50,
        gamma=0.0,
        learning_rate=3e-3,
        train_freq=1,
        policy_kwargs={"net_arch": [16]},
        seed=0,
    )
    model.learn(600)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=10)  # type: ignore[arg-type]
    assert mean == 100


@pytest.mark.parametrize("n_envs", [1, 3])
def test_vec_normalize_trains_on_normalised_and_stores_raw_observations(n_envs: int) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=n_envs, seed=0))
    model = LectureDQN("MlpPolicy", env, **SMALL).learn(150)
    assert model.get_vec_normalize_env() is env
    buffer = model.replay_buffer
    assert buffer is not None
    raw = th.as_tensor(buffer.observations[: buffer.pos])
    sampled = model._sample_batch(500).observations
    assert sampled.std(dim=0).min() > 2 * raw.flatten(0, 1).std(dim=0).min()
    assert set(buffer.rewards[: buffer.pos].flatten()) == {1.0}


def test_her_replay_buffer() -> None:
    env = BitFlippingEnv(n_bits=3, continuous=False)
    model = LectureDQN("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **SMALL).learn(100)
    assert isinstance(model.replay_buffer, HerReplayBuffer)
    assert model._n_updates > 0
    observation, _ = env.reset(seed=0)
    assert model.predict(observation, deterministic=True)[0].shape == ()


def test_dictionary_observations_with_several_environments() -> None:
    env = make_vec_env(lambda: SimpleMultiObsEnv(), n_envs=2)
    model = LectureDQN("MultiInputPolicy", env, **SMALL).learn(60)
    assert isinstance(model.replay_buffer, DictReplayBuffer)
    assert model._n_updates > 0
    observations = env.reset()
    assert isinstance(observations, dict)
    for exploration_rate in (0.0, 0.5, 1.0):
        model.exploration_rate = exploration_rate
        assert model.predict(observations)[0].shape == (2,)


def test_image_observations_and_frame_stacks() -> None:
    env = VecFrameStack(
        make_vec_env(FakeImageEnv, n_envs=2, env_kwargs={"discrete": True, "screen_height": 36, "screen_width": 36}), n_stack=2
    )
    model = LectureDQN("CnnPolicy", env, **SMALL).learn(60)
    assert model._n_updates > 0
    assert model.observation_space.shape == (2, 36, 36)


class DiscreteObservations(gymnasium.Env[Any, int]):
    observation_space = spaces.Discrete(5)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        return int(self.np_random.integers(5)), {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return int(self.np_random.integers(5)), 1.0, bool(self.np_random.random() < 0.2), False, {}


@pytest.mark.parametrize("n_envs", [1, 3])
def test_discrete_observations(n_envs: int) -> None:
    model = LectureDQN("MlpPolicy", make_vec_env(DiscreteObservations, n_envs=n_envs), **SMALL).learn(60)
    assert model._n_updates > 0
    assert model.predict(np.array([1, 2, 3]))[0].shape == (3,)
    assert model.predict(2, deterministic=True)[0].shape == ()  # type: ignore[arg-type]


def test_subprocess_environments() -> None:
    env = make_vec_env("CartPole-v1", n_envs=2, vec_env_cls=SubprocVecEnv, seed=0)
    model = LectureDQN("MlpPolicy", env, **SMALL).learn(60)
    env.close()
    assert model._n_updates > 0


def test_n_step_returns_reach_the_target() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", n_steps=3, gamma=0.5, train_freq=1, **SMALL).learn(100)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    batch = model._sample_batch(300)
    # all rewards are 1: 1 + γ + γ², less where the episode ends before
    assert set(batch.rewards.flatten().tolist()) == {1.0, 1.5, 1.75}
    full = batch.rewards.flatten() == 1.75
    assert batch.discounts is not None
    assert set(batch.discounts.flatten()[full].tolist()) == {0.125}


@pytest.mark.parametrize("changes", [{}, {"replay_buffer_kwargs": {"handle_timeout_termination": True}}])
def test_a_model_with_n_step_returns_is_loaded_without_a_warning_and_keeps_them(
    changes: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    LectureDQN("MlpPolicy", "CartPole-v1", n_steps=4, gamma=0.5, **SMALL).save(tmp_path / "model")
    loaded = LectureDQN.load(tmp_path / "model", **changes)  # as the zoo's -i does, with the entry's own arguments
    assert not [warning for warning in recwarn if "n_steps" in str(warning.message)]
    assert isinstance(loaded.replay_buffer, NStepReplayBuffer)
    assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (4, 0.5)


@pytest.mark.parametrize(
    ("changes", "buffer_class"), [({"n_steps": 3}, NStepReplayBuffer), ({"optimize_memory_usage": True}, ReplayBuffer)]
)
def test_a_loaded_model_takes_the_buffer_that_its_new_arguments_ask_for(
    changes: dict[str, Any], buffer_class: type[ReplayBuffer], tmp_path: Path
) -> None:
    LectureDQN("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "model")
    loaded = LectureDQN.load(tmp_path / "model", env=gymnasium.make("CartPole-v1"), **changes).learn(60)
    assert type(loaded.replay_buffer) is buffer_class
    assert loaded._n_updates > 0


def test_what_reset_returns_is_no_observation() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", **SMALL)
    model.exploration_rate = 0.5
    with pytest.raises(ValueError, match="passed a tuple to the predict"):
        model.predict(gymnasium.make("CartPole-v1").reset())  # type: ignore[arg-type]


class Sequences(BaseFeaturesExtractor):
    """Treats each row of an observation by itself, as encoders of sequences and sets do."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=6)
        self.linear = nn.Linear(4, 2)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.linear(observations.view(-1, 4)).view(-1, 6)
        return features


def test_an_encoder_may_view_the_batch_in_another_shape() -> None:
    class RowsEnv(gymnasium.Env[Any, int]):
        observation_space, action_space = spaces.Box(0, 1, (3, 4), np.float32), spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return np.zeros((3, 4), np.float32), {}

        def step(self, action: int) -> Any:
            return np.ones((3, 4), np.float32), 1.0, False, False, {}

    settings = {**SMALL, "policy_kwargs": {"features_extractor_class": Sequences}}
    model = LectureDQN("MlpPolicy", RowsEnv(), **settings).learn(60)
    assert model._n_updates > 0


def test_what_is_no_gymnasium_environment_gets_sb3s_answer() -> None:
    with pytest.raises(ValueError, match="not a Gymnasium environment"):
        LectureDQN("MlpPolicy", object(), **SMALL)  # type: ignore[arg-type]


def test_an_n_step_buffer_with_arguments_of_its_own_keeps_them() -> None:
    settings: dict[str, Any] = {**SMALL, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.5}}
    with pytest.warns(UserWarning, match="`n_steps=5` is ignored"):
        model = LectureDQN("MlpPolicy", "CartPole-v1", n_steps=5, replay_buffer_class=NStepReplayBuffer, **settings)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, 0.5)


def test_n_steps_beside_a_replay_buffer_of_the_users_own_warn_as_in_sb3() -> None:
    class OwnBuffer(NStepReplayBuffer):
        pass

    with pytest.warns(UserWarning, match="`n_steps=3` is ignored"):
        LectureDQN("MlpPolicy", "CartPole-v1", n_steps=3, replay_buffer_class=OwnBuffer, **SMALL)


@pytest.mark.parametrize("train_freq", [1, 4, np.int64(4), (4, "step"), (1, "episode")])
def test_train_freq_in_steps_and_episodes(train_freq: Any) -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", train_freq=train_freq, gradient_steps=2, **SMALL).learn(100)
    assert model._n_updates > 0
    assert model._n_updates % 2 == 0


def test_gradient_steps_minus_one_means_one_for_each_environment_step() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", train_freq=8, gradient_steps=-1, **SMALL).learn(104)
    assert model._n_updates == 104 - 16  # learning starts after step 20, so with the training at step 24


def test_callbacks_see_the_run(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def callback(local_variables: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.update(local_variables)
        return True

    evaluation = EvalCallback(
        gymnasium.make("CartPole-v1"),
        callback_on_new_best=StopTrainingOnRewardThreshold(10_000),
        eval_freq=40,
        n_eval_episodes=1,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        warn=False,
    )
    checkpoint = EveryNTimesteps(50, CheckpointCallback(1, str(tmp_path / "checkpoints"), save_replay_buffer=True))
    model = LectureDQN("MlpPolicy", "CartPole-v1", train_freq=1, **SMALL)
    model.learn(100, callback=[evaluation, checkpoint, StopTrainingOnMaxEpisodes(1_000)])
    model.learn(10, callback=callback)
    assert {"new_obs", "rewards", "dones", "infos", "actions"} <= set(seen)
    assert (tmp_path / "best_model.zip").exists()
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [40, 80]
    assert sorted(file.suffix for file in (tmp_path / "checkpoints").iterdir()) == [".pkl", ".pkl", ".zip", ".zip"]


def test_a_callback_can_stop_the_run() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(1_000, callback=lambda *_: model.num_timesteps < 30)
    assert model.num_timesteps == 30


def test_progress_bar_and_tensorboard(tmp_path: Path) -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", tensorboard_log=str(tmp_path), **SMALL)
    model.learn(100, progress_bar=True)
    assert [folder.name for folder in tmp_path.iterdir()] == ["LectureDQN_1"]


def test_learning_rate_schedules_are_followed() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_rate=lambda progress: progress * 1e-2, train_freq=1, **SMALL)
    model.learn(100)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    model.learn(100, callback=lambda *_: model.num_timesteps < 50)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.51e-2)


def test_a_custom_policy_class_and_optimizer() -> None:
    class WiderPolicy(LectureDQN.policy_aliases["MlpPolicy"]):  # type: ignore[misc]
        pass

    policy_kwargs = {"net_arch": [8], "optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}}
    model = LectureDQN(WiderPolicy, "CartPole-v1", **{**SMALL, "policy_kwargs": policy_kwargs}).learn(60)
    assert isinstance(model.policy, WiderPolicy)
    assert isinstance(model.policy.optimizer, th.optim.RMSprop)


def test_an_environment_given_by_id_is_made_without_a_render_mode() -> None:
    assert LectureDQN("MlpPolicy", "CartPole-v1").get_env().render_mode is None  # type: ignore[union-attr]
    assert DQN("MlpPolicy", "CartPole-v1", buffer_size=1).get_env().render_mode == "rgb_array"  # type: ignore[union-attr]


def test_evaluation_mode_while_collecting_and_training_mode_while_training() -> None:
    modes: dict[str, set[bool]] = {"collect": set(), "train": set(), "target": set()}
    model = LectureDQN("MlpPolicy", "CartPole-v1", exploration_final_eps=0.0, exploration_fraction=0.0, **SMALL)

    def note_mode(*_: Any) -> None:
        modes["train" if th.is_grad_enabled() else "collect"].add(model.q_net.training)

    model.q_net.register_forward_pre_hook(note_mode)
    model.q_net_target.register_forward_pre_hook(lambda *_: modes["target"].add(model.q_net_target.training))
    model.learn(100)
    assert modes == {"collect": {False}, "train": {True}, "target": {False}}


def test_learning_for_no_step_does_nothing() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", **SMALL)
    assert model.learn(0) is model
    assert model.num_timesteps == 0
