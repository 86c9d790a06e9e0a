"""
Learning curves of LectureDQN with its fast path and with the plain one, over ten seeds.

::

    python benchmarks/paths.py --env CartPole-v1 --steps 10000

Each line is a point of the curve: the mean of the seeds' greedy returns and its 95 % bootstrap interval. Rounding makes two
runs of one seed part after some hundred updates, so only the curves can agree, not the runs.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import torch as th
from scipy.stats import bootstrap
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast.acting import FastActing

SETTINGS = {"learning_rate": 1e-3, "batch_size": 64, "learning_starts": 500, "train_freq": 4, "gradient_steps": 4}


class PlainLectureDQN(LectureDQN):
    """The algorithm as it is written down, without the fast path."""

    def _current_fast_update(self) -> None:
        return None


def learning_curve(run: tuple[str, str, str, int, int, int]) -> list[float]:
    """The mean greedy returns of one run at evenly spaced points."""
    path, env_id, device, steps, points, seed = run
    th.set_num_threads(1)
    env = make_vec_env(env_id, seed=seed)
    evaluation_env = make_vec_env(env_id, seed=10_000 + seed)
    with mock.patch.object(FastActing, "for_policy", FastActing.for_policy if path == "fast" else lambda policy: None):
        arguments: dict[str, Any] = {} if path == "fast" else {"replay_buffer_class": ReplayBuffer}
        algorithm = LectureDQN if path == "fast" else PlainLectureDQN
        model = algorithm("MlpPolicy", env, seed=seed, device=device, **SETTINGS, **arguments)
        curve = []
        for _ in range(points):
            model.learn(steps // points, reset_num_timesteps=False)
            curve.append(float(evaluate_policy(model, evaluation_env, n_eval_episodes=10)[0]))
    return curve


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean."""
    method = "BCa" if np.ptp(values) else "percentile"  # BCa has none where all seeds agree
    low, high = bootstrap((values,), np.mean, method=method, rng=np.random.default_rng(0)).confidence_interval
    return float(low), float(high)


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="environment id")
    parser.add_argument("--device", default="cpu", help="PyTorch's device")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    paths = ("fast", "plain")
    settings = (arguments.env, arguments.device, arguments.steps, arguments.points)
    runs = [(path, *settings, seed) for path in paths for seed in range(arguments.seeds)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        curves = np.array(list(pool.map(learning_curve, runs))).reshape(2, arguments.seeds, arguments.points)
    print("| steps | fast: mean (95 %) | plain: mean (95 %) | intervals overlap |\n|---|---|---|---|")
    for point in range(arguments.points):
        intervals = [interval(curves[path, :, point]) for path in range(2)]
        overlap = max(low for low, _ in intervals) <= min(high for _, high in intervals)
        cells = [
            f"{curves[path, :, point].mean():.1f} ({low:.1f} to {high:.1f})" for path, (low, high) in enumerate(intervals)
        ]
        steps = (point + 1) * arguments.steps // arguments.points
        print(f"| {steps} | {cells[0]} | {cells[1]} | {'yes' if overlap else 'no'} |")


if __name__ == "__main__":
    main()
