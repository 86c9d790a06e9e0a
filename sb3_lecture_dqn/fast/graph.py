"""
The update and the acting on a GPU: what they do is captured once as a CUDA graph, and replayed.

On a GPU a step of this size is launching some fifty operations, each of which takes the host longer than the GPU. A graph is
launched as a whole. It computes on the same memory each time, so each batch is copied to where the graph looks for it, and
what changes between two steps without being part of a batch (the learning rate, the number of steps) is on the device too.
What is captured is the step of :class:`~sb3_lecture_dqn.fast.update.FastUpdate`, for one batch.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples

from sb3_lecture_dqn.fast.acting import FastActing, to_tensors
from sb3_lecture_dqn.fast.adam import DeviceAdam
from sb3_lecture_dqn.fast.head import forward, gradient_of
from sb3_lecture_dqn.fast.update import MODELESS_MODULES, FastUpdate, StepResults, TargetsOf
from sb3_lecture_dqn.policies import LectureDQNPolicy

Inputs = TypeVar("Inputs")
Results = TypeVar("Results")


def capture(work: Callable[[], Results], device: th.device) -> tuple[Callable[[], None], Results]:
    """
    Record what some work does on a CUDA device, without doing it.

    :param work: The work, which has been done before, so that nothing of it has to be loaded or allocated by CUDA now
    :param device: The device
    :return: What does it, on the same memory each time, and the tensors in which it then leaves its results
    """
    graph, stream = th.cuda.CUDAGraph(), th.cuda.current_stream(device)
    # other threads may do with CUDA what they like
    capturing = th.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local")
    # a capture that fails may leave its stream the current one, if nobody puts the one before back
    with th.cuda.device(device), th.cuda.stream(stream), capturing:
        results = work()
    return graph.replay, results


@cache
def _capture_stream(device: th.device) -> th.cuda.Stream:
    """One for all captures, because cuBLAS keeps memory for each stream."""
    stream: th.cuda.Stream = th.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


@dataclass(frozen=True)
class Captured(Generic[Results]):
    """Work that can be replayed: where it looks for its inputs, and where it leaves its results."""

    inputs: list[th.Tensor]
    replay: Callable[[], None]
    results: Results


class Capturer(Generic[Results]):
    """
    Captures work when it comes for the second time in a row; the first time is done operation by operation, as CUDA needs it.

    :param device: The device
    """

    #: Whether CUDA has captured whatever it was asked to; a capture that fails may leave the process unable to.
    can_capture: ClassVar[bool] = True

    def __init__(self, device: th.device) -> None:
        self.device = device
        self._kind: Hashable = None
        self._captured: Captured[Results] | None = None

    def captured(
        self, kind: Hashable, make_inputs: Callable[[], Inputs], work: Callable[[Inputs], Results]
    ) -> Captured[Results] | None:
        """
        The captured work.

        :param kind: All that it depends on beside the contents of its inputs
        :param make_inputs: Makes inputs of this kind, tensors that stay
        :param work: The work
        :return: What can be replayed; ``None`` if it has to be done operation by operation this time
        """
        if kind != self._kind:
            self._kind, self._captured = kind, None
            return None
        if self._captured is None and self.can_capture:
            inputs = make_inputs()
            try:
                replay, results = capture(lambda: work(inputs), self.device)
            except RuntimeError as error:  # nothing was computed, so it can be done as before
                Capturer.can_capture = False
                reason = error.__context__ or error  # the first of them
                warnings.warn(f"CUDA cannot capture this, which is slower without: {reason}", stacklevel=2)
                return None
            self._captured = Captured(list(named_tensors(inputs).values()), replay, results)
        return self._captured


def named_tensors(value: Any, name: str = "") -> dict[str, th.Tensor]:
    """
    The tensors of a batch or of observations, in an order that does not depend on a dictionary's.

    :param value: A batch, a dictionary, a tensor or ``None``
    :param name: What comes before each name
    :return: The tensors by their names
    """
    if isinstance(value, th.Tensor):
        return {name: value}
    fields = value._asdict() if isinstance(value, ReplayBufferSamples) else value or {}
    named: dict[str, th.Tensor] = {}
    for key in sorted(fields):
        named.update(named_tensors(fields[key], f"{name}.{key}"))
    return named


def map_tensors(function: Callable[[th.Tensor], th.Tensor], value: Any) -> Any:
    """
    A batch or observations with other tensors.

    :param function: Makes a tensor of a tensor
    :param value: A batch, a dictionary, a tensor or ``None``
    :return: The same of what the function gave
    """
    if isinstance(value, ReplayBufferSamples):
        return ReplayBufferSamples(*(map_tensors(function, field) for field in value))
    if isinstance(value, dict):
        return {key: function(part) for key, part in value.items()}
    return None if value is None else function(value)


def has_known_encoder(policy: LectureDQNPolicy) -> bool:
    """
    Whether an encoder is one of SB3's; another one may ask the host for something.

    :param policy: The policy
    :return: Whether all of its encoder's modules are known
    """
    return all(type(module) in MODELESS_MODULES for module in policy.q_net.features_extractor.modules())


class GraphUpdate(FastUpdate):
    """
    The update for one policy on a CUDA device.

    :param policy: As for :class:`~sb3_lecture_dqn.fast.update.FastUpdate`
    :param optimizer: As for :class:`~sb3_lecture_dqn.fast.update.FastUpdate`
    """

    device_type: ClassVar[str] = "cuda"

    adam: DeviceAdam

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam) -> None:
        super().__init__(policy, optimizer)
        self._capturer: Capturer[StepResults] = Capturer(self.theta.device)

    @classmethod
    def for_policy(cls, policy: LectureDQNPolicy) -> FastUpdate | None:
        """
        The fast update of a policy.

        :param policy: The policy
        :return: Its update; ``None`` also for an encoder that we do not know, which may ask the host for something, and for
            an Adam that keeps its step counts on the device
        """
        group = policy.optimizer.param_groups[0]
        has_counts_on_device = bool(group.get("fused") or group.get("capturable"))
        return super().for_policy(policy) if has_known_encoder(policy) and not has_counts_on_device else None

    def _make_adam(self, optimizer: th.optim.Adam) -> DeviceAdam:
        return DeviceAdam(optimizer, self.theta, self.gradient)

    @property
    def may_use_second_thread(self) -> bool:
        """Never: the GPU does the work."""
        return False

    def steps(
        self, samples: ReplayBufferSamples, targets_of: TargetsOf, batch_size: int, max_grad_norm: float | None
    ) -> StepResults:
        """
        Gradient steps as :meth:`FastUpdate.steps` makes them.

        The first steps of a kind are made one operation after the other, as a CUDA graph needs it; the next are captured.

        :param samples: The transitions of all batches, one batch after the other
        :param targets_of: Gives the targets of some of the rows
        :param batch_size: B
        :param max_grad_norm: Largest norm of the gradient; ``None`` for no clipping
        :return: What :func:`~sb3_lecture_dqn.fast.update.metrics_of_results` needs
        """
        samples = _fields_of_a_batch(samples)
        tensors = named_tensors(samples)
        formats = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items())
        kind = (targets_of, batch_size, max_grad_norm, self.adam.constants, formats)

        def steps(inputs: ReplayBufferSamples) -> StepResults:
            return super(GraphUpdate, self).steps(inputs, targets_of, batch_size, max_grad_norm)

        self.adam.begin()
        captured = self._capturer.captured(kind, lambda: map_tensors(lambda part: part[:batch_size].clone(), samples), steps)
        if captured is None:
            results = steps(samples)
        else:
            batches = zip(*(th.split(tensor, batch_size) for tensor in tensors.values()), strict=True)
            results = _replay(captured, samples.actions, batches)
        self.adam.end(len(samples.actions) // batch_size)
        return results

    def _clip(self, squared_norm: th.Tensor, max_grad_norm: float) -> None:
        # as PyTorch's clip_grad_norm_ does it, without asking for the norm
        self.gradient.mul_((max_grad_norm / (squared_norm.sqrt() + 1e-6)).clamp_(max=1))

    def _encoder_gradients(self, features: th.Tensor, features_gradient: th.Tensor) -> None:
        # not into .grad, because the nodes that do that belong to the stream on which they were made
        parameters = list(self.policy.q_net.features_extractor.parameters())
        gradients = th.autograd.grad(features, parameters, features_gradient)
        th._foreach_copy_([gradient_of(parameter) for parameter in parameters], gradients)


def _replay(step: Captured[StepResults], actions: th.Tensor, batches: Iterable[tuple[th.Tensor, ...]]) -> StepResults:
    """The step for each batch; its results are copied, because the next one overwrites them."""
    results = []
    for batch in batches:
        th._foreach_copy_(step.inputs, batch)
        step.replay()
        results.append([part.clone() for (part,) in step.results[1:]])
    return StepResults(actions.to(th.int64, copy=True), *zip(*results, strict=True))


def _fields_of_a_batch(samples: Any) -> ReplayBufferSamples:
    """The fields that an update uses; a buffer of a user's own may have more."""
    return ReplayBufferSamples(*(getattr(samples, name) for name in ReplayBufferSamples._fields))


