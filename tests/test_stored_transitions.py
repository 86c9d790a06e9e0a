"""What the kernels read of the replay buffer are the transitions that it gives."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast import kernels
from sb3_lecture_dqn.fast.device_copy import DrawnRows
from sb3_lecture_dqn.fast.stored_transitions import StoredTransitions, Transitions
from sb3_lecture_dqn.replay_buffer import ContiguousReplayBuffer

VECTOR = spaces.Box(-1, 1, (3,), np.float32)


def filled(n_steps: int, n_envs: int = 1, space: spaces.Box = VECTOR, **kwargs: Any) -> ContiguousReplayBuffer:
    """A buffer for 20 rows whose numbers are all different; every third transition ends an episode, every second in time."""
    buffer = ContiguousReplayBuffer(20 * n_envs, space, spaces.Discrete(9), "cpu", n_envs, **kwargs)
    rng = np.random.default_rng(0)
    for step in range(n_steps):
        observations = [rng.normal(size=(n_envs, *space.shape)).astype(space.dtype) for _ in range(2)]
        dones = (np.arange(n_envs) + step) % 3 == 0
        infos = [{"TimeLimit.truncated": (i + step) % 2 == 0} for i in range(n_envs)]
        buffer.add(*observations, rng.integers(9, size=n_envs), rng.normal(size=n_envs), dones, infos)
    return buffer


def drawn(buffer: ContiguousReplayBuffer, dtype: Any = np.float32) -> tuple[Transitions, ReplayBufferSamples]:
    """The same draw, read by the kernel and given by the buffer."""
    np.random.seed(1)
    rows = buffer.draw(50, StoredTransitions)
    assert isinstance(rows, DrawnRows)
    assert isinstance(rows.records, StoredTransitions)
    transitions = Transitions.empty(50, rows.records.n_features, dtype)
    kernels.read_transitions(rows.records, rows.indices, transitions)
    np.random.seed(1)
    return transitions, buffer.sample(50)


def assert_alike(transitions: Transitions, samples: ReplayBufferSamples) -> None:
    arrays = transitions._asdict()
    del arrays["discounts"]  # which no record has
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, getattr(samples, name).numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("handle_timeout_termination", [False, True])
@pytest.mark.parametrize(("n_steps", "n_envs"), [(1, 1), (12, 1), (33, 1), (33, 3)])
def test_they_are_read_as_they_are_drawn(n_steps: int, n_envs: int, handle_timeout_termination: bool, dtype: Any) -> None:
    buffer = filled(n_steps, n_envs, handle_timeout_termination=handle_timeout_termination)
    transitions, samples = drawn(buffer, dtype)
    assert_alike(transitions, samples)
    if n_steps > 1:
        assert 0 < samples.dones.mean() < 1


def test_a_change_of_what_a_time_limit_means_counts_at_once() -> None:
    buffer = filled(20)
    before, _ = drawn(buffer)
    buffer.handle_timeout_termination = not buffer.handle_timeout_termination
    after, samples = drawn(buffer)
    assert_alike(after, samples)
    assert (before.dones != after.dones).any()


def test_what_a_user_writes_into_the_arrays_counts_at_once() -> None:
    buffer = filled(20)
    drawn(buffer)
    buffer.rewards = np.full_like(buffer.rewards, 7)
    buffer.observations[:, :, 1] = 8
    transitions, samples = drawn(buffer)
    assert_alike(transitions, samples)
    assert (transitions.rewards == 7).all()
    assert (transitions.observations[:, 1] == 8).all()


def test_a_pickle_reads_its_own_and_holds_them_once() -> None:
    buffer = filled(20)
    before = len(pickle.dumps(buffer))
    drawn(buffer)
    assert len(pickle.dumps(buffer)) == before
    loaded = pickle.loads(pickle.dumps(buffer))
    buffer.rewards[:] = 0
    transitions, samples = drawn(loaded)
    assert_alike(transitions, samples)
    assert transitions.rewards.any()


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (3,), np.float64), spaces.Box(0, 255, (3,), np.uint8), spaces.Box(-1, 1, (2, 3), np.float32)]
)
def test_other_observations_than_vectors_of_float32_are_given_by_the_buffer(space: spaces.Box) -> None:
    buffer = filled(20, space=space)
    np.random.seed(1)
    samples = buffer.draw(50, StoredTransitions)
    assert isinstance(samples, ReplayBufferSamples)
    np.random.seed(1)
    assert th.equal(samples.observations, buffer.sample(50).observations)


def test_actions_of_another_type_are_given_by_the_buffer() -> None:
    record = np.dtype([*((name, np.float32, (3,)) for name in ("observations", "next_observations")), *SMALL_ACTIONS])
    assert StoredTransitions.of(np.zeros(4, record), False) is None


SMALL_ACTIONS = [("actions", np.int32, (1,)), *((name, np.float32) for name in ("rewards", "dones", "timeouts"))]


def test_a_training_is_the_same_as_on_batches_that_the_buffer_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    def parameters() -> list[float]:
        model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, batch_size=16, gradient_steps=3, seed=0)
        model.learn(100)
        return [parameter.sum().item() for parameter in model.policy.parameters()]

    expected = parameters()
    read: list[int] = []
    kernel = kernels.read_transitions
    monkeypatch.setattr(kernels, "read_transitions", lambda *args: (read.append(len(args[1])), kernel(*args))[1])
    assert parameters() == expected
    assert set(read) == {3 * 16}
    read.clear()
    monkeypatch.setattr(ContiguousReplayBuffer, "_records_here", lambda _: None)
    assert parameters() == expected
    assert read == []
