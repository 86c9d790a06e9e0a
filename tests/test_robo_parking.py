"""``RoboParking-v0``: the physics, the environment, and its vector twin."""

import doctest
import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled, ResetNeeded
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env

from sb3_lecture_dqn.envs import RoboParkingEnv, RoboParkingVectorEnv
from sb3_lecture_dqn.envs.robo_parking import GOAL_TOLERANCE, LOT_SIDE, MAX_EPISODE_STEPS, pushes_and_drag, roll
from sb3_lecture_dqn.envs.robo_parking_drivers import drive_along_kerbs, find_optimal_drive

pytestmark = pytest.mark.usefixtures("without_the_zoos_time_limit")

LEFT, RIGHT, FORWARD, BACKWARD = range(4)
NOT_STATES = [(1.0, 1.0), (1.0, 1.0, 0.0, 1.1), (-0.1, 1.0, 0.0, 0.0), (np.nan, 1.0, 0.0, 0.0), "corner", None]
NOT_ACTIONS = [4, -1, 1.0, np.float32(2), np.array([1]), "left", None, np.nan]


def step_from(state: tuple[float, float, float, float], action: int, **arguments: Any) -> tuple[np.ndarray, float, bool]:
    env = RoboParkingEnv(**arguments)
    env.reset(options={"state": state})
    observation, reward, terminated, _, _ = env.step(action)
    return observation, reward, terminated


# Registration and checks


def test_the_spaces_are_the_lectures() -> None:
    env = RoboParkingEnv()
    expected = spaces.Box(np.array([0, 0, -1, -1], np.float32), np.array([4, 4, 1, 1], np.float32), dtype=np.float32)
    assert env.observation_space == expected
    assert env.action_space == spaces.Discrete(4)


def test_every_way_of_making_it_finds_it() -> None:
    assert isinstance(gymnasium.make("RoboParking-v0").unwrapped, RoboParkingEnv)
    assert isinstance(gymnasium.make("sb3_lecture_dqn:RoboParking-v0").unwrapped, RoboParkingEnv)
    assert isinstance(gymnasium.make_vec("RoboParking-v0", num_envs=2), RoboParkingVectorEnv)
    assert isinstance(make_vec_env("RoboParking-v0", n_envs=2).envs[1].unwrapped, RoboParkingEnv)  # type: ignore[attr-defined]


def test_both_env_checkers_pass_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # the checkers also open a window
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gymnasium_check_env(gymnasium.make("RoboParking-v0").unwrapped)
        sb3_check_env(RoboParkingEnv())
    assert [str(warning.message) for warning in caught] == []


def test_it_works_without_pygame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    monkeypatch.delitem(sys.modules, "sb3_lecture_dqn.envs.robo_parking_rendering", raising=False)
    with gymnasium.make("RoboParking-v0") as env:
        env.reset()
        env.step(LEFT)
    envs = gymnasium.make_vec("RoboParking-v0", num_envs=2)
    envs.reset()
    envs.step(np.array([LEFT, LEFT]))
    envs.close()
    drawn = RoboParkingEnv(render_mode="rgb_array")
    drawn.reset()
    with pytest.raises(DependencyNotInstalled, match="pip install"):
        drawn.render()


def test_the_docstrings_examples_give_what_they_show() -> None:
    tests = doctest.DocTestFinder().find(RoboParkingEnv, "RoboParkingEnv", globs={})
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.attempted for result in results) >= 6
    assert sum(result.failed for result in results) == 0


# Physics


@pytest.mark.parametrize(
    ("action", "velocity"), [(LEFT, (-0.18, 0)), (RIGHT, (0.18, 0)), (FORWARD, (0, 0.18)), (BACKWARD, (0, -0.18))]
)
def test_each_action_pushes_along_its_own_axis(action: int, velocity: tuple[float, float]) -> None:
    observation, _, _ = step_from((2, 2, 0, 0), action)
    np.testing.assert_allclose(observation[2:], velocity, atol=1e-7)
    np.testing.assert_allclose(observation[:2], 2 + 0.1 * np.array(velocity), atol=1e-7)


