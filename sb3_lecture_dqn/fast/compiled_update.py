"""The fast update on the CPU, compiled (:mod:`sb3_lecture_dqn.fast.kernels`)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn.fast import kernels
from sb3_lecture_dqn.fast.adam import FlatAdam
from sb3_lecture_dqn.fast.compiled_head import CompiledHead, Workspace
from sb3_lecture_dqn.fast.device_copy import DrawnRows
from sb3_lecture_dqn.fast.second_thread import Work
from sb3_lecture_dqn.fast.update import FastUpdate, StepResults, TargetsOf, metrics_of_results
from sb3_lecture_dqn.policies import LectureDQNPolicy

#: More parameters are work for several threads, which the kernels do not use.
MOST_PARAMETERS = 2**20


class CompiledAdam(FlatAdam):
    """
    The same as :class:`FlatAdam`, by a kernel of ours.

    :param optimizer: As for :class:`FlatAdam`
    :param theta: As for :class:`FlatAdam`
    :param gradient: As for :class:`FlatAdam`
    """

    def __init__(self, optimizer: th.optim.Adam, theta: th.Tensor, gradient: th.Tensor) -> None:
        super().__init__(optimizer, theta, gradient)
        self._arrays = (theta.numpy(), gradient.numpy(), self.first_moment.numpy(), self.second_moment.numpy())

    def for_kernels(self) -> kernels.AdamArguments:
        """
        What the kernels have to know, with the present settings.

        :return: Adam's arrays and settings
        """
        group = self.optimizer.param_groups[0]
        beta_1, beta_2 = group["betas"]
        settings = float(group["lr"]), (float(beta_1), float(beta_2)), float(group["eps"])
        return kernels.AdamArguments(*self._arrays, *settings)

    def step(self) -> None:
        """One step of Adam."""
        self.step_counts += 1
        kernels.adam_step(self.for_kernels(), int(self.step_count))


def metrics_of_calls(results: Sequence[StepResults | np.ndarray]) -> tuple[th.Tensor, ...]:
    """
    The metrics of training calls, which are there already where all of a step was compiled.

    :param results: What their steps gave
    :return: As of :func:`~sb3_lecture_dqn.fast.update.metrics_of_results`
    """
    parts: list[Sequence[th.Tensor]] = []
    for kind, alike in groupby(results, type):
        of_calls: list[Any] = list(alike)
        is_there = kind is np.ndarray
        parts.append(th.from_numpy(np.concatenate(of_calls)).unbind(dim=1) if is_there else metrics_of_results(of_calls))
    return tuple(map(th.cat, zip(*parts, strict=True)))


class CompiledUpdate(FastUpdate):
    """
    The update for one policy on the CPU.

    Behind an encoder, what comes after it is compiled. Work that is large enough for several threads is left to
    :class:`FastUpdate`.

    :param policy: The policy, of whose heads :func:`~sb3_lecture_dqn.fast.compiling.can_compile` holds; its parameters become
        views of flat tensors
    :param optimizer: Its optimizer
    """

    metrics_of: "staticmethod[[Sequence[Any]], Sequence[th.Tensor]]" = staticmethod(metrics_of_calls)

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam) -> None:
        super().__init__(policy, optimizer)
        self.compiled_head, self.compiled_target = CompiledHead.of(self.head), CompiledHead.of(self.target_head)
        self.compiled_gradients, self._flat_gradient = CompiledHead.of(self.head_gradients), self.gradient.numpy()
        self._workspaces: tuple[Workspace, ...] = ()

    def _make_adam(self, optimizer: th.optim.Adam) -> FlatAdam:
        return (CompiledAdam if self._is_for_one_thread else FlatAdam)(optimizer, self.theta, self.gradient)

    @property
    def _is_for_one_thread(self) -> bool:
        return self.theta.numel() <= MOST_PARAMETERS

    def steps(
        self, samples: ReplayBufferSamples | DrawnRows, targets_of: TargetsOf, batch_size: int, max_grad_norm: float | None
    ) -> Any:
        """
        Gradient steps as :meth:`FastUpdate.steps` makes them; all of a step in one call where there is no encoder.

        :param samples: As for :meth:`FastUpdate.steps`
        :param targets_of: As for :meth:`FastUpdate.steps`
        :param batch_size: As for :meth:`FastUpdate.steps`
        :param max_grad_norm: As for :meth:`FastUpdate.steps`
        :return: What :meth:`metrics_of` needs
        """
        if isinstance(samples, DrawnRows) or not self._takes(samples):
            return super().steps(samples, targets_of, batch_size, max_grad_norm)
        actions = samples.actions.long().contiguous().numpy()
        observations, next_observations, rewards, dones = (
            tensor.to(self.theta.dtype).contiguous().numpy()
            for tensor in (samples.observations, samples.next_observations, samples.rewards, samples.dones)
        )
        of_next = partial(kernels.td_targets, self.compiled_target, next_observations, rewards, dones, targets_of.gamma)
        parts = self._parts(len(actions) // batch_size, batch_size)
        tasks = self.second_thread.in_advance([partial(of_next, part.start, part.stop) for part in parts], Work.TARGETS)
        metrics = np.empty((len(actions) // batch_size, 4), self._flat_gradient.dtype)
        for part, task in zip(parts, tasks, strict=True):
            of_part = slice(part.start // batch_size, part.stop // batch_size)
            transitions = observations[part], actions[part], task.result()
            self._compiled_steps(*transitions, math.inf if max_grad_norm is None else max_grad_norm, metrics[of_part])
        return metrics

    def _takes(self, samples: ReplayBufferSamples) -> bool:
        """Whether the kernels, which look at nothing, compute all of a step on these transitions."""
        if not self.has_vector_observations or not isinstance(self.adam, CompiledAdam) or samples.discounts is not None:
            return False
        observations, next_observations, shape = samples.observations, samples.next_observations, samples.actions.shape
        if not shape == samples.rewards.shape == samples.dones.shape == (len(observations), 1):
            return False
        return self.compiled_head.takes(observations.float()) and self.compiled_target.takes(next_observations.float())

    def _compiled_steps(
        self, features: np.ndarray, actions: np.ndarray, targets: np.ndarray, max_grad_norm: float, metrics: np.ndarray
    ) -> None:
        assert isinstance(self.adam, CompiledAdam)  # _takes has looked
        workspaces = self._workspaces_for(len(actions) // len(metrics))
        with self._named_actions(actions):
            of_theta, of_adam = (self.compiled_head, self.compiled_gradients, workspaces), self.adam.for_kernels()
            count = int(self.adam.step_count) + 1
            kernels.gradient_steps(*of_theta, of_adam, count, max_grad_norm, features, actions, targets, metrics)
        self.adam.step_counts += len(metrics)

    @contextmanager
    def _named_actions(self, actions: np.ndarray) -> Iterator[None]:
        try:
            yield
        except IndexError:
            n_actions = len(self.compiled_head.final_bias)
            wrong = actions[(actions < 0) | (actions >= n_actions)][0]
            raise RuntimeError(f"actions of a batch must be in 0 to {n_actions - 1}, got {wrong}") from None

    def _q_values(self, features: th.Tensor) -> th.Tensor:
        takes_them = self.compiled_target.takes(features)
        return self.compiled_target.q_values(features) if takes_them else super()._q_values(features)

    def _selections(self, actions: th.Tensor, batch_size: int) -> th.Tensor:
        """The actions themselves: a kernel looks for their Q values."""
        return actions

    def _head_gradients_of(
        self, features: th.Tensor, selection: th.Tensor, batch_targets: Callable[[], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        targets = batch_targets()
        is_for_kernels = self.compiled_head.takes(features) and len(features) == len(selection)
        if not is_for_kernels or targets.shape != selection.shape or targets.dtype != features.dtype:
            return super()._head_gradients_of(features, super()._selections(selection, selection.size(0)), lambda: targets)
        features_gradient = th.empty_like(features) if self.has_trained_encoder else features[:0]
        q_values = features.new_empty(len(features), len(self.compiled_head.final_bias))
        of_theta = self.compiled_head, self.compiled_gradients, self._workspaces_for(len(features))
        tensors = features.contiguous(), selection, targets.contiguous(), q_values, features_gradient
        with self._named_actions(selection.numpy()):
            kernels.squared_td_error_gradients(*of_theta, *map(th.Tensor.numpy, tensors))
        return q_values, targets, features_gradient if self.has_trained_encoder else None

    def _workspaces_for(self, n_rows: int) -> tuple[Workspace, ...]:
        if not self._workspaces or len(self._workspaces[0].means) != n_rows:
            self._workspaces = self.compiled_head.workspaces(n_rows)
        return self._workspaces

    def _squared_norm(self) -> th.Tensor:
        if not self._is_for_one_thread:
            return super()._squared_norm()
        return th.from_numpy(np.array(kernels.squared_norm(self._flat_gradient), self._flat_gradient.dtype))
