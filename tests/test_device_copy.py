"""
What a replay buffer keeps on a GPU is what it holds.

The copy is kept on the CPU as it would be kept on a GPU, and on a CUDA device where there is one, beside a buffer that keeps
none.
"""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium
import numba
import numpy as np
import pytest
import torch as th
from both_paths import DEVICES
from gymnasium import spaces
from stable_baselines3.common import buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_lecture_dqn import LectureDQN, ResumableCheckpointCallback, replay_buffer
from sb3_lecture_dqn.envs import GymVectorVecEnv
from sb3_lecture_dqn.fast import device_copy
from sb3_lecture_dqn.fast.device_copy import DeviceCopy, DrawnRows
from sb3_lecture_dqn.replay_buffer import ContiguousReplayBuffer, repeat_last_transitions

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 4, 5), np.uint8)
ACTIONS = spaces.Discrete(4)
#: The device of buffers that keep no copy.
HOST = th.device("cpu:0")


@pytest.fixture(autouse=True, params=DEVICES)
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Buffers keep a copy; how many rows of all environments are written to it each time."""
    written: list[int] = []
    write = DeviceCopy._write

    def noted_write(copy: DeviceCopy, buffer: ContiguousReplayBuffer, words: th.Tensor, start: int, end: int) -> None:
        written.append(end - start)
        write(copy, buffer, words, start, end)

    monkeypatch.setattr(DeviceCopy, "_write", noted_write)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)  # what is compiled reads on the host
    monkeypatch.setattr(replay_buffer, "is_cuda", lambda device: device != HOST)
    monkeypatch.setattr(device_copy, "free_memory", lambda _: 10_000_000)
    monkeypatch.setattr(th.cuda, "is_available", lambda: request.param == "cuda")  # SB3 takes a GPU where there is one
    monkeypatch.setattr(Pair, "device", request.param)
    return written


def has_copy(buffer: ContiguousReplayBuffer) -> bool:
    return buffer._device_copy._copied is not None


class Pair:
    """A buffer with a copy, and the same one without."""

    device: ClassVar[str] = "cpu"

    def __init__(self, space: spaces.Box = VECTOR, size: int = 20, n_envs: int = 1, **kwargs: Any) -> None:
        arguments = {"device": self.device, "n_envs": n_envs, **kwargs}
        self.with_copy, self.without = (ContiguousReplayBuffer(size * n_envs, space, ACTIONS, **arguments) for _ in range(2))
        self.without.device = HOST
        self.space, self.n_envs, self.rng = space, n_envs, np.random.default_rng(0)
        space.seed(0)

    @property
    def both(self) -> tuple[ContiguousReplayBuffer, ContiguousReplayBuffer]:
        return self.with_copy, self.without

    def add(self, n_steps: int) -> None:
        for _ in range(n_steps):
            observations = np.stack([[self.space.sample() for _ in range(self.n_envs)] for _ in range(2)])
            actions = self.rng.integers(4, size=(self.n_envs, 1))
            rewards, dones = self.rng.normal(size=self.n_envs), self.rng.integers(2, size=self.n_envs)
            infos = [{"TimeLimit.truncated": bool(self.rng.integers(2))} for _ in range(self.n_envs)]
            for buffer in self.both:
                buffer.add(*observations, actions, rewards, dones, infos)

    def samples(self) -> tuple[ReplayBufferSamples, ReplayBufferSamples]:
        samples = []
        for buffer in self.both:
            np.random.seed(1)
            samples.append(buffer.sample(50))
        return samples[0], samples[1]

    def assert_alike(self) -> None:
        for first, second in zip(*self.samples(), strict=True):
            if first is None or second is None:
                assert first is second
                continue
            assert (first.shape, first.dtype) == (second.shape, second.dtype)
            assert th.equal(first.cpu(), second)


@pytest.mark.parametrize("space", [VECTOR, IMAGE])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("handle_timeout_termination", [False, True])
def test_batches_are_those_of_the_host_before_and_after_the_ring_is_full(
    space: spaces.Box, n_envs: int, handle_timeout_termination: bool
) -> None:
    pair = Pair(space, n_envs=n_envs, handle_timeout_termination=handle_timeout_termination)
    for n_steps in (1, 4, 0, 14, 1, 7, 13, 20, 33, 1):
        pair.add(n_steps)
        pair.assert_alike()
    assert has_copy(pair.with_copy)
    assert not has_copy(pair.without)
    assert all(part.is_contiguous() for part in pair.samples()[0] if part is not None)  # an encoder may need that


@pytest.mark.parametrize("n_envs", [1, 3])
def test_what_is_drawn_to_be_read_on_the_device_are_the_same_transitions(n_envs: int) -> None:
    pair = Pair(n_envs=n_envs)
    for n_steps in (5, 50):
        pair.add(n_steps)
        np.random.seed(1)
        drawn = pair.with_copy.draw(40)
        assert isinstance(drawn, DrawnRows)
        assert isinstance(drawn.indices, np.ndarray)
        np.random.seed(1)
        expected = pair.without.sample(40)
        samples = drawn.records.samples(th.from_numpy(drawn.indices).to(drawn.records.words.device))
        assert all(th.equal(part.cpu(), other) for part, other in zip(samples[:5], expected[:5], strict=True))  # type: ignore[union-attr]


def test_transitions_that_somebody_has_looked_at_are_drawn_on_the_host_and_only_then_copied(copies: list[int]) -> None:
    pair = Pair()
    pair.add(5)
    for _ in range(3):
        assert pair.with_copy.rewards.shape == (20, 1)  # somebody looks
        for buffer in pair.both:
            np.random.seed(1)
            drawn = buffer.draw(4)
            assert not isinstance(drawn, DrawnRows)
            np.random.seed(1)
            assert th.equal(drawn.rewards.cpu(), pair.without.sample(4).rewards)
    assert copies == []
    assert isinstance(pair.with_copy.draw(4), DrawnRows)
    assert sum(copies) == 5


def test_only_new_rows_are_copied(copies: list[int]) -> None:
    pair = Pair(size=20, n_envs=2)
    for n_steps, expected in ((5, 5), (1, 1), (0, 0), (16, 16), (3, 3), (50, 20)):
        pair.add(n_steps)
        copies.clear()
        pair.samples()
        assert sum(copies) == expected


def test_what_sb3s_constructor_does_is_no_look_from_outside(monkeypatch: pytest.MonkeyPatch, copies: list[int]) -> None:
    """With psutil it looks at the arrays' sizes."""
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(buffers, "psutil", memory)
    pair = Pair()
    pair.add(5)
    pair.assert_alike()
    assert sum(copies) == 5