def test_rolling_resistance_brings_the_robot_to_exact_rest_and_never_turns_it_round() -> None:
    for velocity in (0.05, -0.05):
        env = RoboParkingEnv()
        env.reset(options={"state": (2, 2, velocity, 0)})
        velocities = [float(env.step(FORWARD)[0][2]) for _ in range(4)]
        np.testing.assert_allclose(velocities[:2], [0.6 * velocity, 0.2 * velocity], rtol=1e-6)
        assert velocities[2:] == [0, 0]


def test_no_axis_is_faster_than_the_limit() -> None:
    assert step_from((2, 2, 1, 0), RIGHT)[0][2] == 1
    assert step_from((2, 2, 0, -0.99), BACKWARD)[0][3] == -1


def test_a_kerb_takes_the_speed_across_it_and_leaves_the_speed_along_it() -> None:
    observation, _, _ = step_from((0.05, 2, -1, 0.5), LEFT)
    np.testing.assert_allclose(observation, [0, 2.048, 0, 0.48], rtol=1e-6)
    observation, _, _ = step_from((3.95, 4, 1, 0), FORWARD)
    np.testing.assert_allclose(observation, [4, 4, 0, 0])


def test_a_robot_leaves_a_kerb_as_from_anywhere_else() -> None:
    observation, _, _ = step_from((0, 2, 0, 0), RIGHT)
    np.testing.assert_allclose(observation, [0.018, 2, 0.18, 0], rtol=1e-6)


def test_heavier_weaker_or_worse_rolling_robots_are_slower() -> None:
    speed = step_from((2, 2, 0, 0), RIGHT)[0][2]
    for arguments in ({"mass": 20.0}, {"wheel_torque": 0.5}, {"friction": 4.0}):
        assert 0 < step_from((2, 2, 0, 0), RIGHT, **arguments)[0][2] < speed


def test_floats_and_arrays_of_any_shape_move_alike_bit_for_bit() -> None:
    generator = np.random.default_rng(0)
    position, velocity = generator.random((3, 5, 2)) * LOT_SIDE, generator.uniform(-1, 1, (3, 5, 2))
    pushes, drag = pushes_and_drag(10, 1, 2)
    push = np.array(pushes)[generator.integers(4, size=(3, 5))]
    moved = roll(position, velocity, push, drag)
    for index in np.ndindex(position.shape):
        one = roll(float(position[index]), float(velocity[index]), float(push[index]), drag, min, max)
        assert one == (moved[0][index], moved[1][index])


@pytest.mark.parametrize(
    ("arguments", "most_steps"),
    [({}, 90), ({"mass": 40.0, "friction": 15.0}, 400), ({"friction": 0.0}, 100), ({"wheel_torque": 30.0}, 90)],
)
def test_the_goal_is_reachable_from_every_start(arguments: dict[str, float], most_steps: int) -> None:
    generator = np.random.default_rng(0)
    extremes = np.stack(np.meshgrid([0, 4], [0, 4], [-1, 0, 1], [-1, 0, 1]), -1).reshape(-1, 4)
    starts = np.concatenate((extremes, generator.uniform((0, 0, -1, -1), (4, 4, 1, 1), (1000, 4))))
    env = RoboParkingVectorEnv(len(starts), max_episode_steps=10_000, autoreset_mode="SameStep", **arguments)  # type: ignore[arg-type]
    observations, _ = env.reset(options={"state": starts})
    is_parked = np.zeros(len(starts), dtype=bool)
    for _ in range(most_steps):
        actions = np.where(observations[:, 0] > 0, LEFT, BACKWARD)
        observations, _, terminations, _, infos = env.step(actions)
        for final_observation in infos["final_obs"][terminations & ~is_parked] if terminations.any() else ():
            assert np.linalg.norm(final_observation) < 0.01
        is_parked |= terminations
    assert is_parked.all()


