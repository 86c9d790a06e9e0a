"""Stored transitions (s, a, r, s', d) against an environment whose every observation is known (L10)."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from scripted_envs import CountingEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.replay_buffer import FIELDS, ContiguousReplayBuffer

LENGTH = 3


def counting_vec_env(n_envs: int) -> VecEnv:
    """Environment i starts at episode 10 i, so that no two observations are alike."""
    return DummyVecEnv([lambda i=i: CountingEnv(LENGTH, 10 * i) for i in range(n_envs)])  # type: ignore[misc]


def collect(n_envs: int, n_steps_per_env: int, **kwargs: Any) -> LectureDQN:
    model = LectureDQN("MlpPolicy", counting_vec_env(n_envs), learning_starts=10_000, train_freq=1, seed=0, **kwargs)
    return model.learn(n_envs * n_steps_per_env)


def expected_transition(env_index: int, step: int) -> tuple[list[float], list[float], float, float]:
    """s, s', r, d of one environment's given step."""
    episode, k = 10 * env_index + step // LENGTH, step % LENGTH
    return [episode, k], [episode, k + 1], 100.0 * episode + k + 1, float(k + 1 == LENGTH)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_every_stored_transition_is_the_one_that_happened(n_envs: int) -> None:
    model = collect(n_envs, 14)
    buffer = model.replay_buffer
    assert buffer is not None
    assert buffer.pos == 14
    for step in range(14):
        for i in range(n_envs):
            observation, next_observation, reward, done = expected_transition(i, step)
            assert buffer.observations[step, i].tolist() == observation
            assert buffer.next_observations[step, i].tolist() == next_observation
            assert buffer.rewards[step, i] == reward
            assert buffer.dones[step, i] == done


def test_next_observation_of_the_last_transition_is_never_the_next_episodes_first() -> None:
    buffer = collect(2, 12).replay_buffer
    assert buffer is not None
    last = buffer.dones == 1
    assert last.sum() == 8
    np.testing.assert_array_equal(buffer.next_observations[last][:, 1], LENGTH)
    np.testing.assert_array_equal(buffer.next_observations[last][:, 0], buffer.observations[last][:, 0])


def test_n_plus_one_states_make_n_transitions() -> None:
    buffer = collect(1, LENGTH).replay_buffer
    assert buffer is not None
    assert buffer.pos == LENGTH
    states = [tuple(state) for state in [*buffer.observations[:LENGTH, 0], *buffer.next_observations[:LENGTH, 0]]]
    assert len(set(states)) == LENGTH + 1


def sampled_dones(model: LectureDQN) -> dict[float, set[float]]:
    """The d values that sampling gives for the last transition of each episode."""
    batch = model._sample_batch(500)
    dones: dict[float, set[float]] = {}
    for observation, done in zip(batch.observations.tolist(), batch.dones.flatten().tolist(), strict=True):
        if observation[1] == LENGTH - 1:
            dones.setdefault(observation[0], set()).add(done)
    return dones


def test_done_is_terminated_or_truncated_by_default() -> None:
    dones = sampled_dones(collect(1, 12))
    assert dones == {episode: {1.0} for episode in (0.0, 1.0, 2.0, 3.0)}


def test_truncation_is_not_done_when_the_switch_is_on() -> None:
    dones = sampled_dones(collect(1, 12, replay_buffer_kwargs={"handle_timeout_termination": True}))
    assert dones == {0.0: {1.0}, 1.0: {0.0}, 2.0: {1.0}, 3.0: {0.0}}


def test_the_users_replay_buffer_kwargs_are_left_alone() -> None:
    replay_buffer_kwargs: dict[str, Any] = {}
    collect(1, 3, replay_buffer_kwargs=replay_buffer_kwargs)
    assert replay_buffer_kwargs == {}


def test_time_limit_of_gymnasium_is_done_too() -> None:
    env = gymnasium.make("CartPole-v1", max_episode_steps=5)
    model = LectureDQN("MlpPolicy", env, learning_starts=10_000, seed=0).learn(25)
    buffer = model.replay_buffer
    assert buffer is not None
    assert np.flatnonzero(buffer.dones[:25, 0]).tolist() == [4, 9, 14, 19, 24]


def test_memory_optimized_buffer_stores_the_same_transitions() -> None:
    model = collect(1, 14, optimize_memory_usage=True)
    batch = model._sample_batch(200)
    for observation, next_observation, done in zip(batch.observations, batch.next_observations, batch.dones, strict=True):
        if not done:
            assert (next_observation - observation).tolist() == [0.0, 1.0]


def test_actions_are_stored_as_they_were_taken() -> None:
    taken: list[int] = []

    class RecordingEnv(CountingEnv):
        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            taken.append(int(action))
            return super().step(action)

    model = LectureDQN("MlpPolicy", RecordingEnv(LENGTH), learning_starts=20, seed=0).learn(40)
    assert model.replay_buffer is not None
    assert model.replay_buffer.actions[:40, 0, 0].tolist() == taken


class BufferOfAUsersOwn(ContiguousReplayBuffer):
    """For which SB3's own way to store a transition is taken."""


@pytest.mark.parametrize("n_envs", [1, 3])
def test_transitions_are_stored_as_sb3_stores_them(n_envs: int) -> None:
    arrays = []
    for buffer_class in (None, BufferOfAUsersOwn):
        env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=0)
        model = LectureDQN("MlpPolicy", env, replay_buffer_class=buffer_class, learning_starts=1_000, seed=0).learn(300)
        buffer = model.replay_buffer
        assert buffer is not None
        assert buffer.dones.sum() > n_envs
        np.testing.assert_array_equal(model._last_original_obs, buffer.observations[buffer.pos - 1])  # type: ignore[arg-type]
        arrays.append([getattr(buffer, name).copy() for name in FIELDS])
    for ours, theirs in zip(*arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
