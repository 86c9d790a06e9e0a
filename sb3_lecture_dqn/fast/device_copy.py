"""A copy of the replay buffer's arrays on a GPU, so that drawing a batch moves nothing but its indices there."""

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn.fast.stored_transitions import StoredTransitions

if TYPE_CHECKING:
    from sb3_lecture_dqn.replay_buffer import ContiguousReplayBuffer

#: Types that PyTorch has operations for on every device.
COPYABLE_TYPES = ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")


def is_cuda(device: th.device) -> bool:
    """
    Whether a device is a CUDA device: only for these D is copied and convolutions are laid out.

    :param device: The device
    :return: Whether it is
    """
    return device.type == "cuda"


def free_memory(device: th.device) -> int:
    """
    The memory that can be had: what nobody has taken, and what PyTorch has taken and does not use.

    :param device: A CUDA device
    :return: Bytes
    """
    return th.cuda.mem_get_info(device)[0] + th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)


def dones_of(batch: Any, handle_timeout_termination: bool) -> Any:
    """
    d of transitions.

    :param batch: Arrays or tensors by the fields' names
    :param handle_timeout_termination: Whether d is 0 where a time limit was all that ended an episode
    :return: d, shape (B,)
    """
    return batch["dones"] * (1 - batch["timeouts"]) if handle_timeout_termination else batch["dones"]


class CopiedRecords:
    """
    The records of a replay buffer on a device, as integers that are as large as their bytes allow: one read for many bytes.

    Two are equal if they are the same one, since a graph reads from its memory.

    :param words: The integers, shape (number of records, n)
    :param record: The type of a record
    :param handle_timeout_termination: Whether d is 0 where a time limit was all that ended an episode
    """

    def __init__(self, words: th.Tensor, record: np.dtype[Any], handle_timeout_termination: bool) -> None:
        self.words, self.record, self.handle_timeout_termination = words, record, handle_timeout_termination
        self._layout = _layout_of(record)

    def samples(self, indices: th.Tensor) -> ReplayBufferSamples:
        """
        Some of the transitions.

        :param indices: Which ones, on the device, shape (B,)
        :return: These, each tensor in one piece, which an encoder may need
        """
        of_bytes = self.words.index_select(0, indices).view(th.uint8)
        fields = {
            name: of_bytes[:, part].view(dtype).view(len(indices), *shape)
            for name, (part, dtype, shape) in self._layout.items()
        }
        return ReplayBufferSamples(
            observations=fields["observations"].contiguous(),
            actions=fields["actions"].contiguous(),
            next_observations=fields["next_observations"].contiguous(),
            dones=dones_of(fields, self.handle_timeout_termination).contiguous()[:, None],
            rewards=fields["rewards"].contiguous()[:, None],
        )


class DrawnRows(NamedTuple):
    """Transitions that were drawn and not yet read: which rows of what."""

    indices: np.ndarray
    records: CopiedRecords | StoredTransitions


