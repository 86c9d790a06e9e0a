"""The replay buffer (L11): a ring, sampled uniformly, by the algorithm's own generator."""

import numpy as np
import pytest
from scripted_envs import CountingEnv
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_lecture_dqn import LectureDQN


def collected(buffer_size: int, steps: int, seed: int = 0) -> LectureDQN:
    env = CountingEnv(length=10**9)
    model = LectureDQN("MlpPolicy", env, buffer_size=buffer_size, learning_starts=10**6, train_freq=1, seed=seed)
    return model.learn(steps)


def test_a_full_ring_drops_the_oldest_transition_first() -> None:
    buffer = collected(buffer_size=50, steps=70).replay_buffer
    assert buffer is not None
    assert buffer.size() == 50
    assert sorted(buffer.observations[:, 0, 1].tolist()) == list(range(20, 70))


def test_every_transition_is_drawn_equally_often() -> None:
    model = collected(buffer_size=50, steps=70)
    draws = model._sample_batch(100_000).observations[:, 1].numpy().astype(int)
    counts = np.bincount(draws - 20, minlength=50)
    # χ² with 49 degrees of freedom is above 85.4 once in a thousand times
    chi_square = ((counts - 2_000) ** 2 / 2_000).sum()
    assert chi_square < 85.4


def test_a_ring_that_is_not_full_gives_only_what_was_stored() -> None:
    model = collected(buffer_size=1_000, steps=10)
    draws = model._sample_batch(1_000).observations[:, 1].numpy()
    assert set(draws.tolist()) == set(range(10))


def test_sampling_leaves_numpys_global_generator_alone_and_ignores_it() -> None:
    batches = []
    for global_seed in (1, 2):
        model = collected(buffer_size=50, steps=50)
        np.random.seed(global_seed)
        expected_next = np.random.RandomState(global_seed).random_sample()
        batches.append(model._sample_batch(64).observations.numpy())
        assert np.random.random_sample() == expected_next
    np.testing.assert_array_equal(batches[0], batches[1])


def test_memory_is_allocated_when_it_is_first_needed() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", buffer_size=100_000)
    assert model.__dict__["replay_buffer"] is None
    assert model.replay_buffer is not None
    assert model.replay_buffer.observations.shape == (100_000, 1, 4)


def test_a_buffer_that_was_filled_before_learning_is_kept() -> None:
    model = LectureDQN("MlpPolicy", CountingEnv(), buffer_size=10, learning_starts=100, train_freq=1)
    buffer = model.replay_buffer
    assert buffer is not None
    buffer.add(np.full((1, 2), 7.0), np.full((1, 2), 8.0), np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    model.learn(3)
    assert model.replay_buffer is buffer
    assert buffer.observations[0, 0].tolist() == [7.0, 7.0]
    assert buffer.pos == 4


def test_a_buffer_class_of_the_users_own_may_lack_the_timeout_switch() -> None:
    class PlainBuffer(ReplayBuffer):
        def __init__(self, buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage):  # type: ignore[no-untyped-def]
            super().__init__(
                buffer_size,
                observation_space,
                action_space,
                device,
                n_envs,
                optimize_memory_usage,
                handle_timeout_termination=False,
            )

    model = LectureDQN("MlpPolicy", "CartPole-v1", replay_buffer_class=PlainBuffer, learning_starts=10).learn(40)
    assert isinstance(model.replay_buffer, PlainBuffer)
    assert model._n_updates > 0


def test_wrong_buffer_arguments_are_reported_at_construction() -> None:
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        LectureDQN(
            "MlpPolicy",
            "CartPole-v1",
            optimize_memory_usage=True,
            replay_buffer_kwargs={"handle_timeout_termination": True},
        )
    with pytest.raises(TypeError, match="no_such_argument"):
        LectureDQN("MlpPolicy", "CartPole-v1", replay_buffer_kwargs={"no_such_argument": 1})
