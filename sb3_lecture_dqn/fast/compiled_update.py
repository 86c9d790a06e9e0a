"""The fast update on the CPU, compiled (:mod:`sb3_lecture_dqn.fast.kernels`)."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn.fast import kernels
from sb3_lecture_dqn.fast.adam import FlatAdam
from sb3_lecture_dqn.fast.compiled_head import CompiledHead, Workspace
from sb3_lecture_dqn.fast.compiling import Use, can_compile
from sb3_lecture_dqn.fast.device_copy import DrawnRows
from sb3_lecture_dqn.fast.second_thread import Task, Work
from sb3_lecture_dqn.fast.stored_transitions import StoredTransitions, Transitions
from sb3_lecture_dqn.fast.update import FastUpdate, StepResults, TargetsOf, metrics_of_results
from sb3_lecture_dqn.policies import LectureDQNPolicy

#: More parameters are work for more threads than the kernels use.
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
        moments = self.first_moment.numpy(), self.second_moment.numpy()
        self._arrays = theta.numpy(), gradient.numpy(), *moments, self.step_counts.numpy()

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
        kernels.adam_step(self.for_kernels())


def metrics_of_calls(results: Sequence[StepResults | np.ndarray]) -> th.Tensor:
    """
    The metrics of training calls, which are there already where all of a step was compiled.

    :param results: What their steps gave
    :return: As of :func:`~sb3_lecture_dqn.fast.update.metrics_of_results`
    """
    parts = []
    for kind, alike in groupby(results, type):
        of_calls: list[Any] = list(alike)
        is_there = kind is np.ndarray
        parts.append(th.from_numpy(np.concatenate(of_calls)).t() if is_there else metrics_of_results(of_calls))
    return parts[0] if len(parts) == 1 else th.cat(parts, dim=1)


class SharedArrays(NamedTuple):
    """What both threads have in common in a training call, and in the next one if its transitions are in the same memory."""

    process_id: int  # a process that was forked has a second thread of its own
    workspaces: tuple[Workspace, ...]
    transitions: Transitions
    # as kernels.gradient_steps has them
    targets: np.ndarray
    metrics: np.ndarray
    presence: np.ndarray
    progress: np.ndarray

    @classmethod
    def of(cls, workspaces: tuple[Workspace, ...], transitions: Transitions, n_updates: int) -> "SharedArrays":
        """
        New ones for the targets and the metrics.

        :param workspaces: Memory for each hidden layer
        :param transitions: Memory for the transitions of all batches
        :param n_updates: Number of batches
        :return: The arrays, with the second thread gone and nothing to do
        """
        targets, metrics = np.empty_like(transitions.rewards), np.empty((n_updates, 4), transitions.rewards.dtype)
        presence, progress = np.full(1, kernels.GONE), np.full((n_updates, len(workspaces)), kernels.DONE)
        return cls(os.getpid(), workspaces, transitions, targets, metrics, presence, progress)

    def are_for(self, workspaces: tuple[Workspace, ...], transitions: Transitions) -> bool:
        """
        Whether they are those of a training call.

        :param workspaces: As for :meth:`of`
        :param transitions: As for :meth:`of`
        :return: Whether the second thread, if it is still there, has all arrays that it needs
        """
        is_same = self.workspaces is workspaces and self.transitions is transitions
        return is_same and self.process_id == os.getpid()


def _help(gradient_steps: Callable[..., None], arguments: tuple[Any, ...], presence: np.ndarray, progress: np.ndarray) -> None:
    try:
        gradient_steps(*arguments)
    except BaseException:  # there is no memory left: the first thread tries it itself, and says so if it fails too
        progress[progress == kernels.CLAIMED_BY_SECOND] = kernels.READY
        raise
    finally:
        presence[0] = kernels.GONE


def _tensors_of(samples: Any, transitions: Transitions | None) -> ReplayBufferSamples:
    """What was drawn, or what was read of it."""
    if transitions is None or not isinstance(samples, DrawnRows):
        return samples  # type: ignore[no-any-return]
    return ReplayBufferSamples(**{name: th.from_numpy(array) for name, array in transitions._asdict().items()})


class CompiledUpdate(FastUpdate):
    """
    The update for one policy on the CPU.

    Behind an encoder, what comes after it is compiled. Work that is large enough for several threads is left to
    :class:`FastUpdate`.

    :param policy: The policy, of whose heads :func:`~sb3_lecture_dqn.fast.compiling.can_compile` holds; its parameters become
        views of flat tensors
    :param optimizer: Its optimizer
    """

    metrics_of: "staticmethod[[Sequence[Any]], th.Tensor]" = staticmethod(metrics_of_calls)

    work_for_second_thread: ClassVar[tuple[Work, ...]] = (Work.NOTHING, Work.GRADIENTS)

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam) -> None:
        super().__init__(policy, optimizer)
        self.compiled_head, self.compiled_target = CompiledHead.of(self.head), CompiledHead.of(self.target_head)
        self.compiled_gradients, self._flat_gradient = CompiledHead.of(self.head_gradients), self.gradient.numpy()
        self._target_q_values = self.compiled_target.for_several()
        self._are_heads_alike = self.compiled_head.shapes == self.compiled_target.shapes
        self._gradient_steps: Callable[..., None] | None = None  # made for the types that it is called with
        self._workspaces: list[tuple[Workspace, ...]] = []  # of either thread
        self._shared: SharedArrays | None = None
        self._task: Task[None] | None = None  # what has the second thread come
        self._transitions: Transitions | None = None  # memory for those that are drawn

    def _make_adam(self, optimizer: th.optim.Adam) -> FlatAdam:
        return (CompiledAdam if self._is_for_one_thread else FlatAdam)(optimizer, self.theta, self.gradient)

    @property
    def _is_for_one_thread(self) -> bool:
        return self.theta.numel() <= MOST_PARAMETERS

    @property
    def kind_of_records(self) -> type[Any] | None:  # type: ignore[override]
        """
        The kind of records in which it reads transitions that were only drawn. That needs observations without encoder and, as
        SB3's preprocessing gives float32, parameters of that type; with others PyTorch says what is wrong.
        """
        return StoredTransitions if self.has_vector_observations and self.theta.dtype == th.float32 else None

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
        gamma = targets_of.gamma
        transitions = self._read(samples, gamma) if isinstance(samples, DrawnRows) else self._arrays_of(samples, gamma)
        if transitions is None or not self._takes(transitions):
            return super().steps(_tensors_of(samples, transitions), targets_of, batch_size, max_grad_norm)
        with self._named_actions(transitions.actions):
            return self._compiled_steps(transitions, batch_size, max_grad_norm)

    def _compiled_steps(self, transitions: Transitions, batch_size: int, max_grad_norm: float | None) -> np.ndarray:
        """Call the kernel, in both threads where the second one is given something; gives the metrics."""
        assert isinstance(self.adam, CompiledAdam)  # _takes has looked
        workspaces, scratch_of_second = self._workspaces_for(batch_size)
        shared = self._shared_for(workspaces, transitions, len(transitions.actions) // batch_size)
        heads = self.compiled_head, self.compiled_target, self.compiled_gradients
        settings = self.adam.for_kernels(), math.inf if max_grad_norm is None else float(max_grad_norm)
        results = shared.targets, shared.metrics
        of_both = *heads, workspaces, *settings, transitions, *results, shared.presence, shared.progress
        if self._gradient_steps is None:
            self._gradient_steps = kernels.entry_of(kernels.gradient_steps, (True, workspaces, *of_both))
        try:
            self._call_second_thread(self._gradient_steps, (False, scratch_of_second, *of_both), shared)
            self._gradient_steps(True, workspaces, *of_both)
        except BaseException:
            shared.progress[:] = kernels.DONE  # so that the second thread does not wait for what never comes
            self._let_go()
            raise
        return shared.metrics.copy()

    def _shared_for(self, workspaces: tuple[Workspace, ...], transitions: Transitions, n_updates: int) -> SharedArrays:
        if self._shared is None or not self._shared.are_for(workspaces, transitions):
            self._let_go()
            self._shared = SharedArrays.of(workspaces, transitions, n_updates)
        return self._shared

    def _let_go(self) -> None:
        """These arrays are not used again."""
        if self._shared is not None:
            self._dismiss(self._shared)
        self._shared = None

    def _dismiss(self, shared: SharedArrays) -> None:
        """The second thread need not stay for these arrays, nor come for them if it has not yet."""
        shared.presence[0] = kernels.GONE
        if self._task is not None:
            self._task.withdraw()
        self._task = None

    def _call_second_thread(
        self, gradient_steps: Callable[..., None], arguments: tuple[Any, ...], shared: SharedArrays
    ) -> None:
        """Have it help, if it is to be given something and is not still there."""
        if not self.second_thread.is_given(Work.GRADIENTS):
            self._dismiss(shared)
        elif shared.presence[0] == kernels.GONE:
            # who leaves just now may still write GONE behind this, which costs a call's help
            shared.presence[0] = kernels.HERE
            help_with_it = partial(_help, gradient_steps, arguments, shared.presence, shared.progress)
            leave = partial(shared.presence.fill, kernels.GONE)
            self._task = self.second_thread.start(help_with_it, Work.GRADIENTS, leave)

    def _read(self, drawn: DrawnRows, gamma: float) -> Transitions:
        stored, n_rows = drawn.records, len(drawn.indices)
        assert isinstance(stored, StoredTransitions)  # see kind_of_records
        if self._transitions is None or len(self._transitions.actions) != n_rows:
            self._transitions = Transitions.empty(n_rows, stored.n_features, self._flat_gradient.dtype)
        kernels.read_transitions(stored, drawn.indices, self._transitions)
        self._transitions.discounts.fill(gamma)
        return self._transitions

    def _arrays_of(self, samples: ReplayBufferSamples, gamma: float) -> Transitions | None:
        """Transitions of the parameters' type, where there is no encoder."""
        if self.kind_of_records is None:
            return None
        tensors = samples.observations, samples.next_observations, samples.dones, samples.rewards
        observations, next_observations, dones, rewards = map(self._array_of, tensors)
        discounts = np.full_like(rewards, gamma) if samples.discounts is None else self._array_of(samples.discounts)
        actions = samples.actions.long().contiguous().numpy()
        return Transitions(observations, actions, next_observations, dones, rewards, discounts)

    def _array_of(self, tensor: th.Tensor) -> np.ndarray:
        return tensor.to(self.theta.dtype).contiguous().numpy()

    def _takes(self, transitions: Transitions) -> bool:
        """Whether the kernels, which look at nothing, compute all of a step on these transitions."""
        observations, actions, next_observations, *others = transitions
        has_one_of_each = all(array.shape == (len(observations), 1) for array in (actions, *others))
        has_one_of_each = has_one_of_each and len(next_observations) == len(observations)
        if not self._are_heads_alike or not isinstance(self.adam, CompiledAdam) or not has_one_of_each:
            return False
        return self.compiled_head.takes(observations) and self.compiled_target.takes(next_observations)

    @contextmanager
    def _named_actions(self, actions: np.ndarray) -> Iterator[None]:
        try:
            yield
        except IndexError:
            n_actions = len(self.compiled_head.final_bias)
            wrong = actions[(actions < 0) | (actions >= n_actions)][0]
            raise RuntimeError(f"actions of a batch must be in 0 to {n_actions - 1}, got {wrong}") from None

    def _q_values(self, features: th.Tensor) -> th.Tensor:
        if not self.compiled_target.takes(features):
            return super()._q_values(features)
        return th.from_numpy(self._target_q_values(features.numpy()))

    def _selections(self, actions: th.Tensor, batch_size: int) -> th.Tensor:
        """The actions themselves: a kernel looks for their Q values."""
        return actions

    def _head_gradients_of(
        self, features: th.Tensor, selection: th.Tensor, batch_targets: Callable[[], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        targets = batch_targets()
        is_for_kernels = self._is_head_compiled and self.compiled_head.takes(features) and len(features) == len(selection)
        if not is_for_kernels or targets.shape != selection.shape or targets.dtype != features.dtype:
            return super()._head_gradients_of(features, super()._selections(selection, selection.size(0)), lambda: targets)
        features_gradient = th.empty_like(features) if self.has_trained_encoder else features[:0]
        q_values = features.new_empty(len(features), len(self.compiled_head.final_bias))
        of_theta = self.compiled_head, self.compiled_gradients, self._workspaces_for(len(features))[0]
        tensors = features.contiguous(), selection, targets.contiguous(), q_values, features_gradient
        with self._named_actions(selection.numpy()):
            kernels.squared_td_error_gradients(*of_theta, *map(th.Tensor.numpy, tensors))
        return q_values, targets, features_gradient if self.has_trained_encoder else None

    @cached_property
    def _is_head_compiled(self) -> bool:
        """Behind an encoder it is; otherwise it is not needed but for batches of another form."""
        return can_compile(self.head, Use.HEAD)

    def _workspaces_for(self, n_rows: int) -> list[tuple[Workspace, ...]]:
        if not self._workspaces or len(self._workspaces[0][0].means) != n_rows:
            self._workspaces = [self.compiled_head.workspaces(n_rows) for _ in range(2)]
        return self._workspaces

    def _squared_norm(self) -> th.Tensor:
        if not self._is_for_one_thread:
            return super()._squared_norm()
        return th.from_numpy(np.array(kernels.squared_norm(self._flat_gradient), self._flat_gradient.dtype))
