"""
The update and the acting on a GPU: what they do is captured once as a CUDA graph, and replayed.

On a GPU a step of this size is launching some fifty operations, each of which takes the host longer than the GPU. A graph is
launched as a whole. It computes on the same memory each time, so what changes is copied to where the graph looks for it:
batches, or which transitions they are, and with them what Adam makes of the learning rate and the number of steps.
What is captured are steps of :class:`~sb3_lecture_dqn.fast.update.FastUpdate`: one, two, four, … of them, so that any number
of steps is made of a few graphs.
"""

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from operator import itemgetter
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples

from sb3_lecture_dqn.fast.acting import FastActing, to_tensors
from sb3_lecture_dqn.fast.adam import DeviceAdam
from sb3_lecture_dqn.fast.device_copy import CopiedRecords, DrawnRows, is_cuda
from sb3_lecture_dqn.fast.head import forward, gradient_of
from sb3_lecture_dqn.fast.update import MODELESS_MODULES, FastUpdate, TargetsOf, metrics_of_results
from sb3_lecture_dqn.policies import LectureDQNPolicy

_ONE_CAPTURE = threading.Lock()

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
    # other threads may do with CUDA what they like, but for another capture on the same stream
    capturing = th.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local")
    # a capture that fails may leave its stream the current one, if nobody puts the one before back
    with _ONE_CAPTURE, th.cuda.device(device), th.cuda.stream(stream), capturing:
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
    Does the same work on one input after the other, and captures it the second time; the first time it is done operation by
    operation, as CUDA needs it.

    :param device: The device
    """

    #: Whether CUDA has captured whatever it was asked to; a capture that fails may leave the process unable to.
    can_capture: ClassVar[bool] = True

    def __init__(self, device: th.device) -> None:
        self.device = device
        self._is_first = True
        self._captured: Captured[Results] | None = None

    def do(self, inputs: Inputs, work: Callable[[Inputs], Results]) -> Results:
        """
        Do the work on the device.

        :param inputs: Its inputs, on any device, of the same shapes and types each time
        :param work: The work, which depends on nothing else
        :return: Its results, which the next call may overwrite
        """
        if self._captured is None and self.can_capture and not self._is_first:
            self._capture(inputs, work)
        if self._captured is None:
            results = work(map_tensors(lambda tensor: tensor.to(self.device), inputs))
            self._is_first = False
            return results
        # CUDA has read what is not in pinned memory when this returns; to pin it would take longer
        th._foreach_copy_(self._captured.inputs, list(named_tensors(inputs).values()), non_blocking=True)
        self._captured.replay()
        return self._captured.results

    def _capture(self, inputs: Inputs, work: Callable[[Inputs], Results]) -> None:
        places = map_tensors(lambda tensor: tensor.to(self.device, copy=True), inputs)
        try:
            replay, results = capture(lambda: work(places), self.device)
        except RuntimeError as error:  # nothing was computed, so it can be done as before
            Capturer.can_capture = False
            reason = error.__context__ or error  # the first of them
            warnings.warn(f"CUDA cannot capture this, which is slower without: {reason}", stacklevel=2)
        else:
            self._captured = Captured(list(named_tensors(places).values()), replay, results)


def named_tensors(value: Any, name: str = "") -> dict[str, th.Tensor]:
    """
    The tensors of a batch or of observations, in an order that does not depend on a dictionary's.

    :param value: A named tuple, a dictionary, a tensor or ``None``
    :param name: What comes before each name
    :return: The tensors by their names
    """
    if isinstance(value, th.Tensor):
        return {name: value}
    fields = value._asdict() if isinstance(value, tuple) else value or {}  # type: ignore[attr-defined]
    named: dict[str, th.Tensor] = {}
    for key in sorted(fields):
        named.update(named_tensors(fields[key], f"{name}.{key}"))
    return named


def map_tensors(function: Callable[[th.Tensor], th.Tensor], value: Any) -> Any:
    """
    A batch or observations with other tensors.

    :param function: Makes a tensor of a tensor
    :param value: A named tuple, a dictionary, a tensor or ``None``
    :return: The same of what the function gave
    """
    if isinstance(value, tuple):
        return type(value)(*(map_tensors(function, field) for field in value))
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


def lay_out_for_device(policy: LectureDQNPolicy) -> None:
    """
    Let an encoder's convolutions keep the channels of their weights side by side, as a GPU wants them, and give such images.

    An encoder that we do not know stays as it is: it may want to view them in another shape. So does one with a fused
    optimizer, which pairs parameters and moments, those of a file too, by their places in memory.

    :param policy: The policy
    """
    is_fused = policy.optimizer.param_groups[0].get("fused")
    if is_cuda(policy.device) and has_known_encoder(policy) and not is_fused:
        for q_net in (policy.q_net, policy.q_net_target):
            q_net.features_extractor.to(memory_format=th.channels_last)  # type: ignore[call-overload]


class StepInputs(NamedTuple):
    """What some steps are made of: their batches one after the other, or which rows these are, and what Adam has to know."""

    batches: Any  # ReplayBufferSamples or indices
    coefficients: th.Tensor

    def of_steps(self, first: int, n_steps: int, batch_size: int) -> "StepInputs":
        """
        What some of the steps are made of.

        :param first: The first of them
        :param n_steps: How many they are
        :param batch_size: B
        :return: This
        """
        rows = slice(first * batch_size, (first + n_steps) * batch_size)
        return StepInputs(map_tensors(itemgetter(rows), self.batches), self.coefficients[first : first + n_steps])


def powers_of_two(n: int) -> list[int]:
    """
    Different powers of two with a given sum.

    :param n: The sum, at least 1
    :return: The powers, the largest first
    """
    return [2**bit for bit in reversed(range(n.bit_length())) if n & 2**bit]


def joined_metrics(results: Sequence[th.Tensor]) -> th.Tensor:
    """
    The metrics of training calls, which are computed in the graphs.

    :param results: Those of each call, shape (4, n_updates)
    :return: As of :func:`~sb3_lecture_dqn.fast.update.metrics_of_results`
    """
    return th.cat(list(results), dim=1)


class GraphUpdate(FastUpdate):
    """
    The update for one policy on a CUDA device.

    :param policy: As for :class:`~sb3_lecture_dqn.fast.update.FastUpdate`
    :param optimizer: As for :class:`~sb3_lecture_dqn.fast.update.FastUpdate`
    """

    device_type: ClassVar[str] = "cuda"
    metrics_of: "staticmethod[[Sequence[Any]], th.Tensor]" = staticmethod(joined_metrics)
    kind_of_records: ClassVar[type[Any] | None] = CopiedRecords

    adam: DeviceAdam

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam) -> None:
        super().__init__(policy, optimizer)
        # of batches that are read there and of others, for each number of steps
        self._kinds: dict[bool, Hashable] = {}
        self._capturers: dict[bool, dict[int, Capturer[th.Tensor]]] = {}

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

    def updates_at_once(self, batch_size: int) -> int:
        """
        For how many updates transitions are drawn at once: what the host does is then little beside the GPU.

        :param batch_size: B
        :return: As many as 64, which is the largest graph; fewer of large batches, images above all, which need memory
        """
        n_rows = 2**14 if self.has_vector_observations else 2**10
        return min(max(n_rows // batch_size, 1), 64)

    @property
    def may_use_second_thread(self) -> bool:
        """Never: the GPU does the work."""
        return False

    def steps(
        self, samples: ReplayBufferSamples | DrawnRows, targets_of: TargetsOf, batch_size: int, max_grad_norm: float | None
    ) -> th.Tensor:
        """
        Gradient steps as :meth:`FastUpdate.steps` makes them.

        The first steps of a kind are made one operation after the other, as a CUDA graph needs it; the next are captured.

        :param samples: The transitions of all batches, one batch after the other, or which they are
        :param targets_of: Gives the targets of some of the rows
        :param batch_size: B
        :param max_grad_norm: Largest norm of the gradient; ``None`` for no clipping
        :return: The four metrics of each step, shape (4, n_updates)
        """
        records, batches = _split_rows(samples) if isinstance(samples, DrawnRows) else (None, _fields_of_a_batch(samples))
        n_steps = len(batches if isinstance(batches, th.Tensor) else batches.actions) // batch_size
        inputs = StepInputs(batches, self.adam.coefficients(n_steps))
        formats = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in named_tensors(inputs).items())
        kind = (records, targets_of, batch_size, max_grad_norm, self.adam.betas, formats)
        capturers = self._capturers_of(kind, is_read_there=records is not None)

        def steps(inputs: StepInputs) -> th.Tensor:
            self.adam.begin(inputs.coefficients)
            batches = inputs.batches if records is None else records.samples(inputs.batches)
            results = super(GraphUpdate, self).steps(batches, targets_of, batch_size, max_grad_norm)
            return metrics_of_results([results])

        metrics: list[th.Tensor] = []
        sizes = powers_of_two(n_steps)
        for size, end in zip(sizes, accumulate(sizes), strict=True):
            metrics.append(capturers[size].do(inputs.of_steps(end - size, size, batch_size), steps))
            self.adam.end(size)
        return th.cat(metrics, dim=1)  # a copy: the next replay overwrites what it leaves

    def _capturers_of(self, kind: Hashable, is_read_there: bool) -> dict[int, Capturer[th.Tensor]]:
        """Those of the present kind, for each number of steps; what the ones before kept is given back."""
        if self._kinds.get(is_read_there) != kind:
            self._kinds[is_read_there] = kind
            self._capturers[is_read_there] = defaultdict(partial(Capturer, self.theta.device))
        return self._capturers[is_read_there]

    def _targets(
        self, targets_of: Callable[[slice], th.Tensor], n_updates: int, batch_size: int
    ) -> Iterator[Callable[[], th.Tensor]]:
        """The targets of each batch, all at once: a GPU has room for them."""
        targets = targets_of(slice(0, n_updates * batch_size))
        return (partial(_as_it_is, part) for part in th.split(targets, batch_size))

    def _clip(self, squared_norm: th.Tensor, max_grad_norm: float) -> None:
        # as PyTorch's clip_grad_norm_ does it, without asking for the norm
        self.gradient.mul_((max_grad_norm / (squared_norm.sqrt() + 1e-6)).clamp_(max=1))

    def _encoder_gradients(self, features: th.Tensor, features_gradient: th.Tensor) -> None:
        # not into .grad, because the nodes that do that belong to the stream on which they were made
        parameters = list(self.policy.q_net.features_extractor.parameters())
        gradients = th.autograd.grad(features, parameters, features_gradient)
        th._foreach_copy_([gradient_of(parameter) for parameter in parameters], gradients)


def _as_it_is(tensor: th.Tensor) -> th.Tensor:
    return tensor


def _split_rows(drawn: DrawnRows) -> tuple[CopiedRecords, th.Tensor]:
    assert isinstance(drawn.records, CopiedRecords)  # see kind_of_records
    return drawn.records, th.from_numpy(drawn.indices)


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
        self._capturers: dict[Hashable, Capturer[th.Tensor]] = defaultdict(partial(Capturer, self.parameters[0].device))

    @th.no_grad()
    def greedy_actions(self, observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        π(s) = argmax_a Q(s, a, θ) (L9).

        :param observations: s, shape (n_envs, ...), or such arrays by their names
        :return: Actions, shape (n_envs,)
        """
        tensors = to_tensors(observations)
        kind = tuple((name, tensor.shape) for name, tensor in named_tensors(tensors).items())
        actions: np.ndarray = self._capturers[kind].do(tensors, self._actions).cpu().numpy()
        return actions

    def _actions(self, observations: PyTorchObs) -> th.Tensor:
        features = self.policy.q_net.extract_features(observations, self.policy.q_net.features_extractor)
        return forward(self.head, features).argmax(dim=1)
