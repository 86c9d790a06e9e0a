"""
Count the steps a second of RoboParking beside CartPole, with random actions, resets included.

::

    python benchmarks/environments.py

Absolute figures swing with whatever else the machine does. So each round times all environments one after another, the order
turns from round to round, and the ratio to CartPole is the median over rounds of the ratio within one.
"""

import argparse
import time
from collections.abc import Callable

import gymnasium
import numpy as np

import sb3_lecture_dqn  # noqa: F401  registers RoboParking-v0

OURS, THEIRS = "RoboParking-v0", "CartPole-v1"


def time_scalar(env_id: str, n_steps: int) -> float:
    """Steps a second of the environment that ``gymnasium.make`` makes."""
    env = gymnasium.make(env_id)
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(env.action_space.n, size=n_steps).tolist()  # type: ignore[attr-defined]
    start = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return n_steps / (time.perf_counter() - start)


def time_vector(env_id: str, n_steps: int, num_envs: int) -> float:
    """Steps a second, of all sub-environments together, of the environment that ``gymnasium.make_vec`` makes."""
    envs = gymnasium.make_vec(env_id, num_envs=num_envs)
    envs.reset(seed=0)
    n_actions = envs.single_action_space.n  # type: ignore[attr-defined]
    actions = np.random.default_rng(0).integers(n_actions, size=(n_steps, num_envs))
    start = time.perf_counter()
    for actions_of_step in actions:
        envs.step(actions_of_step)
    return n_steps * num_envs / (time.perf_counter() - start)


def compare(name: str, steps_per_second: Callable[[str], float], n_rounds: int) -> None:
    """Print a row of the table."""
    results: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for round_number in range(n_rounds):
        for env_id in (OURS, THEIRS) if round_number % 2 else (THEIRS, OURS):
            results[env_id].append(steps_per_second(env_id))
    ratios = np.array(results[OURS]) / results[THEIRS]
    low, high = np.quantile(ratios, (0.25, 0.75))
    ours, theirs = (f"{np.median(results[env_id]):,.0f}" for env_id in (OURS, THEIRS))
    print(f"| {name} | {ours} | {theirs} | {np.median(ratios):.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def main() -> None:
    """Time the scalar and the vector environments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--num-envs", type=int, default=1024)
    arguments = parser.parse_args()
    print(f"| steps a second | {OURS} | {THEIRS} | ratio: median (quartiles) |\n|---|---|---|---|")
    compare("one environment", lambda env_id: time_scalar(env_id, 20_000), arguments.rounds)
    compare(f"a vector of {arguments.num_envs}", lambda env_id: time_vector(env_id, 600, arguments.num_envs), arguments.rounds)


if __name__ == "__main__":
    main()
