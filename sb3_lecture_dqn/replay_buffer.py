"""The replay buffer D (L11) with each transition in one place of memory, so that drawing a batch is one read a transition."""

import warnings
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_lecture_dqn.fast.device_copy import CopiedRecords, DeviceCopy, DrawnRows, dones_of, is_cuda
from sb3_lecture_dqn.fast.stored_transitions import StoredTransitions


def _field(name: str) -> Any:
    """An attribute that is a view of the records, and stays one when something is assigned to it."""

    def get(replay_buffer: "ContiguousReplayBuffer") -> np.ndarray:
        replay_buffer._device_copy.is_seen = True
        view: np.ndarray = replay_buffer.__dict__[name]
        return view

    def assign(replay_buffer: "ContiguousReplayBuffer", array: np.ndarray) -> None:
        view = replay_buffer.__dict__.get(name)
        if view is None:  # SB3's constructor makes it
            replay_buffer.__dict__[name] = array
        elif np.shape(array) != view.shape:
            advice = "with replay_buffer_class=ReplayBuffer it may have another"
            raise ValueError(f"{name} must have the shape {view.shape}, got {np.shape(array)}; {advice}")
        else:
            replay_buffer._device_copy.is_seen = True
            np.copyto(view, array, casting="same_kind")

    return property(get, assign)


#: The arrays of SB3's buffers that hold a row for each transition; of dictionary observations, several arrays each.
FIELDS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def arrays_of(replay_buffer: ReplayBuffer, name: str) -> Any:
    """
    An array of a replay buffer, to look at it or to write into its newest row; not as a user's look, who may write anywhere.

    :param replay_buffer: The buffer
    :param name: One of ``FIELDS``
    :return: The array, or arrays by their names, or ``None`` if it has no such field
    """
    is_ours = isinstance(replay_buffer, ContiguousReplayBuffer)
    return vars(replay_buffer).get(name) if is_ours else getattr(replay_buffer, name, None)


def note_old_rows_changed(replay_buffer: ReplayBuffer) -> None:
    """
    Tell a replay buffer that old rows were written into the arrays that :func:`arrays_of` gave.

    :param replay_buffer: The buffer
    """
    if isinstance(replay_buffer, ContiguousReplayBuffer):
        replay_buffer._device_copy.is_seen = True