class DeviceCopy:
    """
    What a device has of a ``ContiguousReplayBuffer``, whose arrays are views of its records.

    They are the user's too, who may write into them at any time. Whether somebody else has one of them is known from the
    number of references: a view of an array, or a tensor on its memory, is one.
    """

    #: Share of the device's free memory that the copy may take; networks and their activations need the rest.
    largest_share: ClassVar[float] = 0.5

    def __init__(self) -> None:
        #: Whether somebody has had an array since the last draw, and may have written into it.
        self.is_seen = False
        #: How many of the newest rows the copy lacks; infinite for all.
        self.n_new_rows = math.inf
        self._device: th.device | None = None
        self._copied: CopiedRecords | None = None
        self._own_references = 0

    def records(self, replay_buffer: "ContiguousReplayBuffer") -> CopiedRecords | None:
        """
        The copy, which takes over what is new before that.

        :param replay_buffer: The buffer
        :return: The copy; ``None`` where somebody may have written into the arrays since, or the device has no room
        """
        if self._device != replay_buffer.device:
            self._begin(replay_buffer)
        if self._copied is None:
            return None
        if self.is_seen or _references(vars(replay_buffer)) > self._own_references:
            self.is_seen, self.n_new_rows = False, math.inf
            return None
        if replay_buffer.handle_timeout_termination != self._copied.handle_timeout_termination:
            self._copied = CopiedRecords(self._copied.words, self._copied.record, replay_buffer.handle_timeout_termination)
        self._follow(replay_buffer, self._copied.words)
        return self._copied

    def _begin(self, replay_buffer: "ContiguousReplayBuffer") -> None:
        records = replay_buffer._records
        self._device, self.n_new_rows = replay_buffer.device, math.inf
        words = _allocate(_words(records), self._device, self.largest_share) if _is_copyable(records.dtype) else None
        handle_timeouts = replay_buffer.handle_timeout_termination
        self._copied = None if words is None else CopiedRecords(words, records.dtype, handle_timeouts)
        self._own_references = _references(_alike(records.dtype))

    def _follow(self, replay_buffer: "ContiguousReplayBuffer", words: th.Tensor) -> None:
        end, size = replay_buffer.pos, replay_buffer.buffer_size
        start = end - int(min(self.n_new_rows, replay_buffer.size()))
        self._write(replay_buffer, words, max(start, 0), end)
        if start < 0:  # they begin at the end of the ring
            self._write(replay_buffer, words, start + size, size)
        self.n_new_rows = 0

    def _write(self, replay_buffer: "ContiguousReplayBuffer", words: th.Tensor, start: int, end: int) -> None:
        """Take over the rows from ``start`` to before ``end``, of all environments."""
        rows = slice(start * replay_buffer.n_envs, end * replay_buffer.n_envs)
        # CUDA has read what is not in pinned memory when this returns
        words[rows].copy_(th.from_numpy(_words(replay_buffer._records)[rows]), non_blocking=True)


def _words(records: np.ndarray) -> np.ndarray:
    """The bytes of records as integers, shape (number of records, n)."""
    n_bytes = math.gcd(records.dtype.itemsize, 8)
    return records.reshape(-1).view(f"i{n_bytes}").reshape(records.size, -1)


def _layout_of(record: np.dtype[Any]) -> dict[str, tuple[slice, th.dtype, tuple[int, ...]]]:
    """Of each field, where in a record's bytes it is, its type and its shape."""
    fields = {name: (dtype, offset) for name, (dtype, offset, *_) in (record.fields or {}).items()}
    return {
        name: (slice(offset, offset + dtype.itemsize), _torch_type(dtype.base), dtype.shape)
        for name, (dtype, offset) in fields.items()
    }


def _references(attributes: Mapping[str, Any]) -> int:
    """The number of references to the record array that is an attribute, and to its views that are others."""
    owner = _owner(attributes["_records"])
    return sys.getrefcount(owner) + sum(sys.getrefcount(attributes[name]) for name in attributes["_records"].dtype.names)


def _alike(record: np.dtype[Any]) -> dict[str, np.ndarray]:
    """Such arrays, which nobody else has."""
    records = np.zeros(1, record)
    return {"_records": records, **{name: records[name] for name in record.names or ()}}


def _owner(records: np.ndarray) -> np.ndarray:
    """The array that numpy makes the base of views; a pickle's is a view already."""
    return records.base if isinstance(records.base, np.ndarray) else records


def _is_copyable(record: np.dtype[Any]) -> bool:
    """Whether PyTorch has all fields' types."""
    return all(record[name].base.name in COPYABLE_TYPES for name in record.names or ())


def _allocate(words: np.ndarray, device: th.device, largest_share: float) -> th.Tensor | None:
    """Zeros in the shape of the words; nothing where the device has no room."""
    if words.nbytes > largest_share * free_memory(device):
        return None
    try:
        return th.zeros(words.shape, dtype=_torch_type(words.dtype), device=device)
    except th.OutOfMemoryError:  # what is free may be in pieces, or not for this process
        return None


def _torch_type(dtype: np.dtype[Any]) -> th.dtype:
    return th.from_numpy(np.zeros(0, dtype)).dtype
