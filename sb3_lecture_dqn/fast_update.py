"""
The update of ``LectureDQN.train``, faster: the same function of θ, ψ and B without what PyTorch's modules and graph add.

The head of the Q network is computed forward and backward by hand; an encoder in front of it still runs by autograd. θ, its
gradient and Adam's moments are each one flat tensor, of which the network's parameters are views, so that Adam and clipping
are one operation each. Saving and loading see nothing of this: the parameters and ``policy.optimizer`` hold what they would
hold anyway.
"""

import math
from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_lecture_dqn.fast_head import Head, backward, forward, forward_for_backward, gradient_of, has_hooks, read_head
from sb3_lecture_dqn.flat_adam import FlatAdam, flatten, is_plain_adam, views
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


def split_observations(observations: Any, batch_size: int) -> list[Any]:
    """
    Cut observations into batches.

    :param observations: A tensor, or a dictionary of tensors, of any number of batches
    :param batch_size: Number of observations in a batch
    :return: The batches
    """
    if not isinstance(observations, dict):
        return list(th.split(observations, batch_size))
    parts = {key: th.split(value, batch_size) for key, value in observations.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _head_of(q_net: QNetwork, tensor_of: Callable[[th.Tensor], th.Tensor] = th.Tensor.detach) -> Head:
    head = read_head(q_net, tensor_of)
    assert head is not None  # for_policy has looked
    return head


class FastUpdate:
    """
    The update for one policy.

    :param policy: The policy, which :meth:`for_policy` has looked at; its parameters become views of flat tensors
    :param optimizer: Its optimizer
    """

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
        self.head, self.target_head = _head_of(policy.q_net), _head_of(policy.q_net_target)
        self.head_gradients = _head_of(policy.q_net, gradient_of)
        self.adam = FlatAdam(optimizer, self.theta, self.gradient)
        encoder = policy.q_net.features_extractor
        self.has_trained_encoder = any(True for _ in encoder.parameters())
        #: Whether the encoder may compute something else in training mode than in evaluation mode.
        self.needs_training_mode = any(type(module) not in MODELESS_MODULES for module in encoder.modules())

    @classmethod
    def for_policy(cls, policy: LectureDQNPolicy) -> "FastUpdate | None":
        """
        The fast update of a policy.

        :param policy: The policy
        :return: Its update, or ``None`` where only the plain one is right: other layers, other optimizers, hooks, a GPU
        """
        heads = read_head(policy.q_net), read_head(policy.q_net_target)
        parameters = list(policy.q_net.parameters())
        kinds = {(p.device.type, p.dtype) for p in (*parameters, *policy.q_net_target.parameters())}
        if None in heads or len(kinds) > 1 or policy.device.type != "cpu":
            return None
        return cls(policy, policy.optimizer) if is_plain_adam(policy.optimizer, parameters) else None

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in (*self.parameters, *self.target_parameters)]

    def is_current(self, policy: LectureDQNPolicy) -> bool:
        """
        Whether the policy is still as it was when this was made.

        :param policy: The policy that is trained now
        :return: Whether its parameters, gradients and optimizer state are still in the flat tensors
        """
        return (
            policy is self.policy
            and not has_hooks(policy.q_net)
            and not has_hooks(policy.q_net_target)
            and self._addresses() == self.addresses
            and all(p.grad is gradient for p, gradient in zip(self.parameters, self.gradients, strict=True))
            and self.adam.is_current()
        )

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
        target = self.policy.q_net_target
        features = target.extract_features(next_observations, target.features_extractor)
        return forward(self.target_head, features)

    @th.no_grad()
    def steps(
        self, observations: Any, actions: th.Tensor, targets: th.Tensor, batch_size: int, max_grad_norm: float | None
    ) -> tuple[th.Tensor, ...]:
        """
        Gradient steps on the mean of (Q(s, a, θ) − target)², one for each batch.

        :param observations: s of all batches, one after the other
        :param actions: a, shape (n_steps · B, 1)
        :param targets: Targets, shape (n_steps · B, 1)
        :param batch_size: B
        :param max_grad_norm: Largest norm of the gradient; ``None`` for no clipping
        :return: The losses, the mean Q(s, a, θ), the mean targets and the norms of the gradients before clipping, each of
            shape (n_steps,)
        """
        inputs = observations if self.has_trained_encoder else self._features(observations)
        batches = zip(
            split_observations(inputs, batch_size),
            th.split(actions, batch_size),
            th.split(targets, batch_size),
            strict=True,
        )
        results = [self._step(*batch, max_grad_norm) for batch in batches]
        q_values, squared_norms = (th.stack(values) for values in zip(*results, strict=True))
        targets = targets.view_as(q_values)
        losses = (q_values - targets).square_().mean(dim=(1, 2))
        self.adam.write_step_count()
        return losses, q_values.mean(dim=(1, 2)), targets.mean(dim=(1, 2)), squared_norms.sqrt_()

    def _step(
        self, inputs: Any, actions: th.Tensor, targets: th.Tensor, max_grad_norm: float | None
    ) -> tuple[th.Tensor, th.Tensor]:
        """One gradient step on observations, or on features without parameters; gives Q(s, a, θ) and ‖gradient‖²."""
        features = inputs
        if self.has_trained_encoder:
            with th.enable_grad():
                features = self._features(inputs)
        made = forward_for_backward(self.head, features.detach())
        q_values = made.q_values.gather(1, actions)
        errors = (q_values - targets).mul_(2 / len(targets))
        gradient = th.zeros_like(made.q_values).scatter_(1, actions, errors)
        features_gradient = backward(self.head, self.head_gradients, made, gradient, self.has_trained_encoder)
        if features_gradient is not None:
            self._encoder_gradients(features, features_gradient)
        squared_norm = th.dot(self.gradient, self.gradient)
        if max_grad_norm is not None:
            scale = max_grad_norm / (math.sqrt(squared_norm) + 1e-6)  # that of PyTorch's clip_grad_norm_
            if scale < 1:
                self.gradient.mul_(scale)
        self.adam.step()
        return q_values, squared_norm

    def _features(self, observations: Any) -> th.Tensor:
        q_net = self.policy.q_net
        return q_net.extract_features(observations, q_net.features_extractor)

    def _encoder_gradients(self, features: th.Tensor, features_gradient: th.Tensor) -> None:
        for parameter in self.policy.q_net.features_extractor.parameters():
            gradient_of(parameter).zero_()
        th.autograd.backward(features, features_gradient)