# Episodes


def test_the_reward_is_minus_the_norm_of_the_next_state() -> None:
    observation, reward, terminated = step_from((3, 2, -0.5, 0.5), LEFT)
    assert reward == pytest.approx(-np.linalg.norm(observation), rel=1e-6)
    assert not terminated


def test_the_episode_ends_within_a_hundredth_of_the_goal() -> None:
    assert step_from((0, 0.05, 0, -1), BACKWARD)[2]
    assert step_from((0.009, 0, 0, 0), BACKWARD)[2]
    assert not step_from((0.011, 0, 0, 0), BACKWARD)[2]
    assert not step_from((0, 0, 0, 0), RIGHT)[2]


def test_info_has_the_distance_and_at_the_end_whether_it_was_a_success() -> None:
    env = RoboParkingEnv()
    assert env.reset(options={"state": (3, 4, 0, 0)})[1] == {"distance": 5.0}
    env.reset(options={"state": (0, 0.05, 0, -1)})
    assert env.step(BACKWARD)[4] == {"distance": 0.0, "is_success": True}


def test_an_episode_that_runs_out_of_time_is_no_success() -> None:
    env = gymnasium.make("RoboParking-v0")
    env.reset(options={"state": (3, 3, 0, 0)})
    for step in range(1, MAX_EPISODE_STEPS + 1):
        _, _, terminated, truncated, info = env.step(RIGHT)
        assert not terminated
        assert truncated == (step == MAX_EPISODE_STEPS)
    assert info["is_success"] is False


def test_starts_are_uniform_over_the_lot_and_at_rest() -> None:
    env = RoboParkingEnv()
    env.reset(seed=0)
    starts = np.array([env.reset()[0] for _ in range(4000)])
    assert np.all(starts[:, 2:] == 0)
    for axis in (0, 1):
        counts, _ = np.histogram(starts[:, axis], bins=8, range=(0, LOT_SIDE))
        assert np.all(np.abs(counts - 500) < 5 * np.sqrt(500))
    assert abs(np.corrcoef(starts[:, 0], starts[:, 1])[0, 1]) < 0.06


def test_a_seed_decides_everything() -> None:
    def play(seed: int) -> np.ndarray:
        env = gymnasium.make("RoboParking-v0", sensor_noise=0.1)
        observations = [env.reset(seed=seed)[0]]
        observations += [env.step(action)[0] for action in np.random.default_rng(0).integers(4, size=50)]
        observations.append(env.reset()[0])
        return np.array(observations)

    np.testing.assert_array_equal(play(3), play(3))
    assert not np.array_equal(play(3)[0], play(4)[0])


def test_sensor_noise_changes_what_is_seen_and_not_what_happens() -> None:
    exact, noisy = RoboParkingEnv(), RoboParkingEnv(sensor_noise=0.2)
    for env in (exact, noisy):
        env.reset(seed=0, options={"state": (1, 1, 0, 0)})
    errors = []
    for action in np.random.default_rng(0).choice([LEFT, RIGHT, FORWARD, BACKWARD], size=300):
        observation, reward, *_, info = exact.step(action)
        noisy_observation, noisy_reward, *_, noisy_info = noisy.step(action)
        assert (reward, info) == (noisy_reward, noisy_info)
        assert noisy.observation_space.contains(noisy_observation)
        errors.append(noisy_observation[0] - observation[0])
    assert 0.15 < np.std(errors) < 0.25


def test_a_step_after_the_end_warns() -> None:
    env = RoboParkingEnv()
    env.reset(options={"state": (0, 0.05, 0, -1)})
    env.step(BACKWARD)
    with pytest.warns(UserWarning, match="after the episode had ended"):
        env.step(BACKWARD)
    env.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.step(BACKWARD)


