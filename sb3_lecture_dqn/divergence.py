"""
Noticing that training has diverged, and saying what, where and since when.

The training metrics are read from the device every ``metrics_interval`` gradient steps anyway; only these few numbers, and the
transitions that are new, are looked at. The rest is searched once something is wrong.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_lecture_dqn.replay_buffer import UNIFORM_BUFFERS, arrays_of

if TYPE_CHECKING:
    from sb3_lecture_dqn.lecture_dqn import LectureDQN

#: Q explodes when it is this many times what the rewards allow, max |r| / (1 − γ).
EXPLOSION_FACTOR = 100.0
#: Stands for 1 / (1 − γ) where γ is 1, or nearly.
LONGEST_HORIZON = 100_000.0

_OBSERVATION_CAUSES = "a division by zero or an unbounded state in the environment; wrap it in SB3's VecCheckNan to see which"
_REWARD_CAUSES = "a division by zero or a logarithm of zero in the reward"
_LOSS_CAUSES = (
    "a learning_rate too high, rewards too large (VecNormalize scales them), or a target network that follows too fast "
    "(target_update_interval, tau)"
)


class DivergenceError(ValueError):
    """
    Training has diverged: going on would be a waste.

    It is a ``ValueError`` because rl_zoo3 prunes a trial that raises one.
    """


class DivergenceWatch:
    """
    Looks at what training gives anyway, and raises :class:`DivergenceError` when that cannot be right.

    :param is_trained: Whether Q was trained before, maybe on rewards that the replay buffer does not hold
    """

    def __init__(self, is_trained: bool = False) -> None:
        self._last_pos = self._last_num_timesteps = 0
        self._largest_reward = 1.0
        #: Gradient steps when metrics were last looked at; ``None`` as long as they were not.
        self._last_n_updates: int | None = None
        #: The size of Q that the training began with; ``None`` as long as it is not known.
        self._first_size = None if is_trained else 0.0

    def check(self, model: "LectureDQN", metrics: Mapping[str, float]) -> None:
        """
        Check what is new since the last call.

        :param model: The model
        :param metrics: The means of the training metrics since the last call, which may be none
        :raises DivergenceError: if a number is not finite, or Q is beyond what the rewards allow
        """
        self._check_new_transitions(model)
        for name, mean in metrics.items():
            if not math.isfinite(mean):
                raise DivergenceError(self._explain_metric(model, name, mean))
        if metrics:
            self._check_size(model, metrics)
            self._last_n_updates = model._n_updates

    def count_from_zero(self) -> None:
        """The model's number of steps begins at 0 again; what the buffer held before is not new."""
        self._last_num_timesteps = 0

    def _check_new_transitions(self, model: "LectureDQN") -> None:
        replay_buffer = model.__dict__.get("replay_buffer")
        if not isinstance(replay_buffer, ReplayBuffer):
            return
        size, pos = replay_buffer.buffer_size, replay_buffer.pos
        rows_added = (model.num_timesteps - self._last_num_timesteps) // replay_buffer.n_envs
        is_all_new = rows_added < 0 or rows_added >= size or self._last_pos >= size
        n_new = replay_buffer.size() if is_all_new else (pos - self._last_pos) % size
        self._last_pos, self._last_num_timesteps = pos, model.num_timesteps
        if n_new == 0:
            return
        # views where they lie in one piece; indices below 0 count from the ring's end
        rows = slice(pos - n_new, pos) if n_new <= pos else np.arange(pos - n_new, pos)
        as_float32 = _sees_float32(model)
        for name, array_name, causes in (
            ("rewards", "rewards", _REWARD_CAUSES),
            ("observations", "next_observations", _OBSERVATION_CAUSES),
            ("observations", "observations", _OBSERVATION_CAUSES),
        ):
            first_bad = _first_row_not_finite(arrays_of(replay_buffer, array_name), rows, as_float32)
            if first_bad is not None:
                step = model.num_timesteps - (n_new - first_bad - 1) * replay_buffer.n_envs
                raise DivergenceError(
                    f"training has diverged: {name} of the environment are not finite since step {step}; the usual cause is "
                    f"{causes}"
                )

    def _check_size(self, model: "LectureDQN", metrics: Mapping[str, float]) -> None:
        seen = max(abs(metrics["q_values"]), abs(metrics["td_target"]), math.sqrt(max(metrics["loss"], 0.0)))
        if self._first_size is None:
            self._first_size = seen
        horizon = min(1 / max(1 - model.gamma, 1e-12), LONGEST_HORIZON)
        if seen <= EXPLOSION_FACTOR * self._largest_reward * horizon:
            return
        self._largest_reward = max(self._largest_reward, _largest_reward(model))
        allowed = max(self._largest_reward * horizon, self._first_size)
        if seen > EXPLOSION_FACTOR * allowed:
            raise DivergenceError(
                f"training has diverged: Q explodes, its size is {seen:.3g} at step {model.num_timesteps} (gradient step "
                f"{model._n_updates}) where the rewards allow {allowed:.3g}; the usual cause is {_LOSS_CAUSES}"
            )

    def _explain_metric(self, model: "LectureDQN", name: str, mean: float) -> str:
        since = max(model._n_updates - model.metrics_interval, 0) if self._last_n_updates is None else self._last_n_updates
        # a buffer that stores each observation once drops the last one of an episode
        exclusion = "" if model.optimize_memory_usage else "rewards and observations are finite, so "
        return (
            f"training has diverged: the {name} is {mean} at step {model.num_timesteps}, since a gradient step between "
            f"{since} and {model._n_updates}; {exclusion}the usual cause is {_LOSS_CAUSES}"
        )


