"""The pictures of ``RoboParking-v0``: what a viewer has to see in them."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pygame
import pytest
from gymnasium.error import ResetNeeded

from sb3_lecture_dqn.envs import RoboParkingEnv, RoboParkingVectorEnv
from sb3_lecture_dqn.envs import robo_parking_rendering as rendering

RIGHT, BACKWARD = 1, 3


@pytest.fixture
def env() -> Iterator[RoboParkingEnv]:
    env = RoboParkingEnv(render_mode="rgb_array")
    yield env
    env.close()


def picture_of(env: RoboParkingEnv) -> np.ndarray:
    picture = env.render()
    assert picture is not None
    return picture


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Which pixels have a colour; scaling rounds it."""
    mask: np.ndarray = np.all(np.abs(picture.astype(int) - colour) <= 4, axis=2)
    return mask


def centre_of(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Mean column and row, in pixels, of what has a colour."""
    rows, columns = np.nonzero(has_colour(picture, colour))
    assert len(rows) > 0
    return np.array([columns.mean(), rows.mean()])


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int(has_colour(picture, colour).sum())


def test_a_picture_is_600_by_600_and_smooth(env: RoboParkingEnv) -> None:
    env.reset(seed=0)
    picture = picture_of(env)
    assert (picture.shape, picture.dtype) == ((600, 600, 3), np.uint8)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # edges have the colours in between


def test_the_robot_is_where_it_is(env: RoboParkingEnv) -> None:
    centres = []
    for x, y in ((1, 1), (3, 1), (1, 3)):
        env.reset(options={"state": (x, y, 0, 0)})
        centres.append(centre_of(picture_of(env), rendering.BODY_COLOUR))
    to_the_right, up = centres[1] - centres[0], centres[2] - centres[0]
    np.testing.assert_allclose(to_the_right, [-up[1], 0], atol=1.5)
    np.testing.assert_allclose(up[0], 0, atol=1.5)
    assert 200 < to_the_right[0] < 300  # 2 m


def test_the_robot_stands_inside_the_kerbs_and_in_the_bay(env: RoboParkingEnv) -> None:
    env.reset(options={"state": (4, 4, 0, 0)})
    kerbs, bay = count(picture_of(env), rendering.KERB_LIGHT), count(picture_of(env), rendering.BAY_FLOOR)
    env.reset(options={"state": (0, 0, 0, 0)})
    picture = picture_of(env)
    assert abs(count(picture, rendering.KERB_LIGHT) - kerbs) < 20
    assert count(picture, rendering.BAY_FLOOR) < 0.7 * bay


@pytest.mark.parametrize("direction", [(1, 0), (-1, 0), (0, 1), (0, -1), (0.6, 0.8)])
def test_the_arrow_points_where_the_robot_goes_and_grows_with_its_speed(
    direction: tuple[float, float], env: RoboParkingEnv
) -> None:
    sizes = []
    for speed in (0.3, 1.0):
        env.reset(options={"state": (2, 2, speed * direction[0], speed * direction[1])})
        picture = picture_of(env)
        for colour in (rendering.ARROW_COLOUR, rendering.HEADLIGHT):
            right, down = centre_of(picture, colour) - centre_of(picture, rendering.BODY_COLOUR)
            distance = np.hypot(right, down)
            assert distance > 5
            np.testing.assert_allclose((right / distance, -down / distance), direction, atol=0.15)
        sizes.append(count(picture, rendering.ARROW_COLOUR))
    assert sizes[1] > 1.3 * sizes[0]
    env.reset(options={"state": (2, 2, 0, 0)})
    assert count(picture_of(env), rendering.ARROW_COLOUR) == 0


@pytest.mark.parametrize("first_velocity", [0.0, -0.3])
def test_the_heading_of_travel_stays_when_the_robot_stops(first_velocity: float, env: RoboParkingEnv) -> None:
    env.reset(options={"state": (3.97, 2, first_velocity, 0)})
    assert (count(picture_of(env), rendering.HEADLIGHT) > 0) == (first_velocity != 0)
    velocities = [float(env.step(RIGHT)[0][2]) for _ in range(5)]
    assert max(velocities) > 0
    assert velocities[-1] == 0
    picture = picture_of(env)
    assert centre_of(picture, rendering.HEADLIGHT)[0] > centre_of(picture, rendering.BODY_COLOUR)[0]


def test_the_trail_grows_with_the_episode_and_ends_with_it(env: RoboParkingEnv) -> None:
    env.reset(options={"state": (1, 2, 1, 0)})
    start = centre_of(picture_of(env), rendering.BODY_COLOUR)[0]
    sizes = []
    for _ in range(3):
        for _ in range(6):
            env.step(RIGHT)
        sizes.append(count(picture_of(env), rendering.TRAIL))
    assert sizes[0] < sizes[1] < sizes[2]
    first_column = np.nonzero(has_colour(picture_of(env), rendering.TRAIL))[1].min()
    assert 5 < start - first_column < 10  # the ring around the start, which is wider than the trail
    env.reset(options={"state": (1, 2, 1, 0)})
    assert count(picture_of(env), rendering.TRAIL) < sizes[0]


def test_the_header_counts_and_says_when_the_robot_is_parked(env: RoboParkingEnv) -> None:
    env.reset(options={"state": (0, 0.1, 0, 0)})
    first = picture_of(env)
    env.step(BACKWARD)
    second = picture_of(env)
    assert not np.array_equal(first[:38], second[:38])
    assert count(second[:38], rendering.PARKED) == 0
    while not env.step(BACKWARD)[2]:
        pass
    assert count(picture_of(env)[:38], rendering.PARKED) > 20


def test_the_header_says_the_step_the_distance_and_the_speed(env: RoboParkingEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    render_text = rendering._render_text
    monkeypatch.setattr(rendering, "_render_text", lambda text, *style: (texts.append(text), render_text(text, *style))[1])
    env.reset(options={"state": (0, 0.005, 0.3, -0.4)})  # on the goal, and not at rest
    picture_of(env)
    assert texts[-3:] == ["step 0", "distance 0.01 m", "speed 0.50 m/s"]
    env.reset(options={"state": (3, 2, 1, 1)})
    env.step(RIGHT)
    picture_of(env)
    assert texts[-3:] == ["step 1", "distance 3.74 m", "speed 1.40 m/s"]


def test_drawing_changes_nothing() -> None:
    drawn, plain = RoboParkingEnv(render_mode="rgb_array"), RoboParkingEnv()
    for env in (drawn, plain):
        env.reset(seed=0)
    for action in (0, 3, 1, 2):
        drawn_step, plain_step = drawn.step(action), plain.step(action)
        np.testing.assert_array_equal(picture_of(drawn), picture_of(drawn))
        np.testing.assert_array_equal(drawn_step[0], plain_step[0])
        assert drawn_step[1:] == plain_step[1:]
    drawn.close()


def test_the_human_mode_shows_each_step_in_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = RoboParkingEnv(render_mode="human")
    env.reset(options={"state": (1, 2, 0, 0)})
    shown = rendering.pygame.surfarray.array3d(rendering.pygame.display.get_surface())
    assert shown.shape == (600, 600, 3)
    env.step(RIGHT)
    assert not np.array_equal(shown, rendering.pygame.surfarray.array3d(rendering.pygame.display.get_surface()))
    assert env.render() is None
    env.close()
    assert rendering.pygame.display.get_surface() is None
    env.close()


def test_each_step_in_a_window_takes_its_time_and_answers_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Clock:
        def tick(self, frames_per_second: int) -> None:
            calls.append(f"wait for {1 / frames_per_second} s")

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(pygame.time, "Clock", Clock)
    monkeypatch.setattr(pygame.event, "pump", lambda: calls.append("answer"))
    monkeypatch.setattr(pygame.display, "flip", lambda: calls.append("show"))
    env = RoboParkingEnv(render_mode="human")
    env.reset(seed=0)
    env.step(RIGHT)
    env.close()
    assert calls == ["answer", "wait for 0.1 s", "show"] * 2


@pytest.mark.parametrize("quit_pygame", [pygame.quit, pygame.display.quit])
def test_a_window_is_opened_again_when_another_environment_has_closed_it(
    quit_pygame: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = RoboParkingEnv(render_mode="human")
    env.reset(seed=0)
    quit_pygame()  # as a second environment does, and Gymnasium's CartPole
    env.step(RIGHT)
    window = pygame.display.get_surface()
    assert window is not None
    assert window.get_size() == (600, 600)
    env.close()


def test_rendering_without_a_mode_warns_and_before_the_reset_is_an_error(env: RoboParkingEnv) -> None:
    for without_mode in (RoboParkingEnv(), RoboParkingVectorEnv(2)):
        without_mode.reset()
        with pytest.warns(UserWarning, match="needs a render mode"):
            assert without_mode.render() is None
    for before_reset in (env, RoboParkingVectorEnv(2, render_mode="rgb_array")):
        with pytest.raises(ResetNeeded, match="render"):
            before_reset.render()


def test_a_vector_environment_draws_each_robot_as_a_scalar_one_would() -> None:
    envs = RoboParkingVectorEnv(2, max_episode_steps=3, autoreset_mode="SameStep", render_mode="rgb_array")
    envs.reset(seed=0)
    scalars = [RoboParkingEnv(render_mode="rgb_array") for _ in range(2)]
    for seed, scalar in enumerate(scalars):
        scalar.reset(seed=seed)
    for step in range(4):
        envs.step(np.array([0, 3]))
        for scalar, action in zip(scalars, (0, 3), strict=True):
            scalar.step(action)
            if step == 2:
                scalar.reset()
        pictures = envs.render()
        assert pictures is not None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for picture, scalar in zip(pictures, scalars, strict=True):
                np.testing.assert_array_equal(picture, picture_of(scalar))
    envs.close()


def test_an_open_environment_goes_on_drawing_when_another_one_quits_pygame(env: RoboParkingEnv) -> None:
    env.reset(seed=0)
    picture = picture_of(env)
    pygame.quit()  # as Gymnasium's CartPole does when it is closed
    np.testing.assert_array_equal(picture_of(env), picture)
