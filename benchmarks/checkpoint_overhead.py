"""
Measure what checkpoints cost: their share of a training of LunarLander with the zoo's entry, and the time and bytes of each.

    python benchmarks/checkpoint_overhead.py --steps 50000

The share is the time spent in saving, plus what recording the episodes adds to each step, over the time of the whole run; both
are measured inside one run, because two runs on a busy machine differ by more than checkpoints cost.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import torch as th
from results import ROWS, Run, make_manager

from sb3_lecture_dqn import ResumableCheckpointCallback
from sb3_lecture_dqn.resume.episode_recorder import EpisodeRecorder

ROW = "LunarLander-v2"


class Timed(ResumableCheckpointCallback):
    """Notes the time and the new bytes of each checkpoint."""

    def __init__(self, save_freq: int, folder: Path, keep_last: int = 3) -> None:
        super().__init__(save_freq, folder, keep_last)
        self.seconds: list[float] = []
        self.new_bytes: list[int] = []

    def _save(self, *args: Any, **kwargs: Any) -> None:
        before = files(self.folder)
        start = time.perf_counter()
        super()._save(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        after = files(self.folder)
        self.new_bytes.append(sum(size for path, size in after.items() if path not in before))


def files(folder: Path) -> dict[Path, int]:
    """The files of a folder and their sizes."""
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def seconds_per_step(env: gymnasium.Env[Any, Any], n_steps: int) -> float:
    """Time of a step with random actions, resets included."""
    env.reset(seed=0)
    env.action_space.seed(0)
    start = time.perf_counter()
    for _ in range(n_steps):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return (time.perf_counter() - start) / n_steps


def recording_seconds_per_step() -> float:
    """What the recorder adds to a step: the least of several alternating rounds."""
    plain, recorded = gymnasium.make("LunarLander-v2"), EpisodeRecorder(gymnasium.make("LunarLander-v2"))
    rounds = [(seconds_per_step(plain, 3_000), seconds_per_step(recorded, 3_000)) for _ in range(5)]
    return max(min(second for _, second in rounds) - min(first for first, _ in rounds), 0.0)


def main() -> None:
    """Print the share, and what each checkpoint took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--save-freq", type=int, default=10_000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    th.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _, model = make_manager(Run(ROW, ROWS[ROW], "lecture_dqn", seed=0), Path(folder))
        callback = Timed(arguments.save_freq, Path(folder) / "checkpoints")
        start = time.perf_counter()
        model.learn(arguments.steps, callback=callback)
        total = time.perf_counter() - start
    recording = recording_seconds_per_step() * arguments.steps
    for number, (seconds, size) in enumerate(zip(callback.seconds, callback.new_bytes, strict=True)):
        print(f"checkpoint {number}: {1000 * seconds:.0f} ms, {size / 1e6:.2f} MB")
    saving = sum(callback.seconds)
    print(f"the whole run took {total:.1f} s, of which saving {saving:.2f} s and recording the episodes {recording:.2f} s")
    print(f"checkpoints cost {100 * (saving + recording) / total:.2f} % of the run")


if __name__ == "__main__":
    main()
