"""The head of the Q network on the CPU, with what lies between the matrix products compiled."""

from typing import NamedTuple

import numpy as np
import torch as th

from sb3_lecture_dqn.fast import kernels, threads
from sb3_lecture_dqn.fast.head import Head, HiddenLayer
from sb3_lecture_dqn.fast.products import LinearTensors, affine, write_weight_gradient

#: Features up to which a product is computed by a loop of ours, which begins at once.
FEW_FEATURES = 32


class Workspace(NamedTuple):
    """What the forward pass of a hidden layer leaves for the backward pass of the same B observations."""

    outputs: th.Tensor | None  # the Linear's, shape (B, n); a product gives a tensor of its own
    activations: th.Tensor  # shape (B, n)
    means: np.ndarray  # of each row
    rstds: np.ndarray  # 1 / standard deviation of each row

    @classmethod
    def of(cls, layer: "CompiledLayer", n_rows: int) -> "Workspace":
        """
        Memory that is used again in each step, so that it stays in the cache.

        :param layer: The layer
        :param n_rows: B
        :return: The memory
        """
        outputs, activations = (layer.linear.weight.new_empty(n_rows, len(layer.weight)) for _ in range(2))
        return cls(outputs if layer.is_narrow else None, activations, *np.empty((2, n_rows), layer.weight.dtype))


class KeptLayer(NamedTuple):
    """What the forward pass of a hidden layer keeps for the backward pass: arrays of B rows, or of B numbers."""

    inputs: th.Tensor
    outputs: np.ndarray
    activations: np.ndarray
    means: np.ndarray
    rstds: np.ndarray


class CompiledLayer(NamedTuple):
    """Linear → LayerNorm → LeakyReLU: its parameters, or their gradients, as arrays on the tensors' memory."""

    linear: LinearTensors
    weight: np.ndarray
    bias: np.ndarray
    norm_weight: np.ndarray
    norm_bias: np.ndarray
    epsilon: float
    negative_slope: float

    @classmethod
    def of(cls, layer: HiddenLayer) -> "CompiledLayer":
        """
        The arrays of a layer.

        :param layer: The layer
        :return: Its arrays
        """
        norm = layer.layer_norm
        assert norm is not None  # is_compilable has looked
        weight, bias = layer.linear.weight.numpy(), layer.linear.bias.numpy()
        number = weight.dtype.type  # of the arrays' type, so that all is computed in it
        settings = number(norm.epsilon), number(layer.negative_slope)
        return cls(layer.linear, weight, bias, norm.weight.numpy(), norm.bias.numpy(), *settings)

    @property
    def is_narrow(self) -> bool:
        """Whether the layer has so few features that its products are kernels too."""
        return bool(self.weight.shape[1] <= FEW_FEATURES)

    def affine(self, inputs: th.Tensor, place: th.Tensor | None = None) -> th.Tensor:
        """
        x Wᵀ + b.

        :param inputs: x, shape (B, in_features)
        :param place: Where it may be written, shape (B, out_features)
        :return: shape (B, out_features)
        """
        if not self.is_narrow:
            return affine(self.linear, inputs)
        outputs = inputs.new_empty(inputs.size(0), len(self.weight)) if place is None else place
        kernels.narrow_affine(inputs.numpy(), self.weight, self.bias, outputs.numpy())
        return outputs

    def activate_one(self, inputs: np.ndarray, activations: np.ndarray) -> None:
        """
        The whole layer for one observation, where there are too few numbers for a matrix product.

        :param inputs: x, shape (1, in_features)
        :param activations: Where the result is written, shape (1, out_features)
        """
        norm = self.norm_weight, self.norm_bias
        kernels.hidden_layer_of_one(inputs, self.weight, self.bias, *norm, self.epsilon, self.negative_slope, activations)

    def activate(self, outputs: np.ndarray, activations: np.ndarray, means: np.ndarray, rstds: np.ndarray) -> None:
        """
        LayerNorm → LeakyReLU.

        :param outputs: What the Linear gave, shape (B, out_features)
        :param activations: Where the result is written, shape (B, out_features); may be ``outputs``
        :param means: Where the mean of each row is written
        :param rstds: Where 1 / standard deviation of each row is written
        """
        norm = self.norm_weight, self.norm_bias
        kernels.normalise_and_activate(outputs, *norm, self.epsilon, self.negative_slope, activations, means, rstds)

    def backward_to_linear(self, gradients: "CompiledLayer", kept: KeptLayer, gradient: np.ndarray) -> None:
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


