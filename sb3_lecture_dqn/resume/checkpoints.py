"""
Checkpoints from which a killed run goes on as if nothing had happened.

SB3's loop is in one place where everything it knows lies in objects and nothing in local variables: when it begins to collect.
There, the callback below saves; and there, in a run that was started again, it brings everything back, so that the loop goes
on exactly where it was.
"""

import errno
import pickle
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_lecture_dqn.fast.head import is_own_method
from sb3_lecture_dqn.replay_buffer import end_last_episodes
from sb3_lecture_dqn.resume.checkpoint_files import (
    Checkpoint,
    Writer,
    delete_all_but_last,
    delete_leftovers,
    newest_checkpoint,
    write_checkpoint,
)
from sb3_lecture_dqn.resume.replay_buffer_rows import ReplayBufferFiles, stores_rows_as_sb3
from sb3_lecture_dqn.resume.run_settings import SETTINGS, check_same_run, in_words
from sb3_lecture_dqn.resume.training_state import (
    PARAMETERS_FILE,
    STATE_FILE,
    TrainingState,
    dump_state,
    restore_parameters,
    take_parameters,
)
from sb3_lecture_dqn.resume.vec_env_state import insert_recorders
from sb3_lecture_dqn.validation import check_int_at_least

if TYPE_CHECKING:  # it imports this module
    from sb3_lecture_dqn.lecture_dqn import LectureDQN

#: Errors that may pass while a run goes on.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
REPLAY_BUFFER_FILE = "replay_buffer.pkl"


