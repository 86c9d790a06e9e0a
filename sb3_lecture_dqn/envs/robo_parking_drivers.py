"""Two drivers of :class:`RoboParkingEnv` that are not learned, to compare a learned one with."""

from typing import NamedTuple

import numpy as np

from sb3_lecture_dqn.envs.robo_parking import GOAL_TOLERANCE, pushes_and_drag, roll
from sb3_lecture_dqn.validation import check_int_at_least

LEFT, BACKWARD = 0, 3


class Drive(NamedTuple):
    """A way to the goal: its actions, and the return Σ −‖s′‖, which is at most 0."""

    actions: list[int]
    episode_return: float


def drive_along_kerbs(observations: np.ndarray) -> np.ndarray:
    """
    The scripted driver: left to the kerb x = 0, then along it to the corner.

    :param observations: (x, y, ẋ, ẏ), shape (..., 4)
    :return: The actions, shape (...)
    """
    return np.where(observations[..., 0] > 0, LEFT, BACKWARD)


def find_optimal_drive(
    state: np.ndarray,
    width: int = 300,
    mass: float = 10.0,
    wheel_torque: float = 1.0,
    friction: float = 2.0,
) -> Drive:
    """
    The optimal driver, but for what a beam misses: the shortest path on the true model, where a step costs ‖s′‖.

    All states that are ``t`` steps from the start are expanded at once, for ``t`` = 1, 2, ... States that coincide are merged,
    and of the others the ``width`` best are kept, by cost so far and an estimate of the rest: what it would cost if from now
    on each step pushed both axes. With a ``width`` that is never reached the search is exhaustive; the wider the beam, the
    less it misses.

    :param state: (x, y, ẋ, ẏ), within the observation space
    :param width: Number of states that are kept after each step, at least 1
    :param mass: As in :class:`RoboParkingEnv`
    :param wheel_torque: As in :class:`RoboParkingEnv`
    :param friction: As in :class:`RoboParkingEnv`
    :return: The best drive that was found
    :raises ValueError: if ``width`` is out of its range, or an argument is out of :class:`RoboParkingEnv`'s
    """
    check_int_at_least("width", width, 1)
    pushes, drag = pushes_and_drag(mass, wheel_torque, friction)
    action_pushes = np.array(pushes).T[:, :, None]  # (2, |A|, 1)
    strongest_push = max(max(push) for push in pushes)
    states = np.asarray(state, dtype=np.float64).reshape(4, 1)
    costs = np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # after each step: parents and actions of the states that were kept
    best_cost, best_step, best_parent, best_action = np.inf, 0, 0, 0
    while costs.size:
        n_states = costs.size
        position, velocity = roll(states[:2, None], states[2:, None], action_pushes, drag)
        next_states = np.concatenate(np.broadcast_arrays(position, velocity)).reshape(4, -1)
        norms = np.sqrt(np.square(next_states).sum(axis=0))
        next_costs = np.tile(costs, len(pushes)) + norms

        parked = np.flatnonzero(norms < GOAL_TOLERANCE)
        if parked.size and next_costs[parked].min() < best_cost:
            index = parked[next_costs[parked].argmin()]
            best_cost, best_step = next_costs[index], len(steps)
            best_parent, best_action = index % n_states, index // n_states
        # A state that cannot beat the best drive is dropped, and with that each one that is parked.
        kept = np.flatnonzero(next_costs < best_cost)
        kept = kept[_first_of_equals(next_states[:, kept], next_costs[kept])]
        if kept.size > width:
            estimates = next_costs[kept] + _cost_without_choice(next_states[:, kept], strongest_push, drag)
            kept = kept[np.argpartition(estimates, width - 1)[:width]]
        steps.append((kept % n_states, kept // n_states))
        states, costs = next_states[:, kept], next_costs[kept]

    return Drive(_trace_back(steps[:best_step], best_parent, int(best_action)), -float(best_cost))


def _trace_back(steps: list[tuple[np.ndarray, np.ndarray]], parent: int, last_action: int) -> list[int]:
    """The actions on the way to a state, found from its parent back to the start."""
    path = [last_action]
    for parents, chosen in reversed(steps):
        path.append(int(chosen[parent]))
        parent = parents[parent]
    return path[::-1]


def _first_of_equals(states: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Indices of the cheapest of each group of states that are equal but for rounding errors."""
    order = np.argsort(costs, kind="stable")
    return order[np.unique(np.round(states[:, order] * 1e8).astype(np.int64), axis=1, return_index=True)[1]]


def _cost_without_choice(states: np.ndarray, push: float, drag: float) -> np.ndarray:
    """Σ‖s′‖ until both axes are at the corner, if each step could push both."""
    position, velocity = states[:2], states[2:]
    costs = np.zeros(states.shape[1])
    while position.any():
        position, velocity = roll(position, velocity, np.full_like(position, -push), drag)
        costs += np.sqrt(np.square(position).sum(axis=0) + np.square(velocity).sum(axis=0))
    return costs