def write_into_rewards(buffer: ContiguousReplayBuffer) -> None:
    buffer.rewards[2] = 7


def assign_rewards(buffer: ContiguousReplayBuffer) -> None:
    buffer.rewards = np.full((buffer.buffer_size, buffer.n_envs), 7, np.float32)  # not even a look at what was there


def write_into_observations_by_a_method(buffer: ContiguousReplayBuffer) -> None:
    buffer.observations.fill(0.5)


def fill_by_hand(buffer: ContiguousReplayBuffer) -> None:
    buffer.rewards[:], buffer.full = 3, True


@pytest.mark.parametrize("change", [write_into_rewards, assign_rewards, write_into_observations_by_a_method, fill_by_hand])
def test_what_is_written_into_the_arrays_is_in_the_next_batch_and_in_those_after_it(
    change: Callable[[ContiguousReplayBuffer], None],
) -> None:
    pair = Pair()
    pair.add(10)
    before, _ = pair.samples()
    for buffer in pair.both:
        change(buffer)
    after, _ = pair.samples()
    assert not (th.equal(before.rewards, after.rewards) and th.equal(before.observations, after.observations))
    for n_steps in (0, 0, 1, 30):
        pair.add(n_steps)
        pair.assert_alike()


def pickled(buffer: ContiguousReplayBuffer, protocol: int) -> ContiguousReplayBuffer:
    loaded: ContiguousReplayBuffer = pickle.loads(pickle.dumps(buffer, protocol))
    return loaded


WAYS = [lambda buffer: buffer, partial(pickled, protocol=4), partial(pickled, protocol=5), copy.deepcopy]


@pytest.mark.parametrize("made", WAYS)
@pytest.mark.parametrize(
    "hold",
    [lambda buffer: buffer.rewards, lambda buffer: buffer.rewards[3:], lambda buffer: th.from_numpy(buffer.rewards)[3:]],
)
def test_an_array_that_somebody_holds_may_be_written_into_at_any_time(
    hold: Callable[[ContiguousReplayBuffer], Any], made: Callable[[Any], ContiguousReplayBuffer], copies: list[int]
) -> None:
    pair = Pair()
    pair.add(10)
    pair.with_copy = made(pair.with_copy)
    held = [hold(buffer) for buffer in pair.both]
    for value in (1.0, 2.0, 3.0):
        for array in held:
            array[:] = value
        assert value in pair.samples()[0].rewards
        pair.assert_alike()
    assert copies == []
    del held, array
    pair.samples()
    pair.assert_alike()
    assert sum(copies) == 10


def test_training_itself_is_no_look_from_outside(monkeypatch: pytest.MonkeyPatch, copies: list[int]) -> None:
    monkeypatch.setattr(LectureDQN, "metrics_interval", 1)
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=50, batch_size=16, buffer_size=1_000, seed=0)
    model.learn(400)
    assert model._n_updates == 352
    assert sum(copies) == 400


