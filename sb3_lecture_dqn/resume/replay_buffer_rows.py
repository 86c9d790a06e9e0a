"""
The replay buffer in checkpoints: each one writes the rows that are new, and refers to the files of earlier ones for the rest.

A row is one step of all environments. Rows are numbered from the first one that was ever added; row ``r`` lies at ``r %
buffer_size``, so a ring of ``buffer_size`` rows holds the newest ones, and a file is no longer needed when all of its rows are
overwritten.
"""

import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from sb3_lecture_dqn.replay_buffer import ContiguousReplayBuffer, arrays_of, note_old_rows_changed
from sb3_lecture_dqn.resume.checkpoint_files import Checkpoint, FileRecord, write_shared_file

#: Arrays of which adding a transition writes the row at ``pos``, and nothing else.
ROW_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "ep_start", "infos")
#: Small attributes that change, saved whole. HER's episode lengths also change in old rows.
OTHER_STATE = ("pos", "full", "_current_ep_start", "ep_length")
SETTINGS = (
    "buffer_size",
    "observation_space",
    "action_space",
    "obs_shape",
    "action_dim",
    "device",
    "n_envs",
    "optimize_memory_usage",
    "handle_timeout_termination",
    "n_steps",
    "gamma",
    "env",
    "copy_info_dict",
    "goal_selection_strategy",
    "n_sampled_goal",
    "her_ratio",
    "_records",  # the memory that a ContiguousReplayBuffer's arrays are views of
    "_stored",  # other views of it
    "_device_copy",
)
_KNOWN_ADDS = (ReplayBuffer.add, DictReplayBuffer.add, HerReplayBuffer.add, ContiguousReplayBuffer.add)


class RowFile(NamedTuple):
    """A file with the rows ``first`` to ``stop - 1``."""

    record: FileRecord
    first: int
    stop: int


def stores_rows_as_sb3(replay_buffer: ReplayBuffer) -> bool:
    """
    Whether a replay buffer keeps its transitions as Stable-Baselines3's classes do, so that new ones can be saved alone.

    :param replay_buffer: The buffer; one of a user's class may add how it samples, but nothing that it remembers
    :return: Whether it does; otherwise it has to be pickled whole
    """
    known = {*ROW_ARRAYS, *OTHER_STATE, *SETTINGS}
    return type(replay_buffer).add in _KNOWN_ADDS and set(vars(replay_buffer)) <= known


class ReplayBufferFiles:
    """Which rows of the replay buffer are on disk, and where."""

    def __init__(self) -> None:
        self._row_files: list[RowFile] = []
        self._rows_added = 0
        self._num_timesteps = 0
        self._before: tuple[list[RowFile], int, int] = [], 0, 0

    def forget(self) -> None:
        """Old rows were changed: the next checkpoint writes all."""
        self._row_files, self._rows_added = [], 0

    def write_new_rows(self, folder: Path, replay_buffer: ReplayBuffer, num_timesteps: int) -> list[FileRecord]:
        """
        Write the rows that were added since the last call.

        :param folder: The folder of the checkpoints
        :param replay_buffer: The buffer
        :param num_timesteps: The step of the run; one row is ``n_envs`` steps
        :return: The files that together hold all rows of the buffer
        :raises OSError: if the disk does not take it
        """
        self._before = self._row_files, self._rows_added, self._num_timesteps
        size, pos = replay_buffer.buffer_size, replay_buffer.pos
        rows_added = self._rows_added + (num_timesteps - self._num_timesteps) // replay_buffer.n_envs
        first = max(self._rows_added, rows_added - size)
        is_continuous = bool(self._row_files) and rows_added % size == pos and rows_added >= self._rows_added
        if not is_continuous:
            rows_added = pos + size if replay_buffer.full else pos
            first = max(0, rows_added - size)
        row_files = [file for file in self._row_files if is_continuous and file.stop > rows_added - size]
        if rows_added > first:
            positions = np.arange(first, rows_added) % size
            record = write_shared_file(
                folder, f"rows_{first}_{rows_added}", lambda file: _write_rows(file, replay_buffer, positions)
            )
            row_files.append(RowFile(record, first, rows_added))
        self._row_files, self._rows_added, self._num_timesteps = row_files, rows_added, num_timesteps
        return [file.record for file in row_files]

    def undo(self) -> None:
        """The checkpoint that the last rows were written for was not saved: the next one writes them again."""
        self._row_files, self._rows_added, self._num_timesteps = self._before

    def state(self, replay_buffer: ReplayBuffer) -> dict[str, Any]:
        """
        What a checkpoint has to keep beside the files.

        :param replay_buffer: The buffer, whose rows were just written
        :return: Something that can be pickled
        """
        row = {name: array[replay_buffer.pos].copy() for name, array in _row_arrays(replay_buffer).items()}
        others = {name: getattr(replay_buffer, name) for name in OTHER_STATE if hasattr(replay_buffer, name)}
        return {
            # With optimize_memory_usage the row at pos already has the last next_observations.
            "row_at_pos": row,
            "others": others,
            "rows": [(file.record.name, file.first, file.stop) for file in self._row_files],
            "rows_added": self._rows_added,
        }

    def restore(self, checkpoint: Checkpoint, state: dict[str, Any], replay_buffer: ReplayBuffer) -> None:
        """
        Bring the buffer, and this object, to where they were.

        :param checkpoint: The checkpoint
        :param state: What :meth:`state` gave
        :param replay_buffer: The buffer of the run that goes on
        """
        records = {record.name: record for record in checkpoint.shared_files}
        self._row_files = [RowFile(records[name], first, stop) for name, first, stop in state["rows"]]
        self._rows_added, self._num_timesteps = state["rows_added"], checkpoint.num_timesteps
        size = replay_buffer.buffer_size
        arrays = _row_arrays(replay_buffer)
        for file in self._row_files:
            first = max(file.first, self._rows_added - size)
            positions = np.arange(first, file.stop) % size
            with np.load(checkpoint.shared_file(file.record), allow_pickle=False) as saved:
                for name, array in arrays.items():
                    array[positions] = _unpack(saved[name], array.dtype)[first - file.first :]
        for name, row in state["row_at_pos"].items():
            arrays[name][state["others"]["pos"]] = row
        for name, value in state["others"].items():
            setattr(replay_buffer, name, value)
        note_old_rows_changed(replay_buffer)


def _row_arrays(replay_buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name in ROW_ARRAYS:
        value = arrays_of(replay_buffer, name)
        if isinstance(value, dict):
            arrays.update({f"{name}.{key}": array for key, array in value.items()})
        elif value is not None and (name != "infos" or getattr(replay_buffer, "copy_info_dict", False)):
            arrays[name] = value
    return arrays


def _write_rows(file: BinaryIO, replay_buffer: ReplayBuffer, positions: np.ndarray) -> None:
    np.savez(file, **{name: _pack(array[positions]) for name, array in _row_arrays(replay_buffer).items()})  # type: ignore[arg-type]


def _pack(rows: np.ndarray) -> np.ndarray:
    """HER's infos are Python objects, which a numpy file holds only as bytes."""
    return rows if rows.dtype.kind != "O" else np.frombuffer(pickle.dumps(rows), dtype=np.uint8)


def _unpack(saved: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    rows: np.ndarray = saved if dtype.kind != "O" else pickle.loads(saved.tobytes())
    return rows
