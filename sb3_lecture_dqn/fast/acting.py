"""
π(s) for the steps of a training run, faster: one observation through a small network is too little work for PyTorch.

The head is computed on the memory of the parameters themselves, so that it always acts by the current θ: by what Numba
compiles, or, where that does not fit, by numpy for one environment and by PyTorch without modules for several. An encoder in
front of it is the policy's own.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_lecture_dqn.fast.compiling import Use, can_compile
from sb3_lecture_dqn.fast.head import (
    Composition,
    Head,
    HiddenLayer,
    forward,
    hooks_of,
    is_own_method,
    read_head,
    replaces_methods,
)
from sb3_lecture_dqn.fast.threads import threads_for
from sb3_lecture_dqn.policies import LectureDQNPolicy, QNetwork

if TYPE_CHECKING:
    from sb3_lecture_dqn.fast.compiled_head import CompiledHead


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
    The greedy policy of a Q network.

    :param policy: The policy
    :param head: The layers of its Q network
    """

    #: Where the parameters have to be.
    device_type: ClassVar[str] = "cpu"

    def __init__(self, policy: LectureDQNPolicy, head: Head) -> None:
        self.policy, self.head = policy, head
        self.only_flattens = _only_flattens_float32(policy.q_net)
        self.has_trained_encoder = any(True for _ in policy.q_net.features_extractor.parameters())
        self.parameters = self._used_parameters()
        self.n_parameters = sum(parameter.numel() for parameter in self.parameters)
        self.addresses = list(map(th.Tensor.data_ptr, self.parameters))
        self.hooks, self.composition = hooks_of(policy.q_net), Composition(policy)
        self._prepare()

    def _used_parameters(self) -> list[th.Tensor]:
        return list(self.policy.q_net.q_net.parameters())

    def _prepare(self) -> None:
        self.compiled_head = self._make_compiled_head()
        self.q_values_of_one = None if self.compiled_head is None else self.compiled_head.for_one()
        self.q_values_of_several = None if self.compiled_head is None else self.compiled_head.for_several()
        self.hidden_layers = [_numpy_layer(layer) for layer in self.head.hidden_layers]
        self.final_weight, self.final_bias = self.head.final_layer.weight.numpy(), self.head.final_layer.bias.numpy()

    def _make_compiled_head(self) -> "CompiledHead | None":
        if not can_compile(self.head, Use.ACTING):
            return None
        from sb3_lecture_dqn.fast.compiled_head import CompiledHead  # it imports Numba

        return CompiledHead.of(self.head)

    @classmethod
    def for_policy(cls, policy: LectureDQNPolicy) -> "FastActing | None":
        """
        Fast acting for a policy.

        :param policy: The policy
        :return: Its fast acting; ``None`` for other layers, a forward pass of a user's own, other parameters than float32,
            another device, or a policy that was compiled
        """
        head = read_head(policy.q_net) if isinstance(policy, LectureDQNPolicy) else None
        if head is None or replaces_methods(policy) or not _acts_as_the_lecture_does(policy):
            return None
        is_there = all(p.dtype == th.float32 and p.device.type == cls.device_type for p in policy.q_net.parameters())
        is_increasing = all(layer.negative_slope <= 1 for layer in head.hidden_layers)
        return cls(policy, head) if is_there and is_increasing else None

    def is_current(self, policy: LectureDQNPolicy) -> bool:
        """
        Whether the policy is still as it was when this was made.

        :param policy: The policy that acts now
        :return: Whether its layers and parameters are what and where they were, and nobody wants to see its passes
        """
        is_same = policy is self.policy and not any(self.hooks) and self.composition.is_unchanged()
        return is_same and list(map(th.Tensor.data_ptr, self.parameters)) == self.addresses

    def accepts(self, observations: np.ndarray | dict[str, np.ndarray]) -> bool:
        """
        Whether these observations are as the environment's space says, and the parameters where they were.

        :param observations: What the policy is asked to act on
        :return: Whether they have the space's types, with one dimension for the environments before those of an observation
        """
        if self.parameters[0].data_ptr() != self.addresses[0]:  # a copy or a pickle of the policy has moved them
            return False
        space = self.policy.observation_space
        if not isinstance(space, spaces.Dict):
            return _are_of(space, observations)
        is_same = isinstance(observations, dict) and observations.keys() == space.spaces.keys()
        return is_same and all(_are_of(space[key], observations[key]) for key in space.spaces)

    def greedy_actions(self, observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        π(s) = argmax_a Q(s, a, θ) (L9).

        :param observations: s, shape (n_envs, ...), or such arrays by their names
        :return: Actions, shape (n_envs,)
        """
        if isinstance(observations, dict) or not self.only_flattens:
            return self._encoded_greedy_actions(observations)
        features = observations.reshape(len(observations), -1)
        if len(features) == 1:
            return np.array([self._q_values_of_one(features).argmax()])
        return self._greedy_actions_of_several(features)

    def _greedy_actions_of_several(self, features: np.ndarray) -> np.ndarray:
        if self.compiled_head is not None and self.q_values_of_several is not None and self.compiled_head.takes(features):
            q_values = self.q_values_of_several(features)
        else:
            with th.no_grad(), threads_for(len(features) * self.n_parameters):
                q_values = forward(self.head, th.from_numpy(np.ascontiguousarray(features))).numpy()
        actions: np.ndarray = q_values.argmax(axis=1)
        return actions

    @th.no_grad()
    def _encoded_greedy_actions(self, observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        self.policy.set_training_mode(False)
        first = next(iter(observations.values())) if isinstance(observations, dict) else observations
        # an encoder with parameters may use each of them many times
        with threads_for(None if self.has_trained_encoder else len(first) * self.n_parameters):
            tensors = self.policy.q_net.extract_features(to_tensors(observations), self.policy.q_net.features_extractor)
            features = tensors.numpy()
            if len(features) == 1:
                return np.array([self._q_values_of_one(features).argmax()])
            return self._greedy_actions_of_several(features)

    def _q_values_of_one(self, features: np.ndarray) -> np.ndarray:
        if self.compiled_head is not None and self.q_values_of_one is not None and self.compiled_head.takes(features):
            return self.q_values_of_one(features)
        features = features[0]
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
    is_policys = all(is_own_method(policy, name, LectureDQNPolicy) for name in ("_predict", "predict", "obs_to_tensor"))
    return is_policys and is_own_method(policy.q_net, "_predict", QNetwork)


def _only_flattens_float32(q_net: QNetwork) -> bool:
    """Whether neither SB3's preprocessing nor the encoder does more to an observation than to flatten it."""
    space = q_net.observation_space
    is_float32 = isinstance(space, spaces.Box) and space.dtype == np.float32
    return is_float32 and type(q_net.features_extractor) is FlattenExtractor


def _are_of(space: spaces.Space[Any], observations: Any) -> bool:
    if not isinstance(observations, np.ndarray) or observations.ndim == 0:
        return False
    is_same: bool = observations.dtype == space.dtype and observations.shape[1:] == space.shape
    return is_same


def to_tensors(observations: np.ndarray | dict[str, np.ndarray]) -> PyTorchObs:
    """
    Observations as tensors: copies, because they are still to be stored in D, and an encoder may overwrite what it gets.

    :param observations: An array, or arrays by their names
    :return: Tensors on the CPU
    """
    if isinstance(observations, dict):
        return {key: th.from_numpy(np.array(values)) for key, values in observations.items()}
    return th.from_numpy(np.array(observations))


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