# Bad input


@pytest.mark.parametrize("environment", [RoboParkingEnv, RoboParkingVectorEnv])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("mass", value) for value in (0, -1, 1e-309, np.nan, np.inf, "10", None)),
        *(("wheel_torque", value) for value in (0, -1, np.nan, 0.1)),
        *(("friction", value) for value in (-1, np.nan)),
        *(("sensor_noise", value) for value in (-0.1, np.nan, np.inf)),
        ("render_mode", "ansi"),
    ],
)
def test_a_bad_argument_is_named(environment: type, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .*got "):
        environment(**{argument: value})


def test_float32_arguments_make_the_same_robot_in_float64() -> None:
    arguments = {"mass": np.float32(10.3), "wheel_torque": np.float32(1.1), "friction": np.float32(0.7)}
    expected = step_from((2, 2, 0, 0), RIGHT, **{name: float(value) for name, value in arguments.items()})
    np.testing.assert_array_equal(step_from((2, 2, 0, 0), RIGHT, **arguments)[0], expected[0])
    assert step_from((2, 2, 0, 0), RIGHT, **arguments)[1] == expected[1]
    with pytest.raises(ValueError, match=r"^actions must be an array of 40 integers in 0..3, got array\(.*\)$"):
        RoboParkingVectorEnv(40).step(np.full(40, 7.123456))


def test_the_torque_must_overcome_the_friction() -> None:
    with pytest.raises(ValueError, match="wheel_torque must be above friction"):
        RoboParkingEnv(wheel_torque=0.5, friction=10)
    RoboParkingEnv(wheel_torque=0.51, friction=10)


@pytest.mark.parametrize("action", NOT_ACTIONS)
def test_an_action_outside_the_four_is_an_error(action: Any) -> None:
    env = RoboParkingEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be an integer in 0\.\.3, got "):
        env.step(action)


@pytest.mark.parametrize("env", [RoboParkingEnv(render_mode="rgb_array"), gymnasium.make("RoboParking-v0")])
def test_a_step_before_the_reset_is_an_error(env: gymnasium.Env) -> None:
    with pytest.raises(ResetNeeded, match=r"reset"):
        env.step(0)


@pytest.mark.parametrize("state", NOT_STATES)
def test_a_start_outside_the_lot_is_an_error(state: Any) -> None:
    for env in (RoboParkingEnv(), RoboParkingVectorEnv(2)):
        with pytest.raises(ValueError, match=r"^options\['state'\] must .*got "):
            env.reset(options={"state": state})


# The vector environment


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal bit for bit: types, shapes, and the sign of zero too."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif theirs.dtype == object:
        for our_item, their_item in zip(ours, theirs, strict=True):
            assert (our_item is None) == (their_item is None)
            if their_item is not None:
                assert_same(our_item, their_item)
    else:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize(("sensor_noise", "n_steps"), [(0.0, 10_000), (0.05, 1_000)])
def test_the_vector_environment_is_many_scalar_ones_bit_for_bit(
    mode: AutoresetMode, sensor_noise: float, n_steps: int
) -> None:
    num_envs = 2
    ours = gymnasium.make_vec("RoboParking-v0", num_envs=num_envs, autoreset_mode=mode, sensor_noise=sensor_noise)
    theirs = gymnasium.make_vec(
        "RoboParking-v0",
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
        sensor_noise=sensor_noise,
    )
    for our_part, their_part in zip(ours.reset(seed=5), theirs.reset(seed=5), strict=True):
        assert_same(our_part, their_part)
    generator = np.random.default_rng(0)
    n_terminated = n_truncated = 0
    for _ in range(n_steps):
        # Mostly towards the corner, so that episodes end in both ways.
        actions = generator.choice(4, size=num_envs, p=[0.32, 0.18, 0.18, 0.32])
        our_step, their_step = ours.step(actions), theirs.step(actions)
        for our_part, their_part in zip(our_step, their_step, strict=True):
            assert_same(our_part, their_part)
        n_terminated += their_step[2].sum()
        n_truncated += their_step[3].sum()
    assert n_terminated > 0
    assert n_truncated > 0


def test_each_robot_has_the_generator_of_its_own_seed() -> None:
    env = RoboParkingVectorEnv(3)
    observations, _ = env.reset(seed=7)
    for i in range(3):
        np.testing.assert_array_equal(observations[i], RoboParkingEnv().reset(seed=7 + i)[0])
    assert env.np_random_seed == (7, 8, 9)
    np.testing.assert_array_equal(env.reset(seed=[9, None, 7])[0][[0, 2]], observations[[2, 0]])


def test_a_reset_mask_resets_some_and_leaves_the_others() -> None:
    env = RoboParkingVectorEnv(3, sensor_noise=0.1, max_episode_steps=5)
    env.reset(seed=0)
    before = env.step(np.array([0, 1, 2]))[0]
    after, infos = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert not np.array_equal(after[1], before[1])
    np.testing.assert_array_equal(infos["_distance"], [False, True, False])
    truncations = [env.step(np.array([0, 1, 2]))[3].tolist() for _ in range(5)]
    assert truncations[3:] == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize("sensor_noise", [0.0, 0.1])
def test_what_it_returns_is_the_callers_to_keep_and_to_change(sensor_noise: float) -> None:
    calls: list[Callable[[RoboParkingVectorEnv], Any]] = [
        lambda env: env.reset(seed=0),
        lambda env: env.step(np.array([LEFT, BACKWARD])),
        lambda env: env.step(np.array([LEFT, BACKWARD])),
        lambda env: env.reset(options={"reset_mask": np.array([True, False])}),
        lambda env: env.reset(options={"reset_mask": np.array([False, True])}),
    ]
    first, second = (RoboParkingVectorEnv(2, sensor_noise=sensor_noise) for _ in range(2))
    kept = [call(first)[0] for call in calls]
    for call, expected in zip(calls, kept, strict=True):
        observations = call(second)[0]
        np.testing.assert_array_equal(observations, expected)
        observations[:] = 9


@pytest.mark.parametrize(
    "actions", [[0, 4], [-1, 0], np.array([0.0, 1.0]), np.array([0]), np.array([[0, 1]]), None, np.array([np.nan, 0])]
)
def test_the_vector_environment_names_bad_actions(actions: Any) -> None:
    env = RoboParkingVectorEnv(2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must be an array of 2 integers in 0\.\.3, got "):
        env.step(actions if actions is None or isinstance(actions, np.ndarray) else np.array(actions))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_envs", 0), ("num_envs", 1.5), ("max_episode_steps", 0), ("autoreset_mode", "Disabled"), ("autoreset_mode", None)],
)
def test_the_vector_environment_names_its_own_bad_arguments(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .*got "):
        RoboParkingVectorEnv(**{argument: value})


def test_the_vector_environment_names_bad_resets() -> None:
    env = RoboParkingVectorEnv(2)
    with pytest.raises(ResetNeeded):
        env.step(np.array([0, 0]))
    with pytest.raises(ResetNeeded, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False])})
    for mask in ([True], [False, False], [1, 0]):
        with pytest.raises(ValueError, match=r"options\['reset_mask'\] must be"):
            env.reset(options={"reset_mask": np.array(mask)})
    with pytest.raises(ValueError, match="seed must be an integer or 2 of them, got 3"):
        env.reset(seed=[1, 2, 3])


