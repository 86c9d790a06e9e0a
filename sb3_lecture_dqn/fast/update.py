"""
The update of ``LectureDQN.train``, faster: the same function of θ, ψ and B without what PyTorch's modules and graph add.

The head of the Q network is computed forward and backward by hand; an encoder in front of it still runs by autograd. θ, its
gradient and Adam's moments are each one flat tensor, of which the network's parameters are views, so that Adam and clipping
are one operation each. Saving and loading see nothing of this: the parameters and ``policy.optimizer`` hold what they would
hold anyway.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from operator import attrgetter, is_
from typing import Any, ClassVar, NamedTuple, Protocol

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_lecture_dqn.fast.adam import FlatAdam, flatten, has_one_step_count, is_in_shared_memory, is_plain_adam, views
from sb3_lecture_dqn.fast.device_copy import DrawnRows
from sb3_lecture_dqn.fast.head import (
    Composition,
    Head,
    backward,
    forward,
    forward_for_backward,
    gradient_of,
    have_hooks,
    hooks_of,
    read_head,
    replaces_methods,
)
from sb3_lecture_dqn.fast.second_thread import SecondThread, Task, Work
from sb3_lecture_dqn.fast.threads import threads_for
from sb3_lecture_dqn.policies import LectureDQNPolicy, QNetwork

#: What computes the same in training mode and in evaluation mode.
MODELESS_MODULES = (
    FlattenExtractor,
    NatureCNN,
    CombinedExtractor,
    nn.ModuleDict,
    nn.Sequential,
    nn.Flatten,
    nn.Linear,
    nn.Conv2d,
    nn.ReLU,
)


class TargetsOf(Protocol):
    """Gives the targets of some rows of what was drawn, shape (n, 1); two are equal if they compute the same."""

    @property
    def gamma(self) -> float:
        """γ, where the transitions have no discounts of their own."""

    def __call__(self, fast_update: "FastUpdate", samples: ReplayBufferSamples, rows: slice, /) -> th.Tensor:
        """The targets of these rows."""


def rows_of(observations: Any, rows: slice) -> Any:
    """
    Some of the observations.

    :param observations: A tensor, or a dictionary of tensors
    :param rows: Which ones
    :return: These
    """
    if isinstance(observations, dict):
        return {key: value[rows] for key, value in observations.items()}
    return observations[rows]


def hard_copy(parameters: list[th.Tensor], target_parameters: list[th.Tensor]) -> None:
    """
    ψ = θ, all of it in one operation.

    On one thread: it is too little for two, and PyTorch's second one goes on looking for work for a while, on a core that
    something else could have.

    :param parameters: θ
    :param target_parameters: ψ
    """
    with threads_for(sum(map(th.Tensor.numel, parameters))):
        th._foreach_copy_(target_parameters, parameters)


def _batch_of(task: Task[th.Tensor], batch_size: int, index: int) -> th.Tensor:
    return th.split(task.result(), batch_size)[index]


def has_vector_observations(policy: LectureDQNPolicy) -> bool:
    """
    Whether neither SB3's preprocessing nor the encoder does anything to an observation.

    :param policy: The policy
    :return: Whether its observations are vectors of numbers, and the encoder is SB3's that only flattens
    """
    is_vector = type(policy.observation_space) is spaces.Box and len(policy.observation_space.shape) == 1
    encoders = (policy.q_net.features_extractor, policy.q_net_target.features_extractor)
    return is_vector and all(type(encoder) is FlattenExtractor for encoder in encoders)


def _head_of(q_net: QNetwork, tensor_of: Callable[[th.Tensor], th.Tensor] = th.Tensor.detach) -> Head:
    head = read_head(q_net, tensor_of)
    assert head is not None  # for_policy has looked
    return head


class StepResults(NamedTuple):
    """What a training call leaves for the metrics: a, and of each of its steps Q(s, ·, θ), the targets and ‖gradient‖²."""

    actions: th.Tensor
    q_values: Sequence[th.Tensor]
    targets: Sequence[th.Tensor]
    squared_norms: Sequence[th.Tensor]

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.q_values[0])


def metrics_of_results(results: Sequence[StepResults]) -> th.Tensor:
    """
    The metrics of training calls, which are computed at once: small operations between large ones find nothing in the cache.

    :param results: What their steps gave
    :return: The losses, the mean Q(s, a, θ), the mean targets and the norms of the gradients before clipping, shape
        (4, n_updates)
    """
    parts = [_metrics_of_batches(list(alike), size) for size, alike in groupby(results, attrgetter("batch_size"))]
    return th.cat(parts, dim=1)


def _metrics_of_batches(results: Sequence[StepResults], batch_size: int) -> th.Tensor:
    actions, q_values_of_all, targets_of_all, squared_norms = zip(*results, strict=True)
    all_q_values = th.cat(list(chain.from_iterable(q_values_of_all)))
    q_values = all_q_values.gather(1, th.cat(actions)).view(-1, batch_size)
    targets = th.cat(list(chain.from_iterable(targets_of_all))).view_as(q_values)
    losses = (q_values - targets).square_().mean(dim=1)
    norms = th.stack(list(chain.from_iterable(squared_norms))).sqrt_()
    return th.stack([losses, q_values.mean(dim=1), targets.mean(dim=1), norms])


class FastUpdate:
    """
    The update for one policy.

    :param policy: The policy, which :meth:`for_policy` has looked at; its parameters become views of flat tensors
    :param optimizer: Its optimizer
    """

    #: Where the parameters have to be.
    device_type: ClassVar[str] = "cpu"
    #: Gives the metrics of training calls from what :meth:`steps` gave for each.
    metrics_of: "staticmethod[[Sequence[Any]], th.Tensor]" = staticmethod(metrics_of_results)
    #: The kind of records in which it reads transitions that were only drawn; ``None`` where it has to be given them.
    kind_of_records: ClassVar[type[Any] | None] = None
    #: What a second thread may be given in an update.
    work_for_second_thread: ClassVar[tuple[Work, ...]] = tuple(Work)
    #: Transitions whose targets are computed at once ahead of the steps: what takes about as long as one step.
    rows_ahead: ClassVar[int] = 384

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam) -> None:
        self.policy = policy
        self.parameters = list(policy.q_net.parameters())
        self.target_parameters = list(policy.q_net_target.parameters())
        self.theta = flatten(self.parameters)
        self.gradient = th.zeros_like(self.theta)
        self.gradients = views(self.gradient, self.parameters)
        for parameter, view in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = view
        self.addresses = self._addresses()
        self.hooks = [*hooks_of(policy.q_net), *hooks_of(policy.q_net_target)]
        self.composition = Composition(policy)
        self.head, self.target_head = _head_of(policy.q_net), _head_of(policy.q_net_target)
        self.head_gradients = _head_of(policy.q_net, gradient_of)
        self.adam = self._make_adam(optimizer)
        self.second_thread = SecondThread(self.work_for_second_thread)
        encoder = policy.q_net.features_extractor
        self.has_trained_encoder = any(True for _ in encoder.parameters())
        self.has_vector_observations = has_vector_observations(policy)
        #: Whether the encoder is one that we do not know, which may care for its mode, or for where a batch begins and ends.
        self.needs_training_mode = any(type(module) not in MODELESS_MODULES for module in encoder.modules())
        self.encodes_in_steps = self.has_trained_encoder or self.needs_training_mode

    @classmethod
    def for_policy(cls, policy: LectureDQNPolicy) -> "FastUpdate | None":
        """
        The fast update of a policy.

        :param policy: The policy
        :return: Its update, or ``None`` where only the plain one is right: other layers, methods of a user's own, other
            optimizers, hooks, frozen parameters, parameters on another device or in shared memory, a policy that was compiled
        """
        if not isinstance(policy, LectureDQNPolicy) or replaces_methods(policy):
            return None
        heads = read_head(policy.q_net), read_head(policy.q_net_target)
        parameters = list(policy.q_net.parameters())
        all_parameters = (*parameters, *policy.q_net_target.parameters())
        kinds = {(p.device.type, p.dtype) for p in all_parameters}
        if None in heads or len(kinds) > 1 or policy.device.type != cls.device_type:
            return None
        if have_hooks(parameters) or any(map(is_in_shared_memory, all_parameters)):
            return None
        optimizer = policy.optimizer
        return cls(policy, optimizer) if is_plain_adam(optimizer, parameters) and has_one_step_count(optimizer) else None

    def _make_adam(self, optimizer: th.optim.Adam) -> FlatAdam:
        return FlatAdam(optimizer, self.theta, self.gradient)

    def _addresses(self) -> list[int]:
        return list(map(th.Tensor.data_ptr, chain(self.parameters, self.target_parameters)))

    def is_current(self, policy: LectureDQNPolicy) -> bool:
        """
        Whether the policy is still as it was when this was made.

        :param policy: The policy that is trained now
        :return: Whether its layers and its optimizer are the same, its parameters, gradients and optimizer state still in the
            flat tensors, nothing is frozen, and nobody wants to see its passes
        """
        return (
            policy is self.policy
            and policy.optimizer is self.adam.optimizer
            and is_plain_adam(policy.optimizer, self.parameters)
            and not any(self.hooks)
            and not have_hooks(self.parameters)
            and self.composition.is_unchanged()
            and self._addresses() == self.addresses
            and all(map(is_, map(attrgetter("grad"), self.parameters), self.gradients))
            and self.adam.is_current()
        )

    def updates_at_once(self, batch_size: int) -> int:
        """
        For how many updates transitions are drawn at once: enough for long matrix products, few enough for the cache.

        :param batch_size: B
        :return: At least 1
        """
        return max(1024 // batch_size, 1)

    @property
    def may_use_second_thread(self) -> bool:
        """Whether two threads may share an update, which an encoder that we do not know may not bear."""
        return not self.needs_training_mode

    def multiply_adds(self, batch_size: int) -> int | None:
        """
        The work of one forward pass.

        :param batch_size: Number of observations
        :return: Rows × parameters; ``None`` if there is an encoder, which may use each parameter many times
        """
        return None if self.has_trained_encoder else batch_size * self.theta.numel()

    @th.no_grad()
    def next_q_values(self, next_observations: Any) -> th.Tensor:
        """
        Q(s', ·, ψ).

        :param next_observations: s'
        :return: Q values, shape (B, |A|)
        """
        return self._q_values(self._features(self.policy.q_net_target, next_observations))

    def _q_values(self, features: th.Tensor) -> th.Tensor:
        """Q(s, ·, ψ), from features."""
        return forward(self.target_head, features)

    def steps(
        self, samples: ReplayBufferSamples | DrawnRows, targets_of: TargetsOf, batch_size: int, max_grad_norm: float | None
    ) -> Any:
        """
        Gradient steps on the mean of (Q(s, a, θ) − target)², one for each batch.

        :param samples: The transitions of all batches, one batch after the other
        :param targets_of: Gives the targets of some of the rows
        :param batch_size: B
        :param max_grad_norm: Largest norm of the gradient; ``None`` for no clipping
        :return: What :meth:`metrics_of` needs
        """
        assert not isinstance(samples, DrawnRows)  # see kind_of_records
        observations, actions = samples.observations, samples.actions
        # an operation takes less of it, but nothing of an encoder may come out of it that autograd sees later
        with th.inference_mode() if self.has_vector_observations else th.no_grad():
            targets = self._targets(partial(targets_of, self, samples), len(actions) // batch_size, batch_size)
            # the metrics keep them, and should not keep all that was drawn with them
            actions = actions.to(th.int64, copy=True)
            inputs = observations if self.encodes_in_steps else self._features(self.policy.q_net, observations)
            starts = range(0, len(actions), batch_size)
            inputs_of_batches = [rows_of(inputs, slice(start, start + batch_size)) for start in starts]
            selections = th.split(self._selections(actions, batch_size), batch_size)
            batches = zip(inputs_of_batches, selections, targets, strict=True)
            results = [self._step(*batch, max_grad_norm) for batch in batches]
        return StepResults(actions, *zip(*results, strict=True))

    def _selections(self, actions: th.Tensor, batch_size: int) -> th.Tensor:
        """Where in Q(s, ·) the action is: the factor that the mean's gradient has; elsewhere 0."""
        n_actions = len(self.head.final_layer.bias)
        return self.theta.new_zeros(len(actions), n_actions).scatter_(1, actions, 2 / batch_size)

    def _targets(
        self, targets_of: Callable[[slice], th.Tensor], n_updates: int, batch_size: int
    ) -> Iterator[Callable[[], th.Tensor]]:
        """The targets of each batch."""
        parts = self._parts(n_updates, batch_size)
        tasks = self.second_thread.in_advance([partial(targets_of, part) for part in parts], Work.TARGETS)
        numbers = ((part.stop - part.start) // batch_size for part in parts)
        return (partial(_batch_of, task, batch_size, i) for task, n in zip(tasks, numbers, strict=True) for i in range(n))

    def _parts(self, n_updates: int, batch_size: int) -> list[slice]:
        """Rows whose targets are computed at once: of the first batch, which the steps wait for, and of the others ahead."""
        rows_ahead = batch_size if self.needs_training_mode else self.rows_ahead
        starts = [0, *range(1, n_updates, max(rows_ahead // batch_size, 1))]
        ends = [*starts[1:], n_updates]
        return [slice(start * batch_size, end * batch_size) for start, end in zip(starts, ends, strict=True)]

    def _step(
        self, inputs: Any, selection: th.Tensor, batch_targets: Callable[[], th.Tensor], max_grad_norm: float | None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """One gradient step on observations, or on features that are there; gives Q(s, ·, θ), targets and ‖gradient‖²."""
        features = inputs
        if self.encodes_in_steps:
            with th.set_grad_enabled(self.has_trained_encoder):
                features = self._features(self.policy.q_net, inputs)
        q_values, targets, features_gradient = self._head_gradients_of(features.detach(), selection, batch_targets)
        if features_gradient is not None:
            self._encoder_gradients(features, features_gradient)
        squared_norm = self._squared_norm()
        if max_grad_norm is not None:
            self._clip(squared_norm, max_grad_norm)
        self.adam.step()
        return q_values, targets, squared_norm

    def _head_gradients_of(
        self, features: th.Tensor, selection: th.Tensor, batch_targets: Callable[[], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Write the gradients of the head's parameters; gives Q(s, ·, θ), the targets and the features' gradient if needed."""
        forward_pass = forward_for_backward(self.head, features)
        targets = batch_targets()
        gradient = (forward_pass.q_values - targets).mul_(selection)
        features_gradient = backward(
            self.head, self.head_gradients, forward_pass, gradient, self.has_trained_encoder, self.second_thread
        )
        return forward_pass.q_values, targets, features_gradient

    def _squared_norm(self) -> th.Tensor:
        return th.dot(self.gradient, self.gradient)

    def _features(self, q_net: QNetwork, observations: Any) -> th.Tensor:
        if self.has_vector_observations:  # SB3's preprocessing and its encoder leave them as they are
            return observations.float()  # type: ignore[no-any-return]
        return q_net.extract_features(observations, q_net.features_extractor)

    def _clip(self, squared_norm: th.Tensor, max_grad_norm: float) -> None:
        scale = max_grad_norm / (math.sqrt(squared_norm) + 1e-6)  # that of PyTorch's clip_grad_norm_
        if scale < 1:
            self.gradient.mul_(scale)

    def _encoder_gradients(self, features: th.Tensor, features_gradient: th.Tensor) -> None:
        for parameter in self.policy.q_net.features_extractor.parameters():
            gradient_of(parameter).zero_()
        if features.requires_grad:  # it does not if the encoder runs under no_grad
            th.autograd.backward(features, features_gradient)
