"""
End a training at random moments of its saves, as a power cut would, and go on from what is on the disk.

    python benchmarks/save_crashes.py --crashes 200

Each process continues the run, makes a few checkpoints, and is ended by the kernel somewhere in one of them. After each there
must be a whole checkpoint, not older than the one before; the next process loads it.
"""

import argparse
import random
import signal
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from checkpoint_overhead import Timed
from kills import PROCESSES, warm_up

from sb3_lecture_dqn import LectureDQN, ResumableCheckpointCallback
from sb3_lecture_dqn.resume.checkpoint_files import newest_checkpoint

SAVE_FREQ = 40


class DiesWhileSaving(ResumableCheckpointCallback):
    """
    Is ended by the kernel a moment after a save began.

    :param folder: Where the checkpoints are
    :param save_number: In which save
    :param seconds: How long after its beginning
    """

    def __init__(self, folder: Path, save_number: int, seconds: float) -> None:
        super().__init__(SAVE_FREQ, folder, keep_last=2)
        self._saves_to_live = save_number
        self._seconds = seconds

    not_in_checkpoints = ResumableCheckpointCallback.not_in_checkpoints | {"_saves_to_live", "_seconds"}

    def _save(self, *args: Any, **kwargs: Any) -> None:
        self._saves_to_live -= 1
        if self._saves_to_live == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, without any of its code
            signal.setitimer(signal.ITIMER_REAL, max(self._seconds, 1e-6))
        super()._save(*args, **kwargs)


def make_model() -> LectureDQN:
    """A small model, in an environment that is replayed."""
    network = {"net_arch": [64, 64]}
    settings: dict[str, Any] = {"buffer_size": 2_000, "learning_starts": 100, "batch_size": 16, "policy_kwargs": network}
    return LectureDQN("MlpPolicy", "LunarLander-v2", seed=0, device="cpu", **settings)


def train(folder: Path, save_number: int, seconds: float) -> None:
    """Continue the run until the crash."""
    warnings.simplefilter("ignore")
    make_model().learn(10**6, callback=DiesWhileSaving(folder, save_number, seconds))


def seconds_per_save(folder: Path) -> float:
    """How long a save takes here."""
    callback = Timed(SAVE_FREQ, folder, keep_last=2)
    make_model().learn(20 * SAVE_FREQ, callback=callback)
    return statistics.median(callback.seconds)


def main() -> None:
    """Print how many crashes there were, and after how many there was a checkpoint to go on from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crashes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    warm_up()
    generator = random.Random(arguments.seed)
    n_loadable = n_unfinished = last_step = 0
    with tempfile.TemporaryDirectory() as temporary:
        duration = seconds_per_save(Path(temporary) / "timing")
        folder = Path(temporary) / "run"
        for crash in range(arguments.crashes):
            # the first save of the whole run makes the first checkpoint; it is left alone
            moment = generator.uniform(0, duration)
            process = PROCESSES.Process(target=train, args=(folder, generator.randint(2, 3), moment))
            process.start()
            process.join()
            if process.exitcode != -signal.SIGALRM:
                raise RuntimeError(f"crash {crash}: the process ended with {process.exitcode}")
            n_unfinished += any("." in path.name for path in folder.glob("checkpoint_*"))
            checkpoint = newest_checkpoint(folder)
            if checkpoint is not None and checkpoint.num_timesteps >= last_step:
                n_loadable, last_step = n_loadable + 1, checkpoint.num_timesteps
    print(f"a save takes {1000 * duration:.1f} ms; {n_unfinished} crashes left a half-written checkpoint behind")
    print(f"{n_loadable} of {arguments.crashes} crashes left a whole checkpoint; the last one is of step {last_step}")


if __name__ == "__main__":
    main()
