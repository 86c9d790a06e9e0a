"""The records of a ``ContiguousReplayBuffer`` on the CPU as the kernels read them."""

from typing import Any, NamedTuple

import numpy as np

#: What the kernels can read of a record, beside the observations: the fields, and what they are made of.
READABLE_FIELDS = {
    "actions": (np.dtype(np.int64), (1,)),
    "rewards": (np.dtype(np.float32), ()),
    "dones": (np.dtype(np.float32), ()),
    "timeouts": (np.dtype(np.float32), ()),
}


def readable_record(n_features: int) -> np.dtype[Any]:
    """
    A record that the kernels can read.

    :param n_features: Length of an observation
    :return: Its type
    """
    observations = [(name, np.dtype(np.float32), (n_features,)) for name in ("observations", "next_observations")]
    return np.dtype([*observations, *((name, *kind) for name, kind in READABLE_FIELDS.items())], align=True)


class StoredTransitions(NamedTuple):
    """All transitions in a replay buffer."""

    numbers: np.ndarray  # each record as float32, whatever it holds, shape (number of records, n)
    actions: np.ndarray  # a, shape (number of records, 1), in any layout
    n_features: int  # length of an observation
    observations: int  # where in a record's numbers s begins,
    next_observations: int  # s',
    rewards: int  # where r is,
    dones: int  # d,
    timeouts: int  # and whether a time limit ended the episode
    handle_timeout_termination: bool  # whether d is 0 where that was all

    @classmethod
    def of(cls, records: np.ndarray, handle_timeout_termination: bool) -> "StoredTransitions | None":
        """
        Views of a buffer's records.

        :param records: Its record array
        :param handle_timeout_termination: As of the buffer
        :return: The views; ``None`` for other observations than vectors of float32, and for other actions than int64
        """
        fields: dict[str, Any] = dict(records.dtype.fields or {})
        observations = fields["observations"][0]
        if observations.base != np.float32 or len(observations.shape) != 1 or fields["next_observations"][0] != observations:
            return None
        if any((fields[name][0].base, fields[name][0].shape) != kind for name, kind in READABLE_FIELDS.items()):
            return None
        flat = records.reshape(-1)
        numbers = flat.view(np.float32).reshape(len(flat), -1)  # int64 makes their size a multiple of eight bytes
        names = ("observations", "next_observations", "rewards", "dones", "timeouts")
        places = {name: fields[name][1] // 4 for name in names}
        (n_features,) = observations.shape
        return cls(numbers, flat["actions"], n_features, **places, handle_timeout_termination=handle_timeout_termination)


class Transitions(NamedTuple):
    """Some transitions, each array in one piece."""

    observations: np.ndarray  # s, shape (B, n)
    actions: np.ndarray  # a, shape (B, 1)
    next_observations: np.ndarray  # s', shape (B, n)
    dones: np.ndarray  # d, shape (B, 1)
    rewards: np.ndarray  # r, shape (B, 1)
    discounts: np.ndarray  # γ, or with n-step returns γⁿ of each, shape (B, 1)

    @classmethod
    def empty(cls, n_rows: int, n_features: int, dtype: Any) -> "Transitions":
        """
        Memory for some transitions.

        :param n_rows: B
        :param n_features: n
        :param dtype: The type of all but the actions
        :return: The memory
        """
        observations, next_observations = (np.empty((n_rows, n_features), dtype) for _ in range(2))
        dones, rewards, discounts = (np.empty((n_rows, 1), dtype) for _ in range(3))
        return cls(observations, np.empty((n_rows, 1), np.int64), next_observations, dones, rewards, discounts)
