"""``RoboParking-v0``, the environment that the lecture writes as its example (L4): one robot, and many at once."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from sb3_lecture_dqn.validation import check_above_zero, check_at_least, check_int_at_least, in_one_line

if TYPE_CHECKING:
    from sb3_lecture_dqn.envs.robo_parking_rendering import LotRenderer

LOT_SIDE = 4.0  # m
SPEED_LIMIT = 1.0  # m/s along each axis
WHEEL_RADIUS = 0.05  # m
TIME_STEP = 0.1  # s
GOAL_TOLERANCE = 0.01  # of ‖s‖, in metres and metres per second
MAX_EPISODE_STEPS = 200
N_ACTIONS = 4  # left, right, forward, backward

STATE_LOW = (0.0, 0.0, -SPEED_LIMIT, -SPEED_LIMIT)
STATE_HIGH = (LOT_SIDE, LOT_SIDE, SPEED_LIMIT, SPEED_LIMIT)

FloatOrArray = TypeVar("FloatOrArray", float, NDArray[np.float64])

# --- The dynamics ---------------------------------------------------------------------------------------------------------


def roll(
    position: FloatOrArray,
    velocity: FloatOrArray,
    push: FloatOrArray,
    drag: float,
    minimum: Callable[..., Any] = np.minimum,
    maximum: Callable[..., Any] = np.maximum,
) -> tuple[FloatOrArray, FloatOrArray]:
    """
    One time step along an axis: T of the lecture (L4), for any number of robots and axes at once.

    The axes do not act on each other, so a state of any leading shape is one call. A single robot is a call for each axis with
    Python's floats and Python's ``min`` and ``max``: the same operations in the same order, so the same numbers bit for bit,
    without numpy's cost for tiny arrays.

    :param position: Positions in m, in [0, 4], any shape
    :param velocity: Velocities in m/s, in [-1, 1], of the same shape
    :param push: What the wheels add to the velocity in this step, in m/s, of the same shape
    :param drag: The most that rolling resistance takes off the speed in a step, in m/s, at least 0
    :param minimum: The smaller one of two, elementwise
    :param maximum: The larger one of two, elementwise
    :return: Positions and velocities after the step
    """
    velocity = velocity + push
    velocity = velocity - minimum(maximum(velocity, -drag), drag)  # resistance stops the robot, and never turns it round
    velocity = minimum(maximum(velocity, -SPEED_LIMIT), SPEED_LIMIT)
    position = position + velocity * TIME_STEP  # semi-implicit Euler: the new velocity moves the robot
    is_free = (position > 0.0) & (position < LOT_SIDE)
    position = minimum(maximum(position, 0.0), LOT_SIDE)
    return position, velocity * is_free + 0.0  # a kerb takes all the speed; + 0.0 turns -0.0 into 0.0


def squared_length(a: FloatOrArray, b: FloatOrArray) -> FloatOrArray:
    """
    The squared length of the vector (a, b).

    :param a: First components, any shape
    :param b: Second components, of the same shape
    :return: a² + b²
    """
    return a * a + b * b


def pushes_and_drag(mass: float, wheel_torque: float, friction: float) -> tuple[tuple[tuple[float, float], ...], float]:
    """
    What the forces of one time step do to the velocity.

    :param mass: Mass of the robot in kg, above 0
    :param wheel_torque: Torque on the wheels of the driven axis in N·m; its force must be above ``friction``
    :param friction: Rolling resistance of the wheels of an axis in N, at least 0
    :return: The push of each action along x and y in m/s, and the drag in m/s, as :func:`roll` takes them
    :raises ValueError: if a value is out of its range
    """
    check_above_zero("mass", mass)
    check_above_zero("wheel_torque", wheel_torque)
    check_at_least("friction", friction, 0)
    mass, wheel_torque, friction = float(mass), float(wheel_torque), float(friction)  # the state is in float64
    force = wheel_torque / WHEEL_RADIUS
    if force <= friction:
        raise ValueError(
            f"wheel_torque must be above friction * {WHEEL_RADIUS} = {friction * WHEEL_RADIUS:g} for the robot to move, "
            f"got {wheel_torque!r}"
        )
    push, drag = force / mass * TIME_STEP, friction / mass * TIME_STEP
    if not math.isfinite(push):
        raise ValueError(f"mass must be large enough for the acceleration to be finite, got {mass!r}")
    return ((-push, 0.0), (push, 0.0), (0.0, push), (0.0, -push)), drag


def check_states(states: Any, shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """
    Check what a user gives as ``options["state"]``.

    :param states: (x, y, ẋ, ẏ), for one or more robots
    :param shapes: The shapes that it may have
    :return: The same as float64, with 0.0 in place of -0.0
    :raises ValueError: if its shape is another one, or a value is outside the observation space or NaN
    """
    try:
        array = np.asarray(states, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"options['state'] must be numbers of shape {allowed}, got {in_one_line(repr(states))}")
    if not np.all((array >= STATE_LOW) & (array <= STATE_HIGH)):  # also refuses NaN
        raise ValueError(f"options['state'] must lie between {STATE_LOW} and {STATE_HIGH}, got {in_one_line(repr(states))}")
    return array + 0.0


def draw_starts(generators: Iterable[np.random.Generator]) -> np.ndarray:
    """
    Draw where episodes start; the robots are at rest there.

    :param generators: The generator of each robot
    :return: (x, y) of each robot in m, uniform over the lot, shape (number of generators, 2)
    """
    return np.array([generator.random(2) for generator in generators]) * LOT_SIDE


# --- One robot ------------------------------------------------------------------------------------------------------------


class RoboParkingEnv(gymnasium.Env[np.ndarray, int | np.integer[Any]]):
    """
    ## Description

    A robot on a square lot of 4 m × 4 m is to park: to stand still in the corner (0, 0). It is the lecture's example of an
    environment of one's own (L4). Wheels that roll along x and wheels that roll along y drive it, so that it moves in any
    direction without turning. An action pushes along one axis with a fixed torque. There is no brake: what stops the robot is
    rolling resistance, a push the other way, or a kerb.

    ## Action Space

    A `Discrete(4)`:

    | Num | Action   | Force along |
    |-----|----------|-------------|
    | 0   | left     | −x          |
    | 1   | right    | +x          |
    | 2   | forward  | +y          |
    | 3   | backward | −y          |

    ## Observation Space

    A `Box` of shape `(4,)` and type `float32`:

    | Num | Observation    | Min    | Max   |
    |-----|----------------|--------|-------|
    | 0   | x              | 0 m    | 4 m   |
    | 1   | y              | 0 m    | 4 m   |
    | 2   | velocity ẋ     | −1 m/s | 1 m/s |
    | 3   | velocity ẏ     | −1 m/s | 1 m/s |

    The state itself is in float64; reward and end are computed from it. `sensor_noise` is added to the observation only, which
    is then clipped into the box.

    ## Dynamics

    The robot (mass m = 10 kg) is pushed by F = torque / radius = 1 N·m / 0.05 m = 20 N along the axis of the action. The
    wheels of each axis have a rolling resistance of 2 N against their motion. A time step is Δt = 0.1 s. Along each axis:

    1. the push: ẋ ← ẋ ± F/m Δt, which is 0.2 m/s, on the axis of the action;
    2. rolling resistance: |ẋ| falls by 2 N/m Δt = 0.02 m/s, and at most to 0;
    3. the speed limit: |ẋ| ≤ 1 m/s;
    4. the motion: x ← x + ẋ Δt (semi-implicit Euler);
    5. the kerbs, at 0 and 4 m: a robot that reaches one stops there, x at the kerb and ẋ = 0 (a perfectly inelastic stop).

    **The goal is reachable from every start.** With any arguments that the constructor accepts, F is above the resistance.
    Choose left all the time: each step takes (F − resistance)/m Δt > 0 off ẋ until ẋ = −1, so that the robot reaches the kerb
    x = 0, where ẋ = 0. Then choose backward all the time: x and ẋ stay 0, and the robot reaches y = 0 in the same way. That
    state is (0, 0, 0, 0) exactly, and so is its float32 observation; and to see when the first phase is over, the sensors only
    have to tell x = 0 from x > 0, which float32 does.

    By default ẋ goes from 0 to −1 m/s in 6 steps (0.18 m/s each) over 0.37 m, and the other 3.63 m take 37 steps of 0.1 m: 43
    steps for an axis from rest, 86 from the far corner. No start takes this driver more than 90 steps, and an optimal one
    takes 46 from the far corner; the limit is 200.

    Without the kerbs the goal would hardly be reachable: each push leaves a speed that only resistance or another push takes
    away, and the robot would have to come to rest within 1 cm of the corner.

    ## Rewards

    −‖s′‖, the norm of (x, y, ẋ, ẏ) after the step. (The slide returns +‖s‖, which would reward driving away.)

    ## Starting State

    (x, y) is uniform over the lot, and the robot is at rest. `reset(options={"state": (x, y, ẋ, ẏ)})` starts where it says.

    ## Episode End

    1. Termination: ‖s′‖ < 0.01.
    2. Truncation (when made by `gymnasium.make`): 200 steps.

    ## Information

    `distance`: the distance to the corner in m. `is_success`: whether ‖s′‖ < 0.01, after each step (the environment cannot see
    the time limit that is wrapped around it); SB3 and rl_zoo3 read it at the end of an episode and log the success rate.

    ## Arguments

    ```python
    >>> import gymnasium
    >>> import sb3_lecture_dqn
    >>> env = gymnasium.make("RoboParking-v0", mass=12.0, sensor_noise=0.01)
    >>> env
    <TimeLimit<OrderEnforcing<PassiveEnvChecker<RoboParkingEnv<RoboParking-v0>>>>>
    >>> observation, info = env.reset(seed=0, options={"state": (3.0, 2.0, 0.0, 0.0)})

    ```

    | Parameter      | Type             | Default | Description                                                              |
    |----------------|------------------|---------|--------------------------------------------------------------------------|
    | `mass`         | **float**        | `10.0`  | mass of the robot in kg, above 0                                         |
    | `wheel_torque` | **float**        | `1.0`   | torque on the wheels of the driven axis in N·m, above `friction` * 0.05  |
    | `friction`     | **float**        | `2.0`   | rolling resistance of the wheels of each axis in N, at least 0           |
    | `sensor_noise` | **float**        | `0.0`   | standard deviation of each observed value, in m and m/s, at least 0      |
    | `render_mode`  | **str** or None  | `None`  | `"human"` or `"rgb_array"`                                               |

    ## Vectorized environment

    ```python
    >>> envs = gymnasium.make_vec("RoboParking-v0", num_envs=3)
    >>> envs
    RoboParkingVectorEnv(RoboParking-v0, num_envs=3)

    ```

    ## Version History

    * v0: Initial version.
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": round(1 / TIME_STEP)}  # noqa: RUF012

    def __init__(
        self,
        mass: float = 10.0,
        wheel_torque: float = 1.0,
        friction: float = 2.0,
        sensor_noise: float = 0.0,
        render_mode: str | None = None,
    ) -> None:
        self._pushes, self._drag = pushes_and_drag(mass, wheel_torque, friction)
        check_at_least("sensor_noise", sensor_noise, 0)
        _check_render_mode(render_mode, self.metadata["render_modes"])
        self.mass, self.wheel_torque, self.friction, self.sensor_noise = mass, wheel_torque, friction, sensor_noise
        self.render_mode = render_mode
        self.observation_space = _make_observation_space()
        self.action_space = spaces.Discrete(N_ACTIONS)
        self._state: tuple[float, float, float, float] | None = None
        self._is_terminated = False
        self._trail: list[tuple[float, ...]] = []
        self._renderer: LotRenderer | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Start an episode.

        :param seed: Seed of the environment's generator; ``None`` goes on with it
        :param options: ``{"state": (x, y, ẋ, ẏ)}`` to start from that state instead of a random one
        :return: The observation, and the info with the distance
        :raises ValueError: if the state is outside the observation space or has another shape
        """
        super().reset(seed=seed)
        if options is not None and "state" in options:
            x, y, x_velocity, y_velocity = check_states(options["state"], [(4,)]).tolist()
        else:
            x, y = draw_starts([self.np_random])[0].tolist()
            x_velocity = y_velocity = 0.0
        self._state = x, y, x_velocity, y_velocity
        self._is_terminated = False
        self._trail = [self._state]
        if self.render_mode == "human":
            self.render()
        return self._observe(), {"distance": math.sqrt(squared_length(x, y))}

    def step(self, action: int | np.integer[Any]) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Push for one time step.

        :param action: 0 left, 1 right, 2 forward, 3 backward
        :return: The observation, the reward, whether the robot is parked, ``False``, and the info
        :raises ValueError: if the action is not an integer in 0..3
        :raises gymnasium.error.ResetNeeded: before the first :meth:`reset`
        """
        if not self.action_space.contains(action):
            raise ValueError(f"action must be an integer in 0..3, got {action!r}")
        if self._state is None:
            raise ResetNeeded("step() needs a state: call reset() first")
        if self._is_terminated:
            gymnasium.logger.warn(
                "step() was called after the episode had ended with terminated = True; call reset() before any further step"
            )
        x, y, x_velocity, y_velocity = self._state
        x_push, y_push = self._pushes[action]
        x, x_velocity = roll(x, x_velocity, x_push, self._drag, min, max)
        y, y_velocity = roll(y, y_velocity, y_push, self._drag, min, max)
        self._state = x, y, x_velocity, y_velocity

        squared_distance = squared_length(x, y)
        norm = math.sqrt(squared_distance + squared_length(x_velocity, y_velocity))
        self._is_terminated = norm < GOAL_TOLERANCE
        if self.render_mode is not None:
            self._trail.append(self._state)
            if self.render_mode == "human":
                self.render()
        info = {"distance": math.sqrt(squared_distance), "is_success": self._is_terminated}
        return self._observe(), 0.0 - norm, self._is_terminated, False, info

    def _observe(self) -> np.ndarray:
        if self.sensor_noise == 0:
            return np.array(self._state, dtype=np.float32)
        noise = self.np_random.standard_normal(4) * self.sensor_noise
        return np.clip(np.array(self._state) + noise, STATE_LOW, STATE_HIGH).astype(np.float32)

    def render(self) -> np.ndarray | None:
        """
        Draw the lot.

        :return: An image of shape (600, 600, 3) in the mode ``"rgb_array"``; ``None`` in the mode ``"human"``, which shows it,
            and with a warning without a mode
        :raises gymnasium.error.ResetNeeded: before the first :meth:`reset`
        """
        if self.render_mode is None:
            gymnasium.logger.warn('render() needs a render mode: make the environment with render_mode="rgb_array" or "human"')
            return None
        if self._state is None:
            raise ResetNeeded("render() needs a state: call reset() first")
        if self._renderer is None:
            self._renderer = _make_renderer(self.metadata["render_fps"])
        if self.render_mode == "human":
            self._renderer.show(self._trail)
            return None
        return self._renderer.draw(self._trail)

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