def check_parameters(model: "LectureDQN") -> None:
    """
    Check θ and ψ.

    :param model: The model
    :raises DivergenceError: if one of them is not finite
    """
    parameters = {name: value for name, value in model.policy.state_dict().items() if value.is_floating_point()}
    if math.isfinite(th.nn.utils.get_total_norm(parameters.values())):
        return
    for name, parameter in parameters.items():  # finite numbers may have an infinite norm
        if not bool(th.isfinite(parameter).all()):
            raise DivergenceError(
                f"training has diverged: the parameter {name} is not finite at step {model.num_timesteps}, after "
                f"{model._n_updates} gradient steps; the usual cause is {_LOSS_CAUSES}"
            )


def _sees_float32(model: "LectureDQN") -> bool:
    """Whether the network's float32 is the first to hold an observation, and not VecNormalize's float64."""
    vec_normalize = model.get_vec_normalize_env()
    return vec_normalize is None or not vec_normalize.norm_obs


def _first_row_not_finite(arrays: Any, rows: slice | np.ndarray, as_float32: bool) -> int | None:
    """Index in ``rows`` of the first that holds a number that is not finite, or is beyond float32."""
    found = []
    for array in arrays.values() if isinstance(arrays, dict) else [arrays]:
        if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
            continue  # a buffer of a user's own may hold anything
        values = array[rows]
        if as_float32 and values.dtype != np.float32:
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        are_finite = np.isfinite(values)
        if not are_finite.all():
            found.append(int(np.flatnonzero(~are_finite.reshape(len(values), -1).all(axis=1))[0]))
    return min(found, default=None)


def _largest_reward(model: "LectureDQN") -> float:
    """The largest absolute reward that the update may see; infinite if only the buffer knows, a user's own or HER's."""
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None and vec_normalize.norm_reward:
        return float(vec_normalize.clip_reward)
    replay_buffer = model.replay_buffer
    if replay_buffer is None or type(replay_buffer) not in UNIFORM_BUFFERS:
        return math.inf
    return float(np.abs(arrays_of(replay_buffer, "rewards")[: replay_buffer.size()]).max(initial=0.0))
