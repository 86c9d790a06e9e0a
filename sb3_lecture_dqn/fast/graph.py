"""
The update on a GPU: a gradient step is captured once as a CUDA graph, and replayed.

On a GPU a step of this size is launching some forty operations, each of which takes the host longer than the GPU. A graph is
launched as a whole. It computes on the same memory each time, so each batch is copied to where the graph looks for it, and
what changes between two steps without being part of a batch (the learning rate, the number of steps) is on the device too.
What is captured is the step of :class:`~sb3_lecture_dqn.fast.update.FastUpdate`, for one batch.
"""

import warnings
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn.fast.adam import DeviceAdam
from sb3_lecture_dqn.fast.head import gradient_of
from sb3_lecture_dqn.fast.update import MODELESS_MODULES, FastUpdate, StepResults, TargetsOf
from sb3_lecture_dqn.policies import LectureDQNPolicy

T = TypeVar("T")


def capture(work: Callable[[], T], device: th.device) -> tuple[Callable[[], None], T]:
    """
    Record what some work does on a CUDA device, without doing it.

    :param work: The work, which has been done before, so that nothing of it has to be loaded or allocated by CUDA now
    :param device: The device
    :return: What does it, on the same memory each time, and the tensors in which it then leaves its results
    """
    graph, stream = th.cuda.CUDAGraph(), th.cuda.current_stream(device)
    # a capture that fails may leave its stream the current one, if nobody puts the one before back
    with th.cuda.device(device), th.cuda.stream(stream), th.cuda.graph(graph, stream=_capture_stream(device)):
        results = work()
    return graph.replay, results


@cache
def _capture_stream(device: th.device) -> th.cuda.Stream:
    """One for all captures, because cuBLAS keeps memory for each stream."""
    stream: th.cuda.Stream = th.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


class CapturedStep(NamedTuple):
    """A gradient step that can be replayed: where it looks for its batch, and where it leaves its results."""

    inputs: list[th.Tensor]
    replay: Callable[[], None]
    results: StepResults


class GraphUpdate(FastUpdate):
    """
    The update for one policy on a CUDA device.

    :param policy: As for :class:`~sb3_lecture_dqn.fast.update.FastUpdate`
    :param optimizer: As for :class:`~sb3_lecture_dqn.fast.update.FastUpdate`
    """

    device_type: ClassVar[str] = "cuda"
    #: Whether CUDA has captured whatever it was asked to; a capture that fails may leave the process unable to.
    can_capture: ClassVar[bool] = True

    adam: DeviceAdam

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam) -> None:
        super().__init__(policy, optimizer)
        self._kind: Hashable = None
        self._captured: CapturedStep | None = None

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
        is_known = all(type(module) in MODELESS_MODULES for module in policy.q_net.features_extractor.modules())
        return super().for_policy(policy) if is_known and not has_counts_on_device else None

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
        n_updates = len(samples.actions) // batch_size
        samples = _fields_of_a_batch(samples)
        formats = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in _named_tensors_of(samples))
        kind = (targets_of, batch_size, max_grad_norm, self.adam.constants, formats)
        self.adam.begin()
        if kind == self._kind and self._captured is None and self.can_capture:
            self._captured = self._capture(samples, targets_of, batch_size, max_grad_norm)
        if kind == self._kind and self._captured is not None:
            results = _replay(self._captured, samples, batch_size)
        else:
            self._kind, self._captured = kind, None
            results = super().steps(samples, targets_of, batch_size, max_grad_norm)
        self.adam.end(n_updates)
        return results

    def _capture(
        self, samples: ReplayBufferSamples, targets_of: TargetsOf, batch_size: int, max_grad_norm: float | None
    ) -> CapturedStep | None:
        inputs = ReplayBufferSamples(*(_copy_of_rows(field, slice(batch_size)) for field in samples))
        try:
            replay, results = capture(
                lambda: super(GraphUpdate, self).steps(inputs, targets_of, batch_size, max_grad_norm), self.theta.device
            )
        except RuntimeError as error:  # nothing was computed, so the steps can be made as before
            GraphUpdate.can_capture = False
            reason = error.__context__ or error  # the first of them
            warnings.warn(f"CUDA cannot capture the gradient step, which is slower without: {reason}", stacklevel=2)
            return None
        return CapturedStep(_tensors_of(inputs), replay, results)

    def _clip(self, squared_norm: th.Tensor, max_grad_norm: float) -> None:
        # as PyTorch's clip_grad_norm_ does it, without asking for the norm
        self.gradient.mul_((max_grad_norm / (squared_norm.sqrt() + 1e-6)).clamp_(max=1))

    def _encoder_gradients(self, features: th.Tensor, features_gradient: th.Tensor) -> None:
        # not into .grad, because the nodes that do that belong to the stream on which they were made
        parameters = list(self.policy.q_net.features_extractor.parameters())
        gradients = th.autograd.grad(features, parameters, features_gradient)
        th._foreach_copy_([gradient_of(parameter) for parameter in parameters], gradients)


def _replay(step: CapturedStep, samples: ReplayBufferSamples, batch_size: int) -> StepResults:
    """The step for each batch; its results are copied, because the next one overwrites them."""
    batches = zip(*(th.split(tensor, batch_size) for tensor in _tensors_of(samples)), strict=True)
    results = []
    for batch in batches:
        th._foreach_copy_(step.inputs, batch)
        step.replay()
        results.append([part.clone() for (part,) in step.results[1:]])
    return StepResults(samples.actions.to(th.int64, copy=True), *zip(*results, strict=True))


def _fields_of_a_batch(samples: Any) -> ReplayBufferSamples:
    """The fields that an update uses; a buffer of a user's own may have more."""
    return ReplayBufferSamples(*(getattr(samples, name) for name in ReplayBufferSamples._fields))


def _named_tensors_of(samples: ReplayBufferSamples) -> list[tuple[str, th.Tensor]]:
    """In an order that does not depend on a dictionary's."""
    named: list[tuple[str, th.Tensor]] = []
    for name, field in samples._asdict().items():
        parts = sorted(field.items()) if isinstance(field, dict) else [("", field)]
        named += [(f"{name}.{key}", part) for key, part in parts if part is not None]
    return named


def _tensors_of(samples: ReplayBufferSamples) -> list[th.Tensor]:
    return [tensor for _, tensor in _named_tensors_of(samples)]


def _copy_of_rows(field: Any, rows: slice) -> Any:
    if isinstance(field, dict):
        return {key: _copy_of_rows(part, rows) for key, part in field.items()}
    return None if field is None else field[rows].clone()