def test_gymnasiums_vectorizer_makes_the_same_spaces() -> None:
    ours = gymnasium.make_vec("RoboParking-v0", num_envs=2)
    theirs = SyncVectorEnv([RoboParkingEnv, RoboParkingEnv])
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP


# Drivers that are not learned


@pytest.mark.parametrize("arguments", [{}, {"mass": 20.0, "wheel_torque": 3.0, "friction": 1.0}])
def test_the_optimal_drive_has_the_return_that_the_environment_gives_it(arguments: dict[str, float]) -> None:
    state = (2.3, 1.4, 0.3, -0.2)
    drive = find_optimal_drive(state, width=50, **arguments)  # type: ignore[arg-type]
    env = RoboParkingEnv(**arguments)  # type: ignore[arg-type]
    env.reset(options={"state": state})
    steps = [env.step(action) for action in drive.actions]
    assert [terminated for _, _, terminated, _, _ in steps] == [False] * (len(steps) - 1) + [True]
    assert sum(reward for _, reward, *_ in steps) == pytest.approx(drive.episode_return)


@pytest.mark.parametrize("state", [(0.3, 0.2, 0.0, 0.0), (0.05, 0.4, 0.3, 0.0)])
def test_a_narrow_search_finds_what_an_exhaustive_one_finds(state: tuple[float, ...]) -> None:
    narrow = find_optimal_drive(state, width=30)
    exhaustive = find_optimal_drive(state, width=10**9)
    assert narrow.episode_return == pytest.approx(exhaustive.episode_return)