def test_a_pause_of_a_vector_environment_is_no_look_from_outside_either(copies: list[int]) -> None:
    pair = Pair(n_envs=2)
    pair.add(5)
    for buffer in pair.both:
        buffer._records["dones"][-16:] = 1  # of the rows before the newest
        repeat_last_transitions(buffer, [0])
    pair.assert_alike()
    assert sum(copies) == 5


def test_normalised_batches_come_from_the_host(copies: list[int]) -> None:
    env = VecNormalize(GymVectorVecEnv(gymnasium.make_vec("CartPole-v1", num_envs=2)))
    LectureDQN("MlpPolicy", env, buffer_size=300, learning_starts=50, batch_size=16, seed=0).learn(200)
    assert copies == []


def test_a_training_run_is_the_same_with_and_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[float]:
        model = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=300, learning_starts=50, batch_size=16, seed=0)
        model.learn(400)
        return [parameter.sum().item() for parameter in model.policy.parameters()]

    with_copy = run()
    monkeypatch.setattr(replay_buffer, "is_cuda", lambda _: False)
    assert run() == with_copy


def test_a_buffer_that_is_too_large_stays_on_the_host(monkeypatch: pytest.MonkeyPatch, copies: list[int]) -> None:
    for free, is_kept in ((2, True), (1.9, False)):
        pair = Pair()
        n_bytes = free * pair.with_copy._records.nbytes
        monkeypatch.setattr(device_copy, "free_memory", lambda _, n_bytes=n_bytes: n_bytes)
        pair.add(30)
        pair.assert_alike()
        pair.assert_alike()
        assert has_copy(pair.with_copy) == is_kept
        assert bool(copies) == is_kept
        copies.clear()


def test_observations_of_a_type_that_not_every_device_knows_stay_on_the_host() -> None:
    pair = Pair(spaces.Box(0, 9, (2,), np.uint16))
    pair.add(10)
    pair.assert_alike()
    assert not has_copy(pair.with_copy)


@pytest.mark.parametrize("made", WAYS[1:])
def test_a_pickle_holds_no_copy_and_makes_one_again(made: Callable[[Any], ContiguousReplayBuffer], copies: list[int]) -> None:
    pair = Pair()
    pair.add(10)
    before = len(pickle.dumps(pair.with_copy))
    pair.assert_alike()
    assert len(pickle.dumps(pair.with_copy)) == before
    pair.with_copy = made(pair.with_copy)
    copies.clear()
    pair.assert_alike()
    assert sum(copies) == 10


def test_a_buffer_that_goes_to_another_device_begins_again(copies: list[int]) -> None:
    """SB3 gives a loaded buffer the model's device."""
    pair = Pair()
    pair.add(10)
    other = {"cpu": "cpu:1", "cuda": "cpu"}[pair.device]
    steps = (("cpu:0", 0), (pair.device, 10), ("cpu:0", 0), (pair.device, 0), (other, 10), (other, 0), (pair.device, 10))
    for device, expected in steps:
        copies.clear()
        pair.with_copy.device = th.device(device)
        pair.assert_alike()
        assert sum(copies) == expected


def test_a_device_whose_memory_is_in_pieces_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> th.Tensor:
        raise th.OutOfMemoryError("CUDA out of memory")

    pair = Pair()
    pair.add(10)
    monkeypatch.setattr(device_copy.th, "zeros", fail)
    pair.assert_alike()
    pair.assert_alike()
    assert not has_copy(pair.with_copy)


class Stop(BaseCallback):
    """Ends a training run too early."""

    step: ClassVar[int]

    def _on_step(self) -> bool:
        return self.num_timesteps < self.step


def test_a_checkpoint_is_no_look_from_outside_and_a_resumed_run_copies_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copies: list[int]
) -> None:
    def run(stop_at: int, steps_before: int = 0) -> LectureDQN:
        monkeypatch.setattr(Stop, "step", stop_at, raising=False)
        model = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=300, learning_starts=50, batch_size=16, seed=0)
        model.learn(steps_before)
        copies.clear()
        return model.learn(250, callback=[ResumableCheckpointCallback(50, tmp_path), Stop()])

    run(210)
    assert sum(copies) == 208  # those up to the last draw
    resumed = run(1_000, steps_before=60)
    buffer = resumed.replay_buffer
    assert buffer is not None
    assert copies[0] >= 200
    assert sum(copies) == resumed.num_timesteps
    resumed._sample_batch(1)
    assert buffer._device_copy._copied is not None
    words = buffer._device_copy._copied.words.cpu().numpy()
    assert np.array_equal(words.view(buffer._records.dtype), buffer._records)
