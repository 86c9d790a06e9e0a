"""A run that is interrupted and started again ends bit for bit like one that was not."""

import os
import random
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import ClipReward
from resuming import InterruptAt, Interruption, differences, interrupted_run, kills, run
from scripted_envs import CountingEnv
from stable_baselines3 import DQN, PPO, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecNormalize,
)
from torch import nn

from sb3_lecture_dqn import LectureDQN, ResumableCheckpointCallback
from sb3_lecture_dqn.callbacks import OverestimationCallback
from sb3_lecture_dqn.envs import GymVectorVecEnv
from sb3_lecture_dqn.resume.checkpoint_files import newest_checkpoint
from sb3_lecture_dqn.resume.random_state import random_state, restore_random_state
from sb3_lecture_dqn.resume.training_state import TrainingState

pytestmark = pytest.mark.filterwarnings("ignore:The number of environments used")


SMALL: dict[str, Any] = {
    "buffer_size": 250,
    "learning_starts": 50,
    "batch_size": 16,
    "target_update_interval": 40,
    "policy_kwargs": {"net_arch": [16]},
    "seed": 3,
    "device": "cpu",
}


def small_model(env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> LectureDQN:
    return LectureDQN(policy, env, **{**SMALL, **kwargs})


def train_scenario(scenario: Any, folder: Path, interrupt_at: int = 1_000_000) -> dict[str, str]:
    """Train a scenario of the kill script in this process, and read what came out."""
    import json

    others = [InterruptAt(interrupt_at)]
    kills.train(scenario, folder / "run", folder / "checkpoints", folder / "digest.json", others)
    digests: dict[str, str] = json.loads((folder / "digest.json").read_text())
    return digests


@pytest.mark.parametrize(
    ("env_id", "n_envs"),
    [
        ("LunarLander-v2", 1),
        ("LunarLander-v2", 8),
        ("CartPole-v1", 8),
        ("Acrobot-v1", 1),
        ("MountainCar-v0", 1),
        ("RoboParking-v0", 8),
        (kills.ATARI_GAME, 1),
    ],
)
def test_everything_is_the_same_after_an_interruption(env_id: str, n_envs: int, tmp_path: Path) -> None:
    scenario = kills.Scenario(env_id, n_envs, "dummy", 320, 64)
    expected = train_scenario(scenario, tmp_path / "reference")
    with pytest.raises(Interruption):
        train_scenario(scenario, tmp_path / "interrupted", interrupt_at=230)
    checkpoint = newest_checkpoint(tmp_path / "interrupted" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.num_timesteps == 192
    assert train_scenario(scenario, tmp_path / "interrupted") == expected


@pytest.mark.parametrize("env_id", ["LunarLander-v2", "CartPole-v1"])
def test_environments_in_other_processes_come_back_too(env_id: str, tmp_path: Path) -> None:
    scenario = kills.Scenario(env_id, 2, "subproc", 320, 64)
    expected, _ = kills.uninterrupted(scenario, tmp_path / "reference")
    folder = tmp_path / "interrupted"
    arguments = folder / "run", folder / "checkpoints", folder / "digest.json"
    assert not kills.in_new_process(kills.train, scenario, *arguments, [InterruptAt(230)])
    assert kills.in_new_process(kills.train, scenario, *arguments, [InterruptAt(1_000_000)])
    assert (folder / "digest.json").read_text() == (tmp_path / "reference" / "digest.json").read_text()
    assert expected["parameters"] in (folder / "digest.json").read_text()


class DrawsFromNumpy(gymnasium.Env[np.ndarray, int]):
    """Draws from numpy's global generator, which in a ``SubprocVecEnv`` nothing else of the run draws from."""

    observation_space, action_space = spaces.Box(0, 1, (2,), np.float32), spaces.Discrete(2)

    def _observation(self) -> np.ndarray:
        return np.random.random_sample(2).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            np.random.seed(seed)
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._observation(), 0.0, False, False, {}


def test_the_global_generators_of_other_processes_come_back(tmp_path: Path) -> None:
    with ExitStack() as processes:

        def build() -> LectureDQN:
            env = make_vec_env(DrawsFromNumpy, n_envs=2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
            processes.callback(env.close)
            return small_model(env)

        expected = run(build, 160, tmp_path / "reference")
        assert differences(expected, interrupted_run(build, 160, tmp_path / "run", 130)) == []


def test_killed_processes_go_on_as_if_nobody_had_killed_them(tmp_path: Path) -> None:
    scenario = kills.Scenario("CartPole-v1", 1, "dummy", 800, 80)
    expected, duration = kills.uninterrupted(scenario, tmp_path / "reference")
    result, steps = kills.killed_until_done(scenario, tmp_path / "killed", duration, 2, random.Random(2))
    assert len(steps) == 2
    assert result == expected


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"n_steps": 3},
        {"optimize_memory_usage": True},
        {"train_freq": (1, "episode"), "gradient_steps": -1},
        {"replay_buffer_kwargs": {"handle_timeout_termination": True}},
        {"policy_kwargs": {"net_arch": [16], "activation_fn": nn.Tanh}},
    ],
    ids=["plain", "n_steps", "optimize_memory_usage", "episodes", "timeouts", "plain update"],
)
def test_every_kind_of_training_is_continued(kwargs: dict[str, Any], tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model("CartPole-v1", **kwargs)

    expected = run(build, 480, tmp_path / "reference")
    assert differences(expected, interrupted_run(build, 480, tmp_path / "run", 90, 380)) == []


def test_checkpoints_change_nothing_in_a_run(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model("LunarLander-v2", gradient_steps=2)

    assert differences(run(build, 400, None), run(build, 400, tmp_path)) == []


def test_optimizer_settings_of_numpys_types_are_continued(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        optimizer_kwargs = {"eps": np.float64(1e-5), "betas": (np.float64(0.5), np.float64(0.9)), "amsgrad": np.bool_(True)}
        return small_model("CartPole-v1", policy_kwargs={"net_arch": [16], "optimizer_kwargs": optimizer_kwargs})

    expected = run(build, 300, tmp_path / "reference")
    assert differences(expected, interrupted_run(build, 300, tmp_path / "run", 230)) == []


@pytest.mark.parametrize("copy_info_dict", [False, True])
def test_hindsight_experience_replay_is_continued(copy_info_dict: bool, tmp_path: Path) -> None:
    def build() -> LectureDQN:
        env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=False, max_steps=5)])
        return small_model(
            env,
            "MultiInputPolicy",
            replay_buffer_class=HerReplayBuffer,
            replay_buffer_kwargs={"copy_info_dict": copy_info_dict},
        )

    expected = run(build, 400, tmp_path / "reference")
    assert differences(expected, interrupted_run(build, 400, tmp_path / "run", 330)) == []