class CompiledHead(NamedTuple):
    """The layers behind the encoder: their parameters, or the gradients of these."""

    hidden_layers: list[CompiledLayer]
    final_weight: np.ndarray
    final_bias: np.ndarray
    #: More rows are work for several threads, which the kernels do not use; where there are any.
    most_rows: int

    @classmethod
    def of(cls, head: Head) -> "CompiledHead":
        """
        The arrays of a head.

        :param head: The head, for which :func:`is_compilable` holds
        :return: Its arrays
        """
        hidden_layers = [*map(CompiledLayer.of, head.hidden_layers)]
        weight, bias = head.final_layer.weight.numpy(), head.final_layer.bias.numpy()
        n_parameters = weight.size + bias.size
        n_parameters += sum(layer.weight.size + 3 * layer.bias.size for layer in hidden_layers)
        return cls(hidden_layers, weight, bias, threads.SMALL_WORK // n_parameters)

    def takes(self, features: th.Tensor | np.ndarray) -> bool:
        """
        Whether the kernels, which look at nothing, may have these features. If not, PyTorch says what is wrong, or takes them.

        :param features: What the encoder gives, shape (B, features_dim)
        :return: Whether they are of the first layer's number and type, and few rows where there are several threads
        """
        weight = self.hidden_layers[0].weight if isinstance(features, np.ndarray) else self.hidden_layers[0].linear.weight
        if features.ndim != 2 or features.shape[1] != weight.shape[1] or features.dtype != weight.dtype:
            return False
        return features.shape[0] <= self.most_rows or th.get_num_threads() == 1

    def q_values(self, features: th.Tensor) -> th.Tensor:
        """
        Q(s, ·).

        :param features: What the encoder gives, shape (B, features_dim), for which :meth:`takes` holds
        :return: Q values, shape (B, |A|)
        """
        features = features.contiguous()
        means, rstds = np.empty((2, features.size(0)), self.final_weight.dtype)
        for layer in self.hidden_layers:
            features = layer.affine(features)
            activations = features.numpy()
            layer.activate(activations, activations, means, rstds)
        return self.final_layer(activations)

    def places_of_one(self) -> list[np.ndarray]:
        """
        Memory for one observation.

        :return: Where the activations of each hidden layer and the Q values may be written, each of shape (1, n)
        """
        widths = [*(len(layer.bias) for layer in self.hidden_layers), len(self.final_bias)]
        return [np.empty((1, width), self.final_bias.dtype) for width in widths]

    def q_values_of_one(self, features: np.ndarray, places: list[np.ndarray]) -> np.ndarray:
        """
        Q(s, ·) of one observation.

        :param features: What the encoder gives, shape (1, features_dim), for which :meth:`takes` holds
        :param places: What :meth:`places_of_one` gave
        :return: Q values, shape (1, |A|), in the last of the places
        """
        features = np.ascontiguousarray(features)
        *places, q_values = places
        for layer, place in zip(self.hidden_layers, places, strict=True):
            layer.activate_one(features, place)
            features = place
        kernels.final_layer(features, self.final_weight, self.final_bias, q_values)
        return q_values

    def forward_for_backward(self, features: th.Tensor, workspaces: list[Workspace]) -> list[KeptLayer]:
        """
        The hidden layers, keeping what the backward pass needs.

        :param features: What the encoder gives, shape (B, features_dim), for which :meth:`takes` holds
        :param workspaces: Of each layer, for B rows
        :return: What each layer keeps
        """
        kept = []
        features = features.contiguous()
        for layer, (place, activations, means, rstds) in zip(self.hidden_layers, workspaces, strict=True):
            outputs = layer.affine(features, place).numpy()
            kept.append(KeptLayer(features, outputs, activations.numpy(), means, rstds))
            layer.activate(*kept[-1][1:])
            features = activations
        return kept

    def final_layer(self, activations: np.ndarray) -> th.Tensor:
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
    :return: Whether it has hidden layers, each with a LayerNorm, of shapes that fit one another, as float32 or float64, and
        Numba compiles
    """
    if not kernels.is_compiling() or head is None or not head.hidden_layers:
        return False
    dtype, n_inputs = head.final_layer.weight.dtype, head.hidden_layers[0].linear.weight.size(1)
    for linear, norm, _ in head.hidden_layers:
        n_outputs = linear.weight.size(0)
        if norm is None or norm.shape != [n_outputs] or norm.weight.shape != (n_outputs,) or norm.bias.shape != (n_outputs,):
            return False
        if not _is_of_shape(linear, n_inputs):
            return False
        n_inputs = n_outputs
    return dtype in (th.float32, th.float64) and _is_of_shape(head.final_layer, n_inputs)


def _is_of_shape(linear: LinearTensors, n_inputs: int) -> bool:
    """Whether it takes so many features, and has one bias for each output."""
    return linear.weight.size(1) == n_inputs and linear.bias.shape == linear.weight.shape[:1]
