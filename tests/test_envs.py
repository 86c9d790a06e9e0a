"""``LunarLander-v2`` as the slides make it (L3), on today's Gymnasium."""

import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import sb3_lecture_dqn  # importing the package registers the environments


@pytest.fixture
def lander() -> Iterator[gymnasium.Env[np.ndarray, int]]:
    env = gymnasium.make("LunarLander-v2")
    yield env
    env.close()


def test_the_slides_calls_run_as_printed(lander: gymnasium.Env[np.ndarray, int]) -> None:
    state, _ = lander.reset(seed=0)
    next_state, reward, terminated, truncated, _ = lander.step(lander.action_space.sample())
    assert state.shape == next_state.shape == (8,)
    assert isinstance(float(reward), float)
    assert not terminated
    assert not truncated


def test_observation_bounds_are_those_of_version_2(lander: gymnasium.Env[np.ndarray, int]) -> None:
    bound = np.array([1.5, 1.5, 5, 5, math.pi, 5], dtype=np.float32)
    space = lander.observation_space
    assert space == gymnasium.spaces.Box(
        np.append(-bound, [0, 0]).astype(np.float32), np.append(bound, [1, 1]).astype(np.float32)
    )


def test_physics_and_determinism_are_those_of_version_3(lander: gymnasium.Env[np.ndarray, int]) -> None:
    v3 = gymnasium.make("LunarLander-v3")
    rng = np.random.default_rng(0)
    for seed in (1, 2):
        observations = [env.reset(seed=seed)[0] for env in (lander, v3)]
        np.testing.assert_array_equal(*observations)
        for _ in range(60):
            action = int(rng.integers(4))
            steps = [env.step(action)[:4] for env in (lander, v3)]
            np.testing.assert_array_equal(steps[0][0], steps[1][0])
            assert steps[0][1:] == steps[1][1:]
            if steps[0][2]:
                break


def test_the_continuous_lander_is_back_too() -> None:
    env = gymnasium.make("LunarLanderContinuous-v2")
    assert isinstance(env.action_space, gymnasium.spaces.Box)
    assert env.observation_space.high[0] == 1.5  # type: ignore[attr-defined]
    env.close()


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("env_id", ["LunarLander-v2", "LunarLanderContinuous-v2"])
def test_a_copy_of_a_lander_is_one_with_the_same_arguments(env_id: str, copy_of: Any) -> None:
    env = gymnasium.make(env_id, gravity=-5.0)
    copied = copy_of(env.unwrapped)
    assert type(copied) is sb3_lecture_dqn.envs.LunarLanderV2
    assert (copied.gravity, copied.continuous) == (-5.0, "Continuous" in env_id)
    np.testing.assert_array_equal(copied.reset(seed=0)[0], env.reset(seed=0)[0])


def test_the_lander_passes_gymnasiums_checker(lander: gymnasium.Env[np.ndarray, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the version, and about velocities that leave the bounds, as in version 2
        check_env(lander.unwrapped, skip_render_check=True)
    assert lander.spec is not None
    assert (lander.spec.max_episode_steps, lander.spec.reward_threshold) == (1000, 200)


@pytest.mark.parametrize("env_id", ["LunarLander-v2", "LunarLanderContinuous-v2", "RoboParking-v0", "MinAtar/Breakout-v1"])
def test_an_existing_registration_is_kept(env_id: str) -> None:
    spec = gymnasium.spec(env_id)
    sb3_lecture_dqn.register_envs()
    assert gymnasium.spec(env_id) is spec