class CountingBuffer(ReplayBuffer):
    """A user's class that remembers something of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_added = 0

    def add(self, *args: Any) -> None:
        super().add(*args)
        self.n_added += 1


def test_a_replay_buffer_of_the_users_class_is_continued(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model("CartPole-v1", replay_buffer_class=CountingBuffer)

    model = interrupted_run(build, 400, tmp_path / "run", 330)
    assert differences(run(build, 400, tmp_path / "reference"), model) == []
    assert model.replay_buffer.n_added == 400  # type: ignore[union-attr]


def test_a_replay_buffer_of_the_users_class_stays_on_the_device_of_the_model_that_goes_on(tmp_path: Path) -> None:
    devices = [th.device("cpu"), th.device("cpu:0")]

    def build() -> LectureDQN:
        model = small_model("CartPole-v1", replay_buffer_class=CountingBuffer)
        assert model.replay_buffer is not None
        model.replay_buffer.device = devices.pop(0)
        return model

    model = interrupted_run(build, 400, tmp_path / "run", 330)
    assert devices == []
    assert model.replay_buffer is not None
    assert model.replay_buffer.device == th.device("cpu:0")


def test_a_run_with_two_gpus_goes_on_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[Any] = []
    state = {**random_state(), "cuda": ["of the first", "of the second"]}
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(th.cuda, "set_rng_state_all", restored.append)
    restore_random_state(state)
    assert restored == [["of the first"]]


def test_a_process_that_has_not_used_cuda_is_not_asked_for_its_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was forked may not ask at all."""

    def refuse() -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(th.cuda, "get_rng_state_all", refuse)
    assert random_state()["cuda"] == []


