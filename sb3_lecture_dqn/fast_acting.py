"""
π(s) for the steps of a training run, faster: one vector observation through a small network is too little work for PyTorch.

For one environment the head is computed by numpy on the memory of the parameters themselves, so that it always acts by the
current θ; for several, by PyTorch without modules.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_lecture_dqn.fast_head import Head, HiddenLayer, forward, hooks_of, read_head
from sb3_lecture_dqn.policies import LectureDQNPolicy, QNetwork
from sb3_lecture_dqn.threads import threads_for


class NumpyLayer(NamedTuple):
    """A hidden layer's parameters as numpy arrays that share the tensors' memory."""

    weight: np.ndarray
    bias: np.ndarray
    norm_weight: np.ndarray | None
    norm_bias: np.ndarray | None
    epsilon: float
    negative_slope: np.float32


class FastActing:
    """
    The greedy policy of a Q network without an encoder.

    :param policy: The policy
    :param head: The layers of its Q network
    """

    def __init__(self, policy: LectureDQNPolicy, head: Head) -> None:
        self.policy, self.head = policy, head
        self.observation_shape = policy.observation_space.shape
        self.parameters = list(policy.q_net.q_net.parameters())
        self.n_parameters = sum(parameter.numel() for parameter in self.parameters)
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        self.hooks = hooks_of(policy.q_net)
        self.hidden_layers = [_numpy_layer(layer) for layer in head.hidden_layers]
        self.final_weight, self.final_bias = head.final_layer.weight.numpy(), head.final_layer.bias.numpy()

    @classmethod
    def for_policy(cls, policy: LectureDQNPolicy) -> "FastActing | None":
        """
        Fast acting for a policy.

        :param policy: The policy
        :return: Its fast acting; ``None`` for other layers, an encoder, a forward pass of a user's own, other than float32, or
            a GPU
        """
        q_net = policy.q_net
        head = read_head(q_net)
        if head is None or not _acts_as_the_lecture_does(policy) or not _is_float32_vector(q_net.observation_space):
            return None
        is_on_cpu = all(p.dtype == th.float32 and p.device.type == "cpu" for p in q_net.parameters())
        is_increasing = all(0 <= layer.negative_slope <= 1 for layer in head.hidden_layers)
        if not is_on_cpu or not is_increasing or type(q_net.features_extractor) is not FlattenExtractor:
            return None
        return cls(policy, head)

    def is_current(self, policy: LectureDQNPolicy) -> bool:
        """
        Whether the policy is still as it was when this was made.

        :param policy: The policy that acts now
        :return: Whether its parameters are where they were, and nobody wants to see its passes
        """
        is_same = policy is self.policy and not any(self.hooks)
        return is_same and all(p.data_ptr() == a for p, a in zip(self.parameters, self.addresses, strict=True))

    def accepts(self, observations: np.ndarray) -> bool:
        """
        Whether these observations are as the environment's space says.

        :param observations: What the policy is asked to act on
        :return: Whether they are float32, with one dimension for the environments before those of an observation
        """
        return observations.dtype == np.float32 and observations.shape[1:] == self.observation_shape

    def greedy_actions(self, observations: np.ndarray) -> np.ndarray:
        """
        π(s) = argmax_a Q(s, a, θ) (L9).

        :param observations: s, shape (n_envs, ...)
        :return: Actions, shape (n_envs,)
        """
        if len(observations) == 1:
            return np.array([self._q_values_of_one(observations.reshape(-1)).argmax()])
        with th.no_grad(), threads_for(len(observations) * self.n_parameters):
            actions: np.ndarray = forward(self.head, th.from_numpy(observations).flatten(1)).argmax(dim=1).numpy()
        return actions

    def _q_values_of_one(self, features: np.ndarray) -> np.ndarray:
        for layer in self.hidden_layers:
            features = layer.weight.dot(features)
            features += layer.bias
            if layer.norm_weight is not None:
                features -= features.sum() / len(features)
                features *= 1 / math.sqrt(features.dot(features) / len(features) + layer.epsilon)
                features *= layer.norm_weight
                features += layer.norm_bias
            features = np.maximum(features, features * layer.negative_slope)
        q_values: np.ndarray = self.final_weight.dot(features) + self.final_bias
        return q_values


def _acts_as_the_lecture_does(policy: LectureDQNPolicy) -> bool:
    policy_class = type(policy)
    is_policys = policy_class._predict is LectureDQNPolicy._predict and policy_class.predict is LectureDQNPolicy.predict
    return is_policys and type(policy.q_net)._predict is QNetwork._predict


def _is_float32_vector(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.float32


def _numpy_layer(layer: HiddenLayer) -> NumpyLayer:
    norm = layer.layer_norm
    return NumpyLayer(
        layer.linear.weight.numpy(),
        layer.linear.bias.numpy(),
        None if norm is None else norm.weight.numpy(),
        None if norm is None else norm.bias.numpy(),
        0.0 if norm is None else norm.epsilon,
        np.float32(layer.negative_slope),
    )