class ContiguousReplayBuffer(ReplayBuffer):
    """
    SB3's ``ReplayBuffer``, with the same arguments, arrays and draws, laid out for sampling.

    SB3 keeps observations, actions, rewards and so on in arrays of their own; a random transition then is five or six reads
    from distant places. Here they are fields of one record array, and ``observations``, ``actions``, … are views of it. They
    are read, indexed and written into as before; an array that is assigned to one of them is copied into it.

    For a CUDA device the records are kept there too, where they take at most half of its free memory, and batches are read
    there. What is written into the arrays from outside counts as before: where somebody holds one of them, or has had one
    since the last draw, a batch comes from the host, and the next that does not copies all records once more.

    The parameters are those of :class:`stable_baselines3.common.buffers.ReplayBuffer`.

    :raises ValueError: if ``optimize_memory_usage`` is set, which SB3's own class is for
    """

    observations = _field("observations")
    next_observations = _field("next_observations")
    actions = _field("actions")
    rewards = _field("rewards")
    dones = _field("dones")
    timeouts = _field("timeouts")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._device_copy = DeviceCopy()
        super().__init__(*args, **kwargs)
        if self.optimize_memory_usage:
            raise ValueError("optimize_memory_usage must be False for a ContiguousReplayBuffer, got True")
        arrays = [(name, vars(self)[name]) for name in FIELDS]
        record = np.dtype([(name, array.dtype, array.shape[2:]) for name, array in arrays], align=True)
        # SB3's arrays are all zeros still, so the system has not given them any memory yet
        self._records = np.zeros((self.buffer_size, self.n_envs), dtype=record)
        self._make_views()
        self._device_copy.is_seen = False  # SB3's own constructor has looked at what was there before

    def _make_views(self) -> None:
        self._stored: StoredTransitions | None = None  # made when asked for: a device's copy counts the views there are
        self.__dict__.update({name: self._records[name] for name in FIELDS})

    def add(self, *args: Any, **kwargs: Any) -> None:
        """
        Store a transition of each environment.

        :param args: As for SB3's ``ReplayBuffer``
        :param kwargs: As for SB3's ``ReplayBuffer``
        """
        is_seen = self._device_copy.is_seen
        super().add(*args, **kwargs)
        self._device_copy.is_seen = is_seen  # SB3's own look at the arrays is not one from outside
        self._device_copy.n_new_rows += 1

    def draw(self, batch_size: int, kind_of_records: type[Any] = CopiedRecords) -> DrawnRows | ReplayBufferSamples:
        """
        Draw as :meth:`sample` does, for somebody who can read the transitions where they are.

        :param batch_size: Number of transitions
        :param kind_of_records: ``CopiedRecords`` for what a CUDA device has, ``StoredTransitions`` for what the kernels read
        :return: Which transitions they are; the transitions themselves where there are no such records
        """
        drawn = self._with_environments(np.random.randint(0, self.size(), size=batch_size))
        indices = drawn.astype(np.int64, copy=False)  # Windows has smaller ones
        records = self._records_there() if kind_of_records is CopiedRecords else self._records_here()
        return self._samples_here(indices) if records is None else DrawnRows(indices, records)

    def _with_environments(self, rows: np.ndarray) -> np.ndarray:
        """Where the records of the rows are, of one environment each."""
        if self.n_envs == 1:
            return rows
        return rows * self.n_envs + np.random.randint(0, high=self.n_envs, size=len(rows))

    def _records_here(self) -> StoredTransitions | None:
        handles_timeouts = self.handle_timeout_termination
        if self._stored is None or self._stored.handle_timeout_termination != handles_timeouts:
            self._stored = StoredTransitions.of(self._records, handles_timeouts)
        return self._stored

    def _records_there(self) -> CopiedRecords | None:
        self._stored = None  # views that are counted as somebody's
        return self._device_copy.records(self) if is_cuda(self.device) else None

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        indices = self._with_environments(batch_inds)
        records = self._records_there() if env is None else None  # VecNormalize works on the host
        if records is not None:
            return records.samples(th.from_numpy(indices).to(self.device))
        return self._samples_here(indices, env)

    def _samples_here(self, indices: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        batch = self._records.reshape(-1).take(indices)
        return ReplayBufferSamples(
            observations=self._to_device(_in_one_piece(self._normalize_obs(batch["observations"], env))),
            actions=self._to_device(batch["actions"]),
            next_observations=self._to_device(_in_one_piece(self._normalize_obs(batch["next_observations"], env))),
            dones=self._to_device(dones_of(batch, self.handle_timeout_termination)[:, None]),
            rewards=self._to_device(self._normalize_reward(batch["rewards"][:, None], env)),
        )

    def _to_device(self, array: Any) -> th.Tensor:
        tensor = th.from_numpy(array)  # the batch is a copy already
        if self.device.type == "cpu":
            return tensor
        # CUDA has read what is not in pinned memory when this returns; other devices may not have
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def __getstate__(self) -> dict[str, Any]:
        """Without the views, which a pickle would turn into copies, and what is on the device."""
        return {name: value for name, value in self.__dict__.items() if name not in (*FIELDS, "_stored", "_device_copy")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_views()
        self._device_copy = DeviceCopy()


def _in_one_piece(observations: Any) -> Any:
    # the fields of a record lie side by side, and an encoder may want to view its input in another shape
    return np.ascontiguousarray(observations)


def end_last_episodes(replay_buffer: ReplayBuffer) -> None:
    """
    Let no stored episode go on behind the newest row, because the environments start new ones.

    Where an episode had ended there by itself, nothing changes. Otherwise it has been cut off: d is 1, as for a time limit.

    :param replay_buffer: The buffer
    """
    if isinstance(replay_buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice is on loading a buffer
            replay_buffer.truncate_last_trajectory()
        return
    follows_rows = replay_buffer.optimize_memory_usage or isinstance(replay_buffer, NStepReplayBuffer)
    if not follows_rows or replay_buffer.size() == 0:
        return
    dones = replay_buffer.dones[replay_buffer.pos - 1]
    if replay_buffer.handle_timeout_termination:
        replay_buffer.timeouts[replay_buffer.pos - 1][dones == 0] = 1
    dones[:] = 1


def repeat_last_transitions(replay_buffer: ReplayBuffer, env_indices: list[int]) -> None:
    """
    Store the last transition of some episodes once more, in the place of what came after it.

    A buffer that stores each observation once (``optimize_memory_usage``) has no place for that, and stays as it is.

    :param replay_buffer: The buffer, whose newest row is to be replaced
    :param env_indices: The environments whose episodes ended in the row before
    """
    newest, before = ((replay_buffer.pos - n) % replay_buffer.buffer_size for n in (1, 2))
    ended = [i for i in env_indices if arrays_of(replay_buffer, "dones")[before, i]]  # not if that row is another run's
    if replay_buffer.optimize_memory_usage or not ended:
        return
    for name in FIELDS:
        arrays = arrays_of(replay_buffer, name)
        for array in arrays.values() if isinstance(arrays, dict) else [arrays]:
            array[newest, ended] = array[before, ended]


#: Replay buffers whose draws are alike, so that several batches may be one draw.
UNIFORM_BUFFERS = (ContiguousReplayBuffer, ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)
