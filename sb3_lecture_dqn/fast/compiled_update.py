"""The fast update on the CPU with what lies between the matrix products compiled (:mod:`sb3_lecture_dqn.fast.kernels`)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_lecture_dqn.fast import kernels
from sb3_lecture_dqn.fast.adam import FlatAdam
from sb3_lecture_dqn.fast.head import Head, HiddenLayer, read_head
from sb3_lecture_dqn.fast.products import LinearTensors, affine, inputs_gradient, write_weight_gradient
from sb3_lecture_dqn.fast.second_thread import Task
from sb3_lecture_dqn.fast.threads import SMALL_WORK
from sb3_lecture_dqn.fast.update import FastUpdate
from sb3_lecture_dqn.policies import LectureDQNPolicy

#: Features up to which a product is computed by a loop of ours, which begins at once.
FEW_FEATURES = 32


class KeptLayer(NamedTuple):
    """What the forward pass of a hidden layer keeps for the backward pass: arrays of B rows, or of B numbers."""

    inputs: th.Tensor
    outputs: np.ndarray
    activations: np.ndarray
    means: np.ndarray
    rstds: np.ndarray


class HiddenLayerArrays(NamedTuple):
    """Linear → LayerNorm → LeakyReLU: its parameters, or their gradients, as arrays on the tensors' memory."""

    linear: LinearTensors
    weight: np.ndarray
    bias: np.ndarray
    norm_weight: np.ndarray
    norm_bias: np.ndarray
    epsilon: float
    negative_slope: float

    @classmethod
    def of(cls, layer: HiddenLayer) -> "HiddenLayerArrays":
        """
        The arrays of a layer.

        :param layer: The layer
        :return: Its arrays
        """
        norm = layer.layer_norm
        assert norm is not None  # for_policy has looked
        weight, bias = layer.linear.weight.numpy(), layer.linear.bias.numpy()
        number = weight.dtype.type  # of the arrays' type, so that all is computed in it
        settings = number(norm.epsilon), number(layer.negative_slope)
        return cls(layer.linear, weight, bias, norm.weight.numpy(), norm.bias.numpy(), *settings)

    @property
    def is_narrow(self) -> bool:
        """Whether the layer has so few features that its products are kernels too."""
        return bool(self.weight.shape[1] <= FEW_FEATURES)

    def affine(self, inputs: th.Tensor) -> th.Tensor:
        """
        x Wᵀ + b.

        :param inputs: x, shape (B, in_features)
        :return: shape (B, out_features)
        """
        if not self.is_narrow:
            return affine(self.linear, inputs)
        outputs = inputs.new_empty(inputs.size(0), len(self.weight))
        kernels.narrow_affine(inputs.numpy(), self.weight, self.bias, outputs.numpy())
        return outputs

    def activate(self, outputs: np.ndarray, activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        LayerNorm → LeakyReLU.

        :param outputs: What the Linear gave, shape (B, out_features)
        :param activations: Where the result is written, shape (B, out_features); may be ``outputs``
        :return: The mean and 1 / standard deviation of each row
        """
        means, rstds = np.empty((2, len(outputs)), outputs.dtype)
        settings = self.epsilon, self.negative_slope
        kernels.normalise_and_activate(outputs, self.norm_weight, self.norm_bias, *settings, activations, means, rstds)
        return means, rstds

    def backward_to_linear(self, gradients: "HiddenLayerArrays", kept: KeptLayer, gradient: np.ndarray) -> None:
        """
        From the gradient of the activations, which is overwritten, to that of the Linear's outputs; the weight's is left out.

        :param gradients: Where the gradients of the parameters are written
        :param kept: Of the forward pass
        :param gradient: The gradient, shape (B, out_features)
        """
        kernels.normalise_and_activate_backward(
            gradient,
            kept.outputs,
            kept.activations,
            kept.means,
            kept.rstds,
            self.norm_weight,
            self.negative_slope,
            gradients.norm_weight,
            gradients.norm_bias,
            gradients.bias,
        )

    def write_weight_gradient(self, inputs: th.Tensor, gradient: th.Tensor) -> None:
        """
        The gradient of the weight, into these arrays.

        :param inputs: x, shape (B, in_features)
        :param gradient: The gradient of x Wᵀ + b, shape (B, out_features)
        """
        if self.is_narrow:
            kernels.narrow_weight_gradient(inputs.numpy(), gradient.numpy(), self.weight)
        else:
            write_weight_gradient(self.linear, inputs, gradient)


class HeadArrays(NamedTuple):
    """The layers behind the encoder: their parameters, or the gradients of these."""

    hidden_layers: list[HiddenLayerArrays]
    final_weight: np.ndarray
    final_bias: np.ndarray

    @classmethod
    def of(cls, head: Head) -> "HeadArrays":
        """
        The arrays of a head.

        :param head: The head
        :return: Its arrays
        """
        hidden_layers = [*map(HiddenLayerArrays.of, head.hidden_layers)]
        return cls(hidden_layers, head.final_layer.weight.numpy(), head.final_layer.bias.numpy())

    def q_values(self, activations: np.ndarray) -> th.Tensor:
        """
        Q(s, ·), from the last activations.

        :param activations: These, shape (B, n)
        :return: Q values, shape (B, |A|)
        """
        q_values = np.empty((len(activations), len(self.final_bias)), activations.dtype)
        kernels.final_layer(activations, self.final_weight, self.final_bias, q_values)
        return th.from_numpy(q_values)


def is_compilable(head: Head | None) -> bool:
    """
    Whether the kernels compute what a head does.

    :param head: The head
    :return: Whether it has hidden layers, each with a LayerNorm, and float32 or float64 parameters
    """
    if head is None or not head.hidden_layers or head.final_layer.weight.dtype not in (th.float32, th.float64):
        return False
    norms_and_outputs = [(layer.layer_norm, layer.linear.weight.size(0)) for layer in head.hidden_layers]
    return all(norm is not None and norm.shape == [n_outputs] for norm, n_outputs in norms_and_outputs)


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

    def step(self) -> None:
        """One step of Adam."""
        self.step_counts += 1
        group, count = self.optimizer.param_groups[0], self.step_count.item()
        beta_1, beta_2 = group["betas"]
        step_size, root_correction = group["lr"] / (1 - beta_1**count), (1 - beta_2**count) ** -0.5
        number = self._arrays[0].dtype.type
        kernels.adam_step(
            *self._arrays,
            number(1 - beta_1),
            number(beta_2),
            number(1 - beta_2),
            number(step_size),
            number(root_correction),
            number(group["eps"]),
        )


class CompiledUpdate(FastUpdate):
    """
    The update for one policy on the CPU.

    Work that is large enough for several threads is left to :class:`FastUpdate`.

    :param policy: The policy, which :meth:`for_policy` has looked at; its parameters become views of flat tensors
    :param optimizer: Its optimizer
    """

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam) -> None:
        super().__init__(policy, optimizer)
        self.arrays, self.target_arrays = HeadArrays.of(self.head), HeadArrays.of(self.target_head)
        self.gradient_arrays, self._flat_gradient = HeadArrays.of(self.head_gradients), self.gradient.numpy()
        self._most_rows = SMALL_WORK // sum(parameter.numel() for parameter in policy.q_net.q_net.parameters())

    @classmethod
    def for_policy(cls, policy: LectureDQNPolicy) -> FastUpdate | None:
        """
        The fast update of a policy.

        :param policy: The policy
        :return: Its update; ``None`` also for hidden layers without LayerNorm, for none, and where Numba does not compile
        """
        fits = kernels.is_compiling() and isinstance(policy, LectureDQNPolicy) and is_compilable(read_head(policy.q_net))
        return super().for_policy(policy) if fits else None

    def _make_adam(self, optimizer: th.optim.Adam) -> FlatAdam:
        has_trained_encoder = any(True for _ in self.policy.q_net.features_extractor.parameters())
        # an encoder may have millions of parameters, and then there is work for several threads
        return (FlatAdam if has_trained_encoder else CompiledAdam)(optimizer, self.theta, self.gradient)

    def _q_values(self, features: th.Tensor) -> th.Tensor:
        if features.size(0) > self._most_rows:
            return super()._q_values(features)
        features = features.contiguous()
        for layer in self.target_arrays.hidden_layers:
            features = layer.affine(features)
            activations = features.numpy()
            layer.activate(activations, activations)
        return self.target_arrays.q_values(activations)

    def _selections(self, actions: th.Tensor, batch_size: int) -> th.Tensor:
        """The actions themselves where it is a kernel that looks for their Q values."""
        return super()._selections(actions, batch_size) if batch_size > self._most_rows else actions

    def _head_gradients_of(
        self, features: th.Tensor, selection: th.Tensor, batch_targets: Callable[[], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        if features.size(0) > self._most_rows:
            return super()._head_gradients_of(features, selection, batch_targets)
        kept = self._forward(features.contiguous())
        activations = kept[-1].activations
        q_values = self.arrays.q_values(activations)
        targets = batch_targets()
        if targets.shape != selection.shape:
            shapes = f"{tuple(selection.shape)}, got {tuple(targets.shape)}"
            raise ValueError(f"the targets of a batch must have the shape of its actions, {shapes}")
        gradient = np.empty_like(activations)
        kernels.squared_td_error_backward(
            activations,
            self.arrays.final_weight,
            q_values.numpy(),
            selection.numpy(),
            targets.contiguous().numpy(),
            gradient,
            self.gradient_arrays.final_weight,
            self.gradient_arrays.final_bias,
        )
        return q_values, targets, self._backward(kept, gradient)

    def _forward(self, features: th.Tensor) -> list[KeptLayer]:
        kept = []
        for layer in self.arrays.hidden_layers:
            outputs = layer.affine(features)
            activations = th.empty_like(outputs)
            arrays = outputs.numpy(), activations.numpy()
            kept.append(KeptLayer(features, *arrays, *layer.activate(*arrays)))
            features = activations
        return kept

    def _backward(self, kept: list[KeptLayer], gradient: np.ndarray) -> th.Tensor | None:
        """As :func:`sb3_lecture_dqn.fast.head.backward` for the hidden layers; the gradient is overwritten."""
        tasks: list[Task[None]] = []
        try:
            for index in reversed(range(len(kept))):
                layer, gradients = self.arrays.hidden_layers[index], self.gradient_arrays.hidden_layers[index]
                layer.backward_to_linear(gradients, kept[index], gradient)
                of_outputs = th.from_numpy(gradient)
                weight_gradient = partial(gradients.write_weight_gradient, kept[index].inputs, of_outputs)
                if index == 0 and not self.has_trained_encoder:
                    weight_gradient()
                    return None
                tasks.append(self.second_thread.start(weight_gradient))
                gradient = inputs_gradient(layer.linear, of_outputs).numpy()
        finally:  # so that nobody writes into the gradients later, even if this was interrupted
            for task in tasks:
                task.result()
        return th.from_numpy(gradient)

    def _squared_norm(self) -> th.Tensor:
        return th.from_numpy(np.array(kernels.squared_norm(self._flat_gradient), self._flat_gradient.dtype))