class GraphActing(FastActing):
    """The greedy policy of a Q network on a CUDA device, encoder and all."""

    device_type: ClassVar[str] = "cuda"

    @classmethod
    def for_policy(cls, policy: LectureDQNPolicy) -> FastActing | None:
        """
        Fast acting for a policy.

        :param policy: The policy
        :return: Its fast acting; ``None`` also for an encoder that we do not know, which may ask the host for something
        """
        return super().for_policy(policy) if has_known_encoder(policy) else None

    def _used_parameters(self) -> list[th.Tensor]:
        return list(self.policy.q_net.parameters())  # the encoder's too

    def _prepare(self) -> None:
        self._capturer: Capturer[th.Tensor] = Capturer(self.parameters[0].device)

    @th.no_grad()
    def greedy_actions(self, observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        π(s) = argmax_a Q(s, a, θ) (L9).

        :param observations: s, shape (n_envs, ...), or such arrays by their names
        :return: Actions, shape (n_envs,)
        """
        observations_here = to_tensors(observations)
        tensors = named_tensors(observations_here)
        kind = tuple((name, tensor.shape) for name, tensor in tensors.items())
        captured = self._capturer.captured(kind, lambda: self._moved(observations_here), self._actions)
        if captured is None:
            return self._actions(self._moved(observations_here)).cpu().numpy()
        for place, tensor in zip(captured.inputs, tensors.values(), strict=True):
            place.copy_(tensor, non_blocking=True)
        captured.replay()
        return captured.results.cpu().numpy()

    def _moved(self, observations: PyTorchObs) -> PyTorchObs:
        moved: PyTorchObs = map_tensors(lambda tensor: tensor.to(self._capturer.device), observations)
        return moved

    def _actions(self, observations: PyTorchObs) -> th.Tensor:
        features = self.policy.q_net.extract_features(observations, self.policy.q_net.features_extractor)
        return forward(self.head, features).argmax(dim=1)
