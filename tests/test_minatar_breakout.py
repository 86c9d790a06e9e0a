"""MinAtar's Breakout as an environment of pixels."""

import gymnasium
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.env_checker import check_env

from sb3_lecture_dqn.envs import minatar_breakout


def test_breakout_is_registered_with_its_three_actions() -> None:
    env = gymnasium.make("MinAtar/Breakout-v1")
    assert env.action_space == gymnasium.spaces.Discrete(3)
    assert env.observation_space == gymnasium.spaces.Box(0, 1, (10, 10, 4), bool)  # type: ignore[arg-type]
    assert env.spec is not None
    assert env.spec.max_episode_steps == 5000


def test_the_pixels_are_minatars_planes() -> None:
    env = minatar_breakout.Pixels(gymnasium.make(minatar_breakout.ENV_ID))
    image, _ = env.reset(seed=3)
    is_over, n_images = False, 0
    while not is_over:
        planes = env.unwrapped.game.state()  # type: ignore[attr-defined]
        assert env.observation_space.contains(image)
        assert np.array_equal(image / 255, planes.transpose(2, 0, 1))
        image, _, terminated, truncated, _ = env.step(n_images % 3)
        is_over, n_images = terminated or truncated, n_images + 1
    assert n_images > 5


def test_a_seed_decides_an_episode_whatever_was_played_before() -> None:
    def play(env: gymnasium.Env[np.ndarray, int], seed: int) -> list[bytes]:
        observations, is_over = [env.reset(seed=seed)[0].tobytes()], False
        while not is_over:
            observation, _, is_over, _, _ = env.step(len(observations) % 3)
            observations.append(observation.tobytes())
        return observations

    played = gymnasium.make(minatar_breakout.ENV_ID)
    for seed in range(10):
        assert play(played, seed) == play(gymnasium.make(minatar_breakout.ENV_ID), seed)


def test_the_episodes_after_a_seeds_are_minatars() -> None:
    minatar_gym = pytest.importorskip("minatar.gym")
    ours, theirs = gymnasium.make(minatar_breakout.ENV_ID), minatar_gym.BaseEnv("breakout", use_minimal_action_set=True)
    seed: int | None = 0
    for episode in range(10):
        our_observation, their_observation = ours.reset(seed=seed)[0], theirs.reset(seed)[0]
        is_over, seed, step = False, None, 0
        while not is_over:
            np.testing.assert_array_equal(our_observation, their_observation)
            action, step = (1, 2)[(episode + step) % 2], step + 1
            (our_observation, *ours_of_step, _), (their_observation, *theirs_of_step, _) = (
                ours.step(action),
                theirs.step(action),
            )
            assert ours_of_step == theirs_of_step
            is_over = ours_of_step[1]


def test_breakout_passes_gymnasiums_checker_and_its_pictures_show_something() -> None:
    env = gymnasium.make(minatar_breakout.ENV_ID, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    picture = env.render()
    assert isinstance(picture, np.ndarray)
    assert (picture.shape, picture.dtype) == ((10, 10, 3), np.uint8)
    assert picture.max() > 200
    assert env.metadata["render_fps"] == 20  # which a film asks for


@pytest.mark.usefixtures("without_minatar")
def test_a_missing_minatar_is_said_with_what_to_do() -> None:
    with pytest.raises(DependencyNotInstalled, match=r"^MinAtar/Breakout-v1 needs MinAtar: pip install MinAtar$"):
        gymnasium.make(minatar_breakout.ENV_ID)
