"""
The deep Q function of the lecture (L5 to L8) as Stable-Baselines3 policies.

``Q : S → R^|A|`` is one network with |A| outputs, so that one forward pass gives the value of every action (L5)::

    encoder → [Linear → LayerNorm → LeakyReLU] × 2 → Linear

The encoder is the identity for vectors, and an SB3 features extractor for pixels and dictionaries (L7).
"""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_lecture_dqn.fast.adam import unflatten
from sb3_lecture_dqn.validation import check_activation, check_at_least, check_net_arch, in_one_line

#: L6: "2 layer MLP with hidden size of 256 is sufficient for standard benchmarks".
LECTURE_NET_ARCH = (256, 256)
#: L8: ``nn.init.normal(std=1e-3, bias=0)`` for the final layer.
LECTURE_FINAL_LAYER_STD = 1e-3


class VectorOfParameters:
    """SB3's method for parameters of any layout in memory: on a GPU, those of convolutions have another."""

    def parameters_to_vector(self: Any) -> np.ndarray:
        """
        All parameters in one vector.

        :return: The vector, shape (number of parameters,)
        """
        vector: np.ndarray = th.cat([parameter.detach().reshape(-1) for parameter in self.parameters()]).cpu().numpy()
        return vector


class QNetwork(VectorOfParameters, BasePolicy):
    """
    The action-value function Q(s, ·, θ): one forward pass for all actions (L5).

    :param observation_space: Observation space S
    :param action_space: Action space A
    :param features_extractor: The encoder in front of the network (L7)
    :param features_dim: Number of features that the encoder gives
    :param net_arch: Sizes of the hidden layers, each at least 1; ``None`` for the lecture's two of 256 (L6)
    :param activation_fn: Activation function of the hidden layers
    :param normalize_images: Whether to divide images by 255
    :param layer_norm: Whether a LayerNorm stands between each hidden Linear and its activation (L6)
    :param final_layer_std: Standard deviation of the final layer's initial weights, at least 0; its bias starts at 0, so that
        Q starts near 0 (L8). ``None`` keeps PyTorch's own initialisation.
    :raises ValueError: if ``net_arch`` or ``final_layer_std`` is out of its range, or ``activation_fn`` makes no layer
    """

    action_space: spaces.Discrete

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.LeakyReLU,
        normalize_images: bool = True,
        layer_norm: bool = True,
        final_layer_std: float | None = LECTURE_FINAL_LAYER_STD,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
        )
        self.net_arch = check_net_arch(LECTURE_NET_ARCH if net_arch is None else net_arch)
        self.activation_fn = activation_fn
        self.features_dim = features_dim
        self.layer_norm = layer_norm
        self.final_layer_std = final_layer_std

        check_activation(activation_fn)
        layers = create_mlp(
            features_dim,
            int(action_space.n),
            self.net_arch,
            activation_fn,
            post_linear_modules=[nn.LayerNorm] if layer_norm else None,
        )
        self.q_net = nn.Sequential(*layers)
        if final_layer_std is not None:
            check_at_least("final_layer_std", final_layer_std, 0)
            final_layer = layers[-1]
            assert isinstance(final_layer, nn.Linear)
            nn.init.normal_(final_layer.weight, std=final_layer_std)
            nn.init.zeros_(final_layer.bias)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Q(s, ·, θ), the values of all actions.

        :param obs: Batch of observations, shape (B, ...)
        :return: Q values, shape (B, |A|)
        """
        q_values: th.Tensor = self.q_net(self.extract_features(obs, self.features_extractor))
        return q_values

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        # π(s) = argmax_a Q(s, a, θ)   (L9); exploration is the algorithm's part
        return self(observation).argmax(dim=1)  # type: ignore[no-any-return]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            features_dim=self.features_dim,
            activation_fn=self.activation_fn,
            features_extractor=self.features_extractor,
            layer_norm=self.layer_norm,
            final_layer_std=self.final_layer_std,
        )
        return data


class LectureDQNPolicy(VectorOfParameters, BasePolicy):
    """
    θ and ψ: the Q network, its target network and the optimizer of θ.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: Sizes of the hidden layers, each at least 1; ``None`` for the lecture's two of 256 (L6)
    :param activation_fn: Activation function of the hidden layers
    :param features_extractor_class: The encoder in front of the network (L7)
    :param features_extractor_kwargs: Keyword arguments to pass to the encoder
    :param normalize_images: Whether to divide images by 255
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer
    :param layer_norm: Whether a LayerNorm stands between each hidden Linear and its activation (L6)
    :param final_layer_std: Standard deviation of the final layer's initial weights (L8), at least 0; ``None`` keeps
        PyTorch's own initialisation
    :raises ValueError: if ``net_arch`` or ``final_layer_std`` is out of its range, ``activation_fn`` makes no layer, or the
        encoder cannot take the observations
    """

    action_space: spaces.Discrete
    q_net: QNetwork
    q_net_target: QNetwork

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.LeakyReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        layer_norm: bool = True,
        final_layer_std: float | None = LECTURE_FINAL_LAYER_STD,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        self.net_arch = check_net_arch(LECTURE_NET_ARCH if net_arch is None else net_arch)
        self.activation_fn = activation_fn
        self.layer_norm = layer_norm
        self.final_layer_std = final_layer_std
        self.net_args = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": self.net_arch,
            "activation_fn": self.activation_fn,
            "normalize_images": normalize_images,
            "layer_norm": layer_norm,
            "final_layer_std": final_layer_std,
        }
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create both networks and the optimizer.

        :param lr_schedule: Learning rate schedule; ``lr_schedule(1)`` is the initial learning rate
        """
        self.q_net = self.make_q_net()
        self.q_net_target = self.make_q_net()
        self.q_net_target.load_state_dict(self.q_net.state_dict())  # ψ = θ   (L13)
        self.q_net_target.set_training_mode(False)
        self.optimizer = self.optimizer_class(
            self.q_net.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def make_q_net(self) -> QNetwork:
        """
        A new Q network with an encoder of its own.

        :return: The network, on the policy's device
        :raises ValueError: if the encoder cannot take the observations, for instance because the images are too small for it
        """
        try:
            net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        except (AssertionError, AttributeError, RuntimeError) as error:
            encoder = self.features_extractor_class
            if not isinstance(error, RuntimeError) and not encoder.__module__.startswith("stable_baselines3."):
                raise  # of an encoder of a user's own
            got = in_one_line(f"{self.observation_space}: {error}")
            raise ValueError(f"env must have observations that {encoder.__name__} can take, got {got}") from error
        return QNetwork(**net_args).to(self.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        """
        The greedy actions π(s) (L9).

        :param obs: Batch of observations, shape (B, ...)
        :param deterministic: Without effect: ε-greedy exploration belongs to ``LectureDQN.predict``
        :return: Actions, shape (B,)
        """
        return self._predict(obs, deterministic=deterministic)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        The greedy policy π (L9), in evaluation mode.

        :param observation: One observation, or one for each environment
        :param state: Returned as it is (for recurrent policies, which these are not)
        :param episode_start: Without effect (for recurrent policies)
        :param deterministic: Without effect: ε-greedy exploration belongs to ``LectureDQN.predict``
        :return: The actions, shape (n_envs,), or () for a single observation; and ``state``
        """
        if any(module.training for module in self.q_net.modules()):  # one may be new, or have been put in another mode
            self.q_net.set_training_mode(False)
        return super().predict(observation, state, episode_start, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return self.q_net._predict(observation, deterministic=deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            lr_schedule=self._dummy_schedule,  # not needed to load the policy alone
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            layer_norm=self.layer_norm,
            final_layer_std=self.final_layer_std,
        )
        return data

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the Q network in training or evaluation mode; the target network stays in evaluation mode.

        :param mode: ``True`` for training mode (this matters to batch normalisation and dropout)
        """
        if self.q_net.training != mode:  # the walk over all layers takes as long as a step of an environment
            self.q_net.set_training_mode(mode)
        self.training = mode

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies; it moves this policy's own parameters, see :func:`~sb3_lecture_dqn.fast.adam.unflatten`."""
        unflatten(list(self.q_net.parameters()), self.optimizer)
        return self.__dict__.copy()


#: Vector observations: no encoder.
MlpPolicy = LectureDQNPolicy


class CnnPolicy(LectureDQNPolicy):
    """
    Image observations: SB3's ``NatureCNN`` as the encoder in front of the same network (L7).

    The parameters are those of :class:`LectureDQNPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.LeakyReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            features_extractor_class,
            *args,
            **kwargs,
        )


class MultiInputPolicy(LectureDQNPolicy):
    """
    Dictionary observations: SB3's ``CombinedExtractor`` as the encoder in front of the same network (L7).

    The parameters are those of :class:`LectureDQNPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.LeakyReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            features_extractor_class,
            *args,
            **kwargs,
        )