class Mirroring(LectureDQN):
    """A user's class that stores each transition three times, twice in a mirror."""

    def _store_transition(self, replay_buffer: Any, buffer_action: Any, new_obs: Any, *args: Any) -> None:  # type: ignore[override]
        for factor in (-1, 2):
            replay_buffer.add(factor * self._last_obs, factor * new_obs, buffer_action, *args)
        super()._store_transition(replay_buffer, buffer_action, new_obs, *args)


def test_a_buffer_that_a_subclass_fills_faster_is_continued(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return Mirroring("MlpPolicy", "CartPole-v1", **{**SMALL, "buffer_size": 400})

    expected = run(build, 900, tmp_path / "reference", save_freq=200)
    assert differences(expected, interrupted_run(build, 900, tmp_path / "run", 720, save_freq=200)) == []


class Decaying(LectureDQN):
    """A user's class with an ε of its own, which falls with each episode, and another name for a part of the network."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.epsilon = 1.0
        self.last_layer = self.q_net.q_net[-1]
        self.lock = threading.Lock()

    def _update_info_buffer(self, infos: Any, dones: Any = None) -> None:
        super()._update_info_buffer(infos, dones)
        self.epsilon *= 0.9 if dones.any() else 1.0

    def _update_exploration_rate(self, progress_remaining: float) -> None:
        self.exploration_rate = self.epsilon


def test_what_a_subclass_remembers_is_continued_and_what_cannot_be_is_named(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return Decaying("MlpPolicy", "CartPole-v1", **SMALL)

    expected = run(build, 500, None)
    with pytest.warns(UserWarning, match=r"a checkpoint cannot keep Decaying\.lock, which cannot be pickled"):
        resumed: Any = interrupted_run(build, 500, tmp_path, 420)
    assert differences(expected, resumed) == []
    assert resumed.epsilon < 0.5
    assert resumed.last_layer is resumed.q_net.q_net[-1]


class Curriculum(gymnasium.Env[np.ndarray, int]):
    """Large rewards in the first 400 steps, and none later."""

    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)
    n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {}

    def _observation(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        return self._observation(), 1e5 * (self.n_steps <= 400), False, self.n_steps % 50 == 0, {}


def test_a_large_q_of_rewards_that_were_seen_before_the_interruption_is_no_explosion(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model(Curriculum(), train_freq=1, gradient_steps=1, learning_rate=0.05, gamma=0.9)

    expected = run(build, 1000, tmp_path / "reference")
    assert differences(expected, interrupted_run(build, 1000, tmp_path / "run", 850)) == []


@pytest.mark.parametrize("env_id", ["RoboParking-v0", "LunarLander-v2", "CartPole-v1"])
def test_gymnasiums_vector_environments_come_back(env_id: str, tmp_path: Path) -> None:
    def build() -> LectureDQN:
        mode = "vector_entry_point" if env_id == "RoboParking-v0" else "sync"
        return small_model(GymVectorVecEnv(gymnasium.make_vec(env_id, num_envs=3, vectorization_mode=mode)))

    expected = run(build, 330, tmp_path / "reference")
    assert differences(expected, interrupted_run(build, 330, tmp_path / "run", 250)) == []


class Photographer(BaseCallback):
    """Takes pictures, as a recorder of videos does."""

    def _on_step(self) -> bool:
        if self.n_calls % 20 == 0:
            assert all(picture is not None for picture in self.training_env.get_images())
        return True


@pytest.mark.filterwarnings("error:.*not reproducible")
@pytest.mark.parametrize("is_vectorized", [False, True])
def test_robo_parking_comes_back_after_it_was_rendered(is_vectorized: bool, tmp_path: Path) -> None:
    def build() -> LectureDQN:
        if is_vectorized:
            env = GymVectorVecEnv(gymnasium.make_vec("RoboParking-v0", num_envs=2, render_mode="rgb_array"))
            return small_model(env)
        return small_model(gymnasium.make("RoboParking-v0", render_mode="rgb_array"))

    expected = run(build, 200, tmp_path / "reference")
    with pytest.raises(Interruption):
        run(build, 200, tmp_path / "run", Photographer(), InterruptAt(150))
    assert differences(expected, run(build, 200, tmp_path / "run", Photographer(), InterruptAt(1_000))) == []


def test_stacked_frames_are_continued(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model(VecFrameStack(make_vec_env("CartPole-v1", n_envs=2, seed=5), 3))

    expected = run(build, 400, tmp_path / "reference")
    assert differences(expected, interrupted_run(build, 400, tmp_path / "run", 330)) == []


def test_recorded_environments_can_still_be_made_again_by_their_id(tmp_path: Path) -> None:
    model = small_model("LunarLander-v2")
    gap = OverestimationCallback(eval_freq=60, n_eval_episodes=1)
    model.learn(100, callback=[ResumableCheckpointCallback(50, tmp_path), gap])
    spec = model.get_env().get_attr("spec")[0]  # type: ignore[union-attr]
    assert [wrapper.name for wrapper in spec.additional_wrappers] == ["Monitor"]


class Irreproducible(gymnasium.Env[np.ndarray, int]):
    """Draws from the system, and cannot be pickled."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 1, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.handle = threading.Lock()

    def _observation(self) -> np.ndarray:
        return np.frombuffer(os.urandom(2), dtype=np.uint8).astype(np.float32) / 255

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._observation(), 0.0, False, False, {}


def test_an_irreproducible_environment_is_named_and_starts_a_new_episode(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model(Irreproducible())

    with pytest.warns(UserWarning, match=r"not reproducible \(the same \d+ actions led to another observation\)"):
        model = interrupted_run(build, 400, tmp_path, 250)
    assert model.num_timesteps == 400
    assert model.replay_buffer is not None
    assert model.replay_buffer.full


class TakesALock(CountingEnv):
    """Can be pickled until its first step."""

    def __init__(self) -> None:
        super().__init__(length=10**9)
        self.handle: Any = None

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.handle = threading.Lock()
        return super().step(action)


@pytest.mark.parametrize("is_normalised", [False, True])
def test_an_environment_that_can_no_longer_be_pickled_is_named_and_starts_a_new_episode(
    is_normalised: bool, tmp_path: Path
) -> None:
    def build() -> LectureDQN:
        env = make_vec_env(TakesALock)
        return small_model(VecNormalize(env) if is_normalised else env)

    with pytest.warns(UserWarning, match=r"not reproducible \(handle can no longer be pickled\)"):
        buffer = interrupted_run(build, 200, tmp_path, 150).replay_buffer
    assert buffer is not None
    assert buffer.next_observations[99].tolist() == [[0, 100]]
    assert buffer.observations[100].tolist() == [[1, 0]]


@pytest.mark.filterwarnings("ignore:the environment is not reproducible")
@pytest.mark.parametrize("kwargs", [{"n_steps": 3}, {"optimize_memory_usage": True}], ids=["n_steps", "optimize_memory_usage"])
def test_no_episode_goes_on_into_the_new_one_that_a_continued_run_starts(kwargs: dict[str, Any], tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model(TakesALock(), buffer_size=1_000, **kwargs)

    buffer = interrupted_run(build, 300, tmp_path, 150, 250).replay_buffer
    assert buffer is not None
    assert np.flatnonzero(buffer.dones).tolist() == [99, 199]


def test_environments_in_gymnasiums_processes_start_new_episodes_and_say_so(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model(GymVectorVecEnv(gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="async")))

    first = build()
    with pytest.raises(Interruption):
        first.learn(200, callback=[ResumableCheckpointCallback(50, tmp_path), InterruptAt(130)])
    first.env.close()  # type: ignore[union-attr]
    second = build()
    with pytest.warns(UserWarning, match=r"not reproducible \(.* of AsyncVectorEnv cannot be pickled\)"):
        second.learn(200, callback=[ResumableCheckpointCallback(50, tmp_path), InterruptAt(1_000)])
    second.env.close()  # type: ignore[union-attr]
    assert second.num_timesteps == 200


def test_random_actions_are_continued_in_the_middle_of_a_replayed_episode(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model("LunarLander-v2", learning_starts=10**6)

    expected = run(build, 60, tmp_path / "reference")
    assert differences(expected, interrupted_run(build, 60, tmp_path / "run", 50, save_freq=20)) == []


@pytest.mark.filterwarnings("error:.*not reproducible")
def test_a_replayed_episode_is_continued_twice(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model("LunarLander-v2", learning_starts=10**6)

    expected = run(build, 250, tmp_path / "reference", save_freq=10)
    # in the third episode, and from a checkpoint that the first continuation saved
    assert differences(expected, interrupted_run(build, 250, tmp_path / "run", 230, 238, save_freq=10)) == []


def lander_with_options(**options: Any) -> LectureDQN:
    env = make_vec_env("LunarLander-v2", seed=1)
    env.set_options(options)  # for the first episode, which is longer than these runs
    return small_model(env)


@pytest.mark.filterwarnings("error:.*not reproducible")
def test_an_episode_that_began_with_functions_as_options_is_continued(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return lander_with_options(wind=lambda: 1.0)

    expected = run(build, 60, tmp_path / "reference", save_freq=20)
    assert differences(expected, interrupted_run(build, 60, tmp_path / "run", 50, save_freq=20)) == []


def test_an_episode_that_began_with_options_that_cannot_be_pickled_is_given_up(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"not reproducible \(reset_kwargs of its episode cannot be pickled\)"):
        model = interrupted_run(lambda: lander_with_options(owner=weakref.ref(LectureDQN)), 60, tmp_path, 50, save_freq=20)
    assert model.num_timesteps == 60


class HoldsALock(VecEnvWrapper):
    """A wrapper with an attribute that cannot be pickled."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.lock = threading.Lock()

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


def test_what_a_wrapper_cannot_give_is_named(tmp_path: Path) -> None:
    model = small_model(HoldsALock(make_vec_env("CartPole-v1")))
    with pytest.warns(UserWarning, match=r"a checkpoint cannot keep HoldsALock\.lock"):
        model.learn(60, callback=ResumableCheckpointCallback(50, tmp_path))


@pytest.mark.filterwarnings("error:a checkpoint cannot keep")
def test_a_progress_bar_is_no_part_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tqdm.rich")
    expected = run(lambda: small_model("CartPole-v1"), 200, None)
    for _ in range(2):  # the second continues the first
        model = small_model("CartPole-v1")
        model.learn(200, callback=ResumableCheckpointCallback(50, tmp_path), progress_bar=True)
    assert differences(expected, model) == []


class OwnReplayBuffer(ReplayBuffer):
    """A buffer of another name."""


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    run(lambda: small_model("CartPole-v1"), 150, tmp_path)
    with pytest.raises(ValueError, match=r"gamma must be 0.99, with which the run in .* was started, got 0.5"):
        run(lambda: small_model("CartPole-v1", gamma=0.5), 150, tmp_path)
    with pytest.raises(ValueError, match="total_timesteps must be 150"):
        run(lambda: small_model("CartPole-v1"), 300, tmp_path)
    with pytest.raises(ValueError, match="seed must be 3"):
        run(lambda: small_model("CartPole-v1", seed=4), 150, tmp_path)
    for changed in (
        {"learning_rate": 0.5},
        {"train_freq": 5},
        {"policy_kwargs": {"net_arch": [9]}},
        {"replay_buffer_class": OwnReplayBuffer},
        {"replay_buffer_kwargs": {"handle_timeout_termination": True}},
    ):
        (name, *_) = changed
        with pytest.raises(ValueError, match=f"^{name} must be .*, with which the run in"):
            run(lambda changed=changed: small_model("CartPole-v1", **changed), 150, tmp_path)


def windy_lander(**kwargs: Any) -> VecEnv:
    return make_vec_env("LunarLander-v2", env_kwargs={"enable_wind": True, "wind_power": 5.0, **kwargs})


def bit_flipping(env: Any = BitFlippingEnv) -> VecEnv:
    return make_vec_env(env, env_kwargs={"n_bits": 4, "continuous": False})


class OtherBitFlipping(BitFlippingEnv):
    """Has the same spaces."""


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (windy_lander, lambda: windy_lander(wind_power=9.0), r"env kwargs must be \{.*wind_power: 5.0\}.*wind_power: 9.0\}"),
        (
            lambda: make_vec_env("CartPole-v0"),
            lambda: make_vec_env("CartPole-v1"),
            "env id must be CartPole-v0, .* CartPole-v1",
        ),
        (bit_flipping, lambda: bit_flipping(OtherBitFlipping), r"env must be .*\(BitFlippingEnv.*Monitor\(OtherBitFlipping"),
        (windy_lander, lambda: VecNormalize(windy_lander()), r"env must be DummyVecEnv.*, got VecNormalize\(DummyVecEnv\("),
        (lambda: VecNormalize(windy_lander()), windy_lander, r"env must be VecNormalize\(.*, got DummyVecEnv\("),
        (
            lambda: make_vec_env("CartPole-v1"),
            lambda: make_vec_env("CartPole-v1", wrapper_class=ClipReward, wrapper_kwargs={"max_reward": 0.5}),
            r"env must be .*\(1 x Monitor\(.*, got .*\(1 x ClipReward\(Monitor\(",
        ),
        (
            lambda: GymVectorVecEnv(gymnasium.make_vec("RoboParking-v0", num_envs=2)),
            lambda: GymVectorVecEnv(gymnasium.make_vec("RoboParking-v0", num_envs=2, mass=20.0)),
            "env kwargs must be .*, got {.*mass: 20.0",
        ),
    ],
    ids=["arguments", "id", "class", "VecNormalize added", "VecNormalize removed", "wrapper", "vector environment"],
)
def test_a_folder_with_a_run_of_another_environment_is_refused(
    first: Callable[[], Any], second: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    policy = "MultiInputPolicy" if first is bit_flipping else "MlpPolicy"
    run(lambda: small_model(first(), policy), 60, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        run(lambda: small_model(second(), policy), 60, tmp_path)
    assert "\n" not in str(error.value)


def test_an_evaluation_in_another_environment_is_refused(tmp_path: Path) -> None:
    def evaluated_run(wind_power: float) -> None:
        evaluation = EvalCallback(windy_lander(wind_power=wind_power), eval_freq=1_000)
        run(lambda: small_model("LunarLander-v2"), 60, tmp_path, evaluation)

    evaluated_run(5.0)
    with pytest.raises(ValueError, match=r"env kwargs 1 of the callbacks must be .*wind_power: 5.0.*, got .*wind_power: 9.0"):
        evaluated_run(9.0)


def test_a_checkpoint_that_does_not_say_what_the_environment_was_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> LectureDQN:
        return small_model("CartPole-v1")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "_describe_vec_envs", lambda _: {})
        expected = run(build, 250, tmp_path)
    assert differences(run(build, 250, tmp_path), expected) == []


def test_how_an_environment_is_rendered_does_not_make_another_run(tmp_path: Path) -> None:
    def build(render_mode: str | None) -> LectureDQN:
        return small_model(gymnasium.make("CartPole-v1", render_mode=render_mode))

    expected = run(lambda: build(None), 250, tmp_path)
    assert differences(run(lambda: build("rgb_array"), 250, tmp_path), expected) == []


def test_a_finished_run_comes_to_the_same_end_again(tmp_path: Path) -> None:
    def build() -> LectureDQN:
        return small_model("CartPole-v1")

    assert differences(run(build, 250, tmp_path), run(build, 250, tmp_path)) == []


def test_one_callback_serves_one_run(tmp_path: Path) -> None:
    model = small_model("CartPole-v1")
    callback = ResumableCheckpointCallback(50, tmp_path)
    model.learn(60, callback=callback)
    with pytest.raises(ValueError, match="must be a new ResumableCheckpointCallback"):
        model.learn(60, callback=callback)


def test_a_place_where_it_is_not_called_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not within another callback"):
        small_model("CartPole-v1").learn(60, callback=EveryNTimesteps(20, ResumableCheckpointCallback(50, tmp_path)))


@pytest.mark.parametrize("algorithm", [DQN, PPO])
def test_a_model_of_another_algorithm_is_refused(algorithm: type[DQN | PPO], tmp_path: Path) -> None:
    model = algorithm("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(ValueError, match=f"model must be a LectureDQN to be trained with .*, got {algorithm.__name__}$"):
        model.learn(60, callback=ResumableCheckpointCallback(50, tmp_path / "run"))
    assert model.num_timesteps == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("save_freq", 0), ("keep_last", 0), ("save_freq", 1.5)])
def test_numbers_out_of_range_are_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
        ResumableCheckpointCallback(**{"save_freq": 10, "folder": tmp_path, name: value})


def test_a_function_as_a_callback_stays_the_users_own(tmp_path: Path) -> None:
    seen: list[int] = []

    def note(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        seen.append(locals_["self"].num_timesteps)
        return True

    for n_timesteps in (160, 160):
        checkpointing = ResumableCheckpointCallback(100, tmp_path)
        small_model("CartPole-v1").learn(n_timesteps, callback=[ConvertCallback(note), checkpointing])
    assert seen == [*range(1, 161), *range(101, 161)]


def test_callbacks_with_environments_of_their_own_are_continued(tmp_path: Path) -> None:
    def evaluated_run(folder: Path, *others: BaseCallback) -> tuple[LectureDQN, EvalCallback]:
        model = small_model(make_vec_env("LunarLander-v2", seed=1))
        evaluation = EvalCallback(make_vec_env("LunarLander-v2", seed=2), n_eval_episodes=1, eval_freq=90, verbose=0)
        evaluation.log_path = str(folder.parent / f"{folder.name}_evaluations")
        gap = OverestimationCallback(make_vec_env("LunarLander-v2", seed=4), eval_freq=100, n_eval_episodes=1)
        checkpointing = ResumableCheckpointCallback(100, folder)
        model.learn(300, callback=[gap, evaluation, checkpointing, *others])
        return model, evaluation

    expected, expected_evaluation = evaluated_run(tmp_path / "reference")
    with pytest.raises(Interruption):
        evaluated_run(tmp_path / "run", InterruptAt(270))
    model, evaluation = evaluated_run(tmp_path / "run", InterruptAt(1_000))
    assert differences(expected, model) == []
    assert evaluation.evaluations_results == expected_evaluation.evaluations_results
    assert evaluation.best_mean_reward == expected_evaluation.best_mean_reward


def test_an_environment_of_a_callback_whose_episode_began_before_its_record_is_named(tmp_path: Path) -> None:
    def evaluated_run(interrupt_at: int = 1_000) -> None:
        env = make_vec_env("LunarLander-v2", seed=1)
        env.reset()
        evaluation = EvalCallback(env, eval_freq=10_000)
        run(lambda: small_model("CartPole-v1"), 200, tmp_path, evaluation, InterruptAt(interrupt_at))

    with pytest.raises(Interruption):
        evaluated_run(interrupt_at=150)
    with pytest.warns(UserWarning, match=r"could not be brought back \(its episode began before it was recorded\)"):
        evaluated_run()


def test_a_callback_that_writes_elsewhere_goes_on_there(tmp_path: Path) -> None:
    def saving_run(place: str, interrupt_at: int = 1_000) -> None:
        saving = CheckpointCallback(40, str(tmp_path / place))
        run(lambda: small_model("CartPole-v1"), 200, tmp_path / "run", saving, InterruptAt(interrupt_at))

    with pytest.raises(Interruption):
        saving_run("here", interrupt_at=150)
    saving_run("there")
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {f"rl_model_{step}_steps.zip" for step in (120, 160, 200)}


def test_tensorboard_goes_on_in_the_same_folder_without_double_points(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def build(folder: Path) -> LectureDQN:
        return small_model("CartPole-v1", tensorboard_log=str(folder), seed=9)

    def points(folder: Path) -> list[tuple[int, float]]:
        (log_folder,) = folder.iterdir()
        log = event_accumulator.EventAccumulator(str(log_folder)).Reload()
        return [(event.step, event.value) for event in log.Scalars("rollout/ep_rew_mean")]

    run(lambda: build(tmp_path / "log a"), 600, tmp_path / "a")
    interrupted_run(lambda: build(tmp_path / "log b"), 600, tmp_path / "b", 380)
    assert len(points(tmp_path / "log a")) > 3
    assert points(tmp_path / "log b") == points(tmp_path / "log a")


def test_continuing_a_run_leaves_the_tensorboard_files_of_others(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    def learn(interrupt_at: int = 1_000) -> None:
        model = small_model("CartPole-v1", tensorboard_log=str(tmp_path / "log"))
        callbacks = [ResumableCheckpointCallback(100, tmp_path / "run"), InterruptAt(interrupt_at)]
        model.learn(300, callback=callbacks, reset_num_timesteps=False)  # for which SB3 takes the newest folder that is there

    with pytest.raises(Interruption):
        learn(interrupt_at=250)
    small_model("CartPole-v1", tensorboard_log=str(tmp_path / "log")).learn(100)
    others = {path: path.read_bytes() for path in (tmp_path / "log").rglob("events.*")}
    learn()
    left = {path: path.read_bytes() for path in others if path.exists()}
    assert left == others
    assert len(list((tmp_path / "log").rglob("events.*"))) == len(others) + 1