# --- Many robots ----------------------------------------------------------------------------------------------------------


class RoboParkingVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """
    ``num_envs`` robots, each on a lot of its own: :class:`RoboParkingEnv` with the time limit inside, many at once.

    Robot i gives bit for bit what a :class:`RoboParkingEnv` gives that is seeded with ``seed + i``, and infos are in the form
    of Gymnasium's ``SyncVectorEnv``. Sensor noise costs a draw from each robot's own generator, and so most of the speed.

    :param num_envs: Number of robots, at least 1
    :param max_episode_steps: Number of steps after which an episode is truncated, at least 1
    :param autoreset_mode: ``"NextStep"``: the step after the end resets, whatever the action. ``"SameStep"``: the step that
        ends an episode also resets, and ``infos`` has ``final_obs`` and ``final_info``
    :param mass: Mass of a robot in kg, above 0
    :param wheel_torque: Torque on the wheels of the driven axis in N·m, above ``friction`` * 0.05
    :param friction: Rolling resistance of the wheels of each axis in N, at least 0
    :param sensor_noise: Standard deviation of each observed value, in m and m/s, at least 0
    :param render_mode: ``"rgb_array"`` or ``None``
    :raises ValueError: if a value is out of its range
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": round(1 / TIME_STEP),
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        mass: float = 10.0,
        wheel_torque: float = 1.0,
        friction: float = 2.0,
        sensor_noise: float = 0.0,
        render_mode: str | None = None,
    ) -> None:
        check_int_at_least("num_envs", num_envs, 1)
        check_int_at_least("max_episode_steps", max_episode_steps, 1)
        check_at_least("sensor_noise", sensor_noise, 0)
        _check_render_mode(render_mode, self.metadata["render_modes"])
        if autoreset_mode not in ("NextStep", "SameStep", AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise ValueError(f"autoreset_mode must be 'NextStep' or 'SameStep', got {autoreset_mode!r}")
        pushes, self._drag = pushes_and_drag(mass, wheel_torque, friction)
        self._pushes = np.array(pushes).T  # (2, N_ACTIONS): along x and along y
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.mass, self.wheel_torque, self.friction, self.sensor_noise = mass, wheel_torque, friction, sensor_noise
        self.render_mode = render_mode
        self.single_observation_space = _make_observation_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = spaces.Discrete(N_ACTIONS)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._generators: dict[int, np.random.Generator] = {}
        self._seeds: dict[int, int] = {}
        self._is_reset = False
        # Rows x, y, ẋ, ẏ: each is contiguous, for the speed of the dynamics.
        self._states: np.ndarray = np.zeros((4, num_envs))
        self._observations = np.zeros((4, num_envs), dtype=np.float32)
        self._n_steps = np.zeros(num_envs, dtype=np.int64)
        self._is_done = np.zeros(num_envs, dtype=np.bool_)
        self._trails: list[list[tuple[float, ...]]] = [[] for _ in range(num_envs)]
        self._renderer: LotRenderer | None = None

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """
        The generator of each robot, as Gymnasium's ``SyncVectorEnv`` gives them.

        :return: ``num_envs`` generators
        """
        self._seed([None] * self.num_envs, range(self.num_envs))
        return tuple(self._generators[i] for i in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """
        The seed of each robot's generator.

        :return: ``num_envs`` seeds
        """
        self._seed([None] * self.num_envs, range(self.num_envs))
        return tuple(self._seeds[i] for i in range(self.num_envs))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Start an episode of each robot, or of those in a mask.

        :param seed: Robot i gets ``seed + i``; or a seed for each robot; ``None`` goes on with their generators
        :param options: ``"state"``: states to start from, shape (4,) for all or (num_envs, 4). ``"reset_mask"``: whether to
            reset each robot, bools of shape (num_envs,), not all ``False``; the others stay as they are
        :return: The observations, shape (num_envs, 4), and the infos of those that were reset
        :raises ValueError: if the seeds, the states or the mask are not as described
        :raises gymnasium.error.ResetNeeded: with a mask that leaves robots out, before the first reset of all
        """
        options = options or {}
        reset_mask = self._check_reset_mask(options.get("reset_mask"))
        indices = np.flatnonzero(reset_mask)
        states = None
        if "state" in options:
            states = check_states(options["state"], [(4,), (self.num_envs, 4)])
            states = np.broadcast_to(states, (self.num_envs, 4))[indices]
        self._seed(self._seed_of_each(seed), indices.tolist())
        self._start(indices, states)
        self._observe(indices)
        self._is_done[indices] = False
        self._is_reset = True
        return self._observations.copy().T, self._info("distance", self._measure()[0], reset_mask)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """
        Push each robot for one time step.

        :param actions: 0 left, 1 right, 2 forward, 3 backward; integers of shape (num_envs,)
        :return: Observations of shape (num_envs, 4), rewards, terminations, truncations, and infos
        :raises ValueError: if the actions are not integers in 0..3 of that shape
        :raises gymnasium.error.ResetNeeded: before the first :meth:`reset`
        """
        if not self._are_actions(actions):
            raise ValueError(f"actions must be an array of {self.num_envs} integers in 0..3, got {in_one_line(repr(actions))}")
        if not self._is_reset:
            raise ResetNeeded("step() needs a state: call reset() first")
        position, velocity = roll(self._states[:2], self._states[2:], self._pushes.take(actions, axis=1), self._drag)
        self._states = np.concatenate((position, velocity))
        self._n_steps += 1
        if self.render_mode is not None:
            for trail, state in zip(self._trails, self._states.T.tolist(), strict=True):
                trail.append(tuple(state))

        distances, norms = self._measure()
        rewards = 0.0 - norms
        terminations = norms < GOAL_TOLERANCE
        truncations = self._n_steps >= self.max_episode_steps
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            infos = self._end_on_next_step(distances, rewards, terminations, truncations)
        else:
            infos = self._end_on_same_step(distances, terminations, truncations)
        return self._observations.copy().T, rewards, terminations, truncations, infos

    def _are_actions(self, actions: Any) -> bool:
        """What ``action_space.contains`` says of an array, in a third of its time."""
        is_batch = isinstance(actions, np.ndarray) and actions.dtype.kind in "iu" and actions.shape == (self.num_envs,)
        return bool(is_batch and actions.min() >= 0 and actions.max() < N_ACTIONS)

    def _end_on_next_step(
        self, distances: np.ndarray, rewards: np.ndarray, terminations: np.ndarray, truncations: np.ndarray
    ) -> dict[str, Any]:
        """Start the robots whose episode ended a step ago: for them this step was none."""
        is_driven = ~self._is_done
        if not is_driven.all():
            starting = np.flatnonzero(self._is_done)
            rewards[starting], terminations[starting], truncations[starting] = 0.0, False, False
            self._start(starting)
            distances[starting] = self._measure()[0][starting]
        self._is_done = terminations | truncations
        self._observe()
        infos = {"distance": distances, "_distance": np.ones_like(is_driven)}
        return infos | self._info("is_success", terminations, is_driven)

    def _end_on_same_step(self, distances: np.ndarray, terminations: np.ndarray, truncations: np.ndarray) -> dict[str, Any]:
        """Start the robots whose episode ends in this step; how it ended goes into ``final_obs`` and ``final_info``."""
        self._observe()
        is_done = terminations | truncations
        ended = np.flatnonzero(is_done)
        infos: dict[str, Any] = {}
        if ended.size:
            final_observations = np.full(self.num_envs, None, dtype=object)
            for i in ended:
                final_observations[i] = self._observations[:, i].copy()
            final_infos = self._info("distance", distances, is_done) | self._info("is_success", terminations, is_done)
            infos = self._info("final_obs", final_observations, is_done) | self._info("final_info", final_infos, is_done)
            self._start(ended)
            self._observe(ended)
            distances[ended] = self._measure()[0][ended]
        infos |= {"distance": distances, "_distance": np.ones_like(is_done)}
        return infos | self._info("is_success", terminations, ~is_done)

    def _info(self, key: str, values: Any, mask: np.ndarray) -> dict[str, Any]:
        """An entry of ``infos`` as ``SyncVectorEnv`` writes it: the values, 0 where there is none, and the mask."""
        if not mask.any():
            return {}
        if isinstance(values, np.ndarray) and values.dtype != object:
            values = np.where(mask, values, values.dtype.type(0))
        return {key: values, f"_{key}": mask.copy()}

    def _measure(self) -> tuple[np.ndarray, np.ndarray]:
        """The distance of each robot to the corner, and its ‖s‖."""
        squared_distances = squared_length(self._states[0], self._states[1])
        squared_speeds = squared_length(self._states[2], self._states[3])
        return np.sqrt(squared_distances), np.sqrt(squared_distances + squared_speeds)

    def _observe(self, indices: np.ndarray | None = None) -> None:
        """What the sensors of some robots, or of all, see now; only with noise is this more than a change of type."""
        if self.sensor_noise == 0:
            self._observations = self._states.astype(np.float32)
            return
        indices = np.arange(self.num_envs) if indices is None else indices
        noise = np.array([self._generators[i].standard_normal(4) for i in indices.tolist()]) * self.sensor_noise
        self._observations[:, indices] = np.clip(self._states.T[indices] + noise, STATE_LOW, STATE_HIGH).T

    def _start(self, indices: np.ndarray, states: np.ndarray | None = None) -> None:
        """Put robots at given states, or at rest at random places."""
        if states is None:
            self._states[:2, indices] = draw_starts(self._generators[i] for i in indices.tolist()).T
            self._states[2:, indices] = 0.0
        else:
            self._states[:, indices] = states.T
        self._n_steps[indices] = 0
        for i in indices if self.render_mode is not None else ():
            self._trails[i] = [tuple(self._states[:, i].tolist())]

    def _seed(self, seeds: Sequence[int | None], indices: Iterable[int]) -> None:
        """Give new generators to those of some robots that get a seed, and to those that have none yet."""
        for i in indices:
            if seeds[i] is not None or i not in self._generators:
                self._generators[i], self._seeds[i] = seeding.np_random(seeds[i])

    def _seed_of_each(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if not isinstance(seed, Sequence):
            return [seed + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed must be an integer or {self.num_envs} of them, got {len(seed)}")
        return seed

    def _check_reset_mask(self, reset_mask: Any) -> np.ndarray:
        if reset_mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        mask = np.asarray(reset_mask)
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must be an array of {self.num_envs} bools with at least one True, got "
                f"{in_one_line(repr(reset_mask))}"
            )
        if not self._is_reset and not mask.all():
            raise ResetNeeded("a reset_mask needs states to leave as they are: call reset() without it first")
        return mask

    def render(self) -> tuple[np.ndarray, ...] | None:
        """
        Draw the lot of each robot.

        :return: An image of shape (600, 600, 3) for each robot; ``None``, with a warning, without a render mode
        :raises gymnasium.error.ResetNeeded: before the first :meth:`reset`
        """
        if self.render_mode is None:
            gymnasium.logger.warn('render() needs a render mode: make the environment with render_mode="rgb_array"')
            return None
        if not self._is_reset:
            raise ResetNeeded("render() needs a state: call reset() first")
        if self._renderer is None:
            self._renderer = _make_renderer(self.metadata["render_fps"])
        return tuple(self._renderer.draw(trail) for trail in self._trails)

    def close_extras(self, **kwargs: Any) -> None:
        """
        Let go of what rendering holds.

        :param kwargs: Without effect
        """
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _make_observation_space() -> spaces.Box:
    return spaces.Box(np.array(STATE_LOW, dtype=np.float32), np.array(STATE_HIGH, dtype=np.float32), dtype=np.float32)


def _check_render_mode(render_mode: str | None, render_modes: list[str]) -> None:
    if render_mode is not None and render_mode not in render_modes:
        allowed = ", ".join(map(repr, render_modes))
        raise ValueError(f"render_mode must be {allowed} or None, got {render_mode!r}")


def _make_renderer(frames_per_second: int) -> "LotRenderer":
    from sb3_lecture_dqn.envs.robo_parking_rendering import LotRenderer  # imports pygame

    return LotRenderer(frames_per_second)