@pytest.mark.parametrize(
    ("state", "robot"),
    [
        ((0.09, 0.05, 0.13, -0.25), (10.0, 1.0, 2.0)),
        ((0.11, 0.04, -0.28, 0.35), (10.0, 1.0, 2.0)),
        ((0.046, 0.03, -0.276, -0.051), (54.0, 0.5, 1.0)),
    ],
)
def test_no_drive_of_seven_steps_is_better_than_what_an_exhaustive_search_finds(
    state: tuple[float, ...], robot: tuple[float, float, float]
) -> None:
    pushes, drag = pushes_and_drag(*robot)
    actions = np.array(list(itertools.product(range(4), repeat=7)))
    position, velocity = np.tile(state[:2], (len(actions), 1)), np.tile(state[2:], (len(actions), 1))
    returns, is_parked = np.zeros(len(actions)), np.zeros(len(actions), dtype=bool)
    for action in actions.T:
        position, velocity = roll(position, velocity, np.array(pushes)[action], drag)
        norms = np.linalg.norm(np.concatenate((position, velocity), axis=1), axis=1)
        returns -= norms * ~is_parked
        is_parked |= norms < GOAL_TOLERANCE
    assert find_optimal_drive(state, 10**9, *robot).episode_return == pytest.approx(returns[is_parked].max())


def test_the_optimal_drive_may_push_away_from_the_corner_to_arrive_in_time() -> None:
    drive = find_optimal_drive((1.0, 1.0, 0.0, 0.0))
    assert {RIGHT, FORWARD} & set(drive.actions)
    assert drive.episode_return > -20.6


def test_a_search_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^width must be an integer of at least 1, got 0$"):
        find_optimal_drive((1.0, 1.0, 0.0, 0.0), width=0)


def test_the_scripted_driver_goes_left_as_far_as_it_can_and_then_to_the_corner() -> None:
    observations = np.array([[[3, 2, 0, 0], [0.005, 2, 0, 0]], [[0, 2, -1, 0], [0, 0.005, 0, -1]]], dtype=np.float32)
    assert drive_along_kerbs(observations).tolist() == [[LEFT, LEFT], [BACKWARD, BACKWARD]]
    assert drive_along_kerbs(observations[0, 0]) == LEFT


def test_the_optimal_driver_is_better_than_the_scripted_one() -> None:
    state = (2.0, 3.0, 0.0, 0.0)
    env = RoboParkingEnv()
    observation, _ = env.reset(options={"state": state})
    scripted_return, terminated = 0.0, False
    while not terminated:
        observation, reward, terminated, _, _ = env.step(drive_along_kerbs(observation))
        scripted_return += reward
    assert scripted_return < find_optimal_drive(state, width=50).episode_return < 0
