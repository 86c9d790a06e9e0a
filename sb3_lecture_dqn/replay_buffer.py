"""The replay buffer D (L11) with each transition in one place of memory, so that drawing a batch is one read a transition."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize


class ContiguousReplayBuffer(ReplayBuffer):
    """
    SB3's ``ReplayBuffer``, with the same arguments, arrays and draws, laid out for sampling.

    SB3 keeps observations, actions, rewards and so on in arrays of their own; a random transition then is five or six reads
    from distant places. Here they are fields of one record array, and ``observations``, ``actions``, … are views of it: they
    can be read, indexed and written into as before, but not replaced by other arrays.

    ``optimize_memory_usage`` is left to SB3's own class.

    The parameters are those of :class:`stable_baselines3.common.buffers.ReplayBuffer`.
    """

    _FIELDS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        arrays = [(name, getattr(self, name)) for name in self._FIELDS]
        record = np.dtype([(name, array.dtype, array.shape[2:]) for name, array in arrays], align=True)
        # SB3's arrays are all zeros still, so the system has not given them any memory yet
        self._records = np.zeros((self.buffer_size, self.n_envs), dtype=record)
        self._make_views()

    def _make_views(self) -> None:
        for name in self._FIELDS:
            setattr(self, name, self._records[name])

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        if self.n_envs > 1:
            batch_inds = batch_inds * self.n_envs + np.random.randint(0, high=self.n_envs, size=len(batch_inds))
        batch = self._records.reshape(-1).take(batch_inds)
        dones = batch["dones"]
        if self.handle_timeout_termination:
            dones = dones * (1 - batch["timeouts"])
        return ReplayBufferSamples(
            observations=self._to_device(_in_one_piece(self._normalize_obs(batch["observations"], env))),
            actions=self._to_device(batch["actions"]),
            next_observations=self._to_device(_in_one_piece(self._normalize_obs(batch["next_observations"], env))),
            dones=self._to_device(dones[:, None]),
            rewards=self._to_device(self._normalize_reward(batch["rewards"][:, None], env)),
        )

    def _to_device(self, array: Any) -> th.Tensor:
        # the batch is a copy already
        return th.from_numpy(array).to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        """Without the views, which a pickle would turn into copies."""
        return {name: value for name, value in self.__dict__.items() if name not in self._FIELDS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_views()


def _in_one_piece(observations: Any) -> Any:
    # the fields of a record lie side by side, and an encoder may want to view its input in another shape
    return np.ascontiguousarray(observations)