class ResumableCheckpointCallback(BaseCallback):
    """
    Saves the whole run every ``save_freq`` steps; and continues it, when the same program is started again.

    ::

        model = LectureDQN("MlpPolicy", "LunarLander-v2", seed=0)
        model.learn(100_000, callback=ResumableCheckpointCallback(10_000, "runs/lander"))

    Killed at any moment and started again, these two lines load the newest whole checkpoint of ``runs/lander`` and end with
    the parameters, the optimizer, the replay buffer, the evaluations and the logged values (times apart) that the run would
    have ended with, bit for bit, on the same machine and versions. What that covers, and what it cannot, is in
    ``docs/resume.md``.

    Saving happens when SB3 begins to collect, at the first such moment after every ``save_freq`` steps, and before the first
    step. If the disk does not take a checkpoint, or does not give a file that the run writes (a log, ``Monitor``'s), that is a
    warning: the run goes on, and the checkpoints before it stay. At the first checkpoint it is an error, but for a full disk.

    It is for a :class:`~sb3_lecture_dqn.LectureDQN`, whose state it knows, and for no other algorithm.

    Loading a checkpoint unpickles: use only folders that you trust.

    :param save_freq: Number of steps, over all environments together, between two checkpoints, at least 1
    :param folder: Where the checkpoints are; one for each run
    :param keep_last: How many checkpoints are kept, at least 1
    :param verbose: 0 for no output, 1 for a line at each checkpoint
    :raises ValueError: if a number is out of its range; or, when training starts, if the model is no ``LectureDQN``; the
        folder holds another run (other settings, another environment, another number of steps) or no checkpoint that can be
        read, or cannot be written to; a file of the logger's or of ``Monitor`` cannot be read; or this callback is within
        another one
    """

    model: "LectureDQN"  # which is looked at when training starts
    #: Attributes that the resumed run has of its own.
    not_in_checkpoints: ClassVar[frozenset[str]] = frozenset(
        {"save_freq", "folder", "keep_last", "_state", "_replay_buffer_files"}
    )

    def __init__(self, save_freq: int, folder: str | Path, keep_last: int = 3, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_int_at_least("save_freq", save_freq, 1)
        check_int_at_least("keep_last", keep_last, 1)
        self.save_freq = save_freq
        self.folder = Path(folder)
        self.keep_last = keep_last
        self._saved_at = 0
        self._state: TrainingState | None = None
        self._replay_buffer_files = ReplayBufferFiles()

    def _on_training_start(self) -> None:
        from sb3_lecture_dqn.lecture_dqn import LectureDQN  # which imports this module

        if not isinstance(self.model, LectureDQN):
            raise ValueError(
                f"model must be a LectureDQN to be trained with ResumableCheckpointCallback, got {type(self.model).__name__}"
            )
        if self._state is not None:
            raise ValueError("callback must be a new ResumableCheckpointCallback, with a folder of its own, for each learn()")

    def _on_rollout_start(self) -> None:
        if self._state is None:
            self._state = TrainingState(self.model, self.locals["callback"])
            checkpoint = newest_checkpoint(self.folder)
            if checkpoint is not None:
                self._resume(checkpoint, self._state)
                return
            self._save(self._state, is_first=True)
        elif self.model.num_timesteps // self.save_freq > self._saved_at // self.save_freq:
            self._save(self._state)

    def _on_step(self) -> bool:
        if self._state is None:
            raise ValueError("callback must have ResumableCheckpointCallback in its list, not within another callback")
        return True

    # Saving

    def _save(self, state: TrainingState, *, is_first: bool = False) -> None:
        self.model.check_divergence()  # what has diverged must not push out the last good checkpoint
        self._saved_at = self.model.num_timesteps
        try:
            run = state.take()
        except OSError as error:
            if is_first:
                raise ValueError(f"the files of the logger and of Monitor must be readable, got {error}") from error
            self._warn_that_nothing_was_saved(error)
            return
        try:
            path = self._write(state, run)
        except OSError as error:
            if is_first and error.errno not in FULL_DISK:
                raise ValueError(
                    f"folder must be one in which checkpoints can be written, got {self.folder} ({error})"
                ) from error
            self._warn_that_nothing_was_saved(error)
            self._replay_buffer_files.undo()
            delete_leftovers(self.folder)
            return
        delete_all_but_last(self.folder, self.keep_last)
        if self.verbose >= 1:
            print(f"Saved {path}")

    def _warn_that_nothing_was_saved(self, error: OSError) -> None:
        warnings.warn(
            f"no checkpoint was saved at step {self.model.num_timesteps} ({error}); the run goes on, and the checkpoints that "
            f"are in {self.folder} stay",
            stacklevel=3,
        )

    def _write(self, state: TrainingState, run: dict[str, Any]) -> Path:
        from sb3_lecture_dqn.lecture_dqn import LectureDQN  # which imports this module

        model, replay_buffer = self.model, self.model.replay_buffer
        assert replay_buffer is not None
        parameters = take_parameters(model)
        saved: dict[str, Any] = {"run": run}
        writers: dict[str, Writer] = {}
        row_files = []
        adds_a_row_a_step = is_own_method(model, "_store_transition", LectureDQN)
        if adds_a_row_a_step and stores_rows_as_sb3(replay_buffer):
            row_files = self._replay_buffer_files.write_new_rows(self.folder, replay_buffer, model.num_timesteps)
            saved["replay_buffer"] = self._replay_buffer_files.state(replay_buffer)
        else:
            writers[REPLAY_BUFFER_FILE] = lambda file: pickle.dump(replay_buffer, file, pickle.HIGHEST_PROTOCOL)
        pickled = dump_state(saved)
        writers[PARAMETERS_FILE] = lambda file: file.write(parameters)
        writers[STATE_FILE] = lambda file: file.write(pickled)
        facts = {"settings": self._settings(state), "versions": _versions()}
        return write_checkpoint(self.folder, model.num_timesteps, writers, row_files, facts).path

    def _settings(self, state: TrainingState) -> dict[str, str]:
        settings = {name: in_words(getattr(self.model, name)) for name in SETTINGS}
        return {**settings, "total_timesteps": str(self.model._total_timesteps), **state.env_settings}

    # Resuming

    def _resume(self, checkpoint: Checkpoint, state: TrainingState) -> None:
        check_same_run(checkpoint.facts["settings"], self._settings(state), self.folder)
        _warn_of_other_versions(checkpoint)
        model, replay_buffer = self.model, self.model.replay_buffer
        assert replay_buffer is not None
        saved = pickle.loads(checkpoint.file(STATE_FILE).read_bytes())
        restore_parameters(model, checkpoint.file(PARAMETERS_FILE))
        if "replay_buffer" in saved:
            self._replay_buffer_files.restore(checkpoint, saved["replay_buffer"], replay_buffer)
        else:
            loaded = pickle.loads(checkpoint.file(REPLAY_BUFFER_FILE).read_bytes())
            vars(replay_buffer).update({name: value for name, value in vars(loaded).items() if name not in ("env", "device")})
        reasons = state.restore(saved["run"])
        for reason in filter(None, reasons[1:]):
            warnings.warn(f"an environment of a callback could not be brought back ({reason})", stacklevel=2)
        if reasons[0] is not None:
            self._start_new_episodes(reasons[0])
        if self.verbose >= 1:
            print(f"Continuing from {checkpoint.path}")

    def _start_new_episodes(self, reason: str) -> None:
        warnings.warn(
            f"the environment is not reproducible ({reason}): the run goes on with new episodes, and is not the one that it "
            "would have been",
            stacklevel=2,
        )
        model: Any = self.model  # whose hints are narrower than what SB3 itself assigns to these attributes
        model._last_obs = model.env.reset()
        model._last_episode_starts = np.ones((model.env.num_envs,), dtype=bool)
        if model.get_vec_normalize_env() is not None:
            model._last_original_obs = model.get_vec_normalize_env().get_original_obs()
        end_last_episodes(model.replay_buffer)
        self._replay_buffer_files.forget()


def record_for_checkpoints(callback: MaybeCallback, vec_env: VecEnv | None) -> None:
    """
    Have the environments recorded from their first reset on, if a callback makes checkpoints.

    :param callback: What ``learn`` was given
    :param vec_env: The training environment, before that reset
    """
    if vec_env is not None and _makes_checkpoints(callback):
        insert_recorders(vec_env)


def _makes_checkpoints(callback: MaybeCallback) -> bool:
    if isinstance(callback, CallbackList):
        callback = callback.callbacks
    if isinstance(callback, list):
        return any(map(_makes_checkpoints, callback))
    return isinstance(callback, ResumableCheckpointCallback)


def _warn_of_other_versions(checkpoint: Checkpoint) -> None:
    versions = _versions()
    for name, saved in checkpoint.facts["versions"].items():
        if versions[name] != saved:
            warnings.warn(
                f"the checkpoint was made with {name} {saved} and this is {versions[name]}: the run goes on, but it may "
                "differ from the one that it would have been",
                stacklevel=2,
            )


def _versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "PyTorch": th.__version__,
        "numpy": np.__version__,
        "Gymnasium": gymnasium.__version__,
        "Stable-Baselines3": stable_baselines3.__version__,
    }
