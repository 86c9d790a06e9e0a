"""The head of the Q network on the CPU, as the compiled functions of :mod:`sb3_lecture_dqn.fast.kernels` take it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_lecture_dqn.fast import kernels, threads
from sb3_lecture_dqn.fast.compiling import Use
from sb3_lecture_dqn.fast.head import Head, HiddenLayer
from sb3_lecture_dqn.fast.products import LinearTensors
from sb3_lecture_dqn.fast.stored_transitions import StoredTransitions, Transitions, readable_record

#: Types of numbers that the kernels are for.
NUMPY_TYPES: dict[th.dtype, Any] = {th.float32: np.float32, th.float64: np.float64}

#: Numbers in a weight up to which the kernels' product keeps up with those of libraries, which divide larger ones into blocks.
MOST_WEIGHTS = 2**18


class Workspace(NamedTuple):
    """Memory of a hidden layer for B observations, which is used again in each step, so that it stays in the cache."""

    outputs: np.ndarray  # the Linear's, shape (B, n)
    activations: np.ndarray  # shape (B, n)
    gradient: np.ndarray  # of the activations, shape (B, n)
    means: np.ndarray  # of each row, shape (B,)
    rstds: np.ndarray  # 1 / standard deviation of each row, shape (B,)


class CompiledLayer(NamedTuple):
    """Linear → LayerNorm → LeakyReLU: its parameters, or their gradients, as arrays on the tensors' memory."""

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
        return cls(weight, bias, norm.weight.numpy(), norm.bias.numpy(), *settings)

    def workspace(self, n_rows: int) -> Workspace:
        """
        Memory for a gradient step.

        :param n_rows: B
        :return: The memory
        """
        shapes: list[tuple[int, ...]] = [*3 * [(n_rows, len(self.bias))], *2 * [(n_rows,)]]
        return Workspace(*(np.empty(shape, self.weight.dtype) for shape in shapes))


class CompiledHead(NamedTuple):
    """The layers behind the encoder: their parameters, or the gradients of these."""

    hidden_layers: tuple[CompiledLayer, ...]
    final_weight: np.ndarray
    final_bias: np.ndarray
    #: More rows are work for more threads than the kernels use; where there are any.
    most_rows: int

    @property
    def plain_hidden_layers(self) -> tuple[tuple[Any, ...], ...]:
        """The hidden layers as tuples without names."""
        return tuple(map(tuple, self.hidden_layers))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the weights."""
        return [weight.shape for weight in (*(layer.weight for layer in self.hidden_layers), self.final_weight)]

    @classmethod
    def of(cls, head: Head) -> "CompiledHead":
        """
        The arrays of a head.

        :param head: The head, for which :func:`is_compilable` holds
        :return: Its arrays
        """
        hidden_layers = tuple(map(CompiledLayer.of, head.hidden_layers))
        weight, bias = head.final_layer.weight.numpy(), head.final_layer.bias.numpy()
        n_parameters = weight.size + bias.size
        n_parameters += sum(layer.weight.size + 3 * layer.bias.size for layer in hidden_layers)
        return cls(hidden_layers, weight, bias, threads.SMALL_WORK // n_parameters)

    def workspaces(self, n_rows: int) -> tuple[Workspace, ...]:
        """
        Memory for a gradient step.

        :param n_rows: B
        :return: That of each hidden layer
        """
        return tuple(layer.workspace(n_rows) for layer in self.hidden_layers)

    def takes(self, features: th.Tensor | np.ndarray) -> bool:
        """
        Whether the kernels, which look at nothing, may have these features. If not, PyTorch says what is wrong, or takes them.

        :param features: What the encoder gives, shape (B, features_dim)
        :return: Whether they are of the first layer's number and type, and few rows where there are several threads
        """
        weight = self.hidden_layers[0].weight
        dtype = features.dtype if isinstance(features, np.ndarray) else NUMPY_TYPES.get(features.dtype)
        if features.ndim != 2 or features.shape[1] != weight.shape[1] or dtype != weight.dtype:
            return False
        return features.shape[0] <= self.most_rows or th.get_num_threads() == 1

    def for_one(self) -> Callable[[np.ndarray], np.ndarray]:
        """
        Q(s, ·) of one observation at a time.

        :return: Gives Q values, shape (1, |A|), of features of shape (1, features_dim), for which :meth:`takes` holds
        """
        return self._entry_of(kernels.q_values_of_one, self.plain_hidden_layers, self.final_weight, self.final_bias)

    def for_several(self) -> Callable[[np.ndarray], np.ndarray]:
        """
        Q(s, ·) of several observations at a time.

        :return: Gives Q values, shape (B, |A|), of features of shape (B, features_dim), for which :meth:`takes` holds
        """
        return self._entry_of(kernels.q_values, self)

    def _entry_of(self, kernel: Callable[..., Any], *of_head: Any) -> Callable[[np.ndarray], np.ndarray]:
        weight = self.hidden_layers[0].weight
        call = partial(kernels.entry_of(kernel, (*of_head, np.zeros((1, weight.shape[1]), weight.dtype))), *of_head)
        return lambda features: call(np.ascontiguousarray(features))


def is_compilable(head: Head) -> bool:
    """
    Whether the kernels compute what a head does.

    :param head: The head
    :return: Whether it has hidden layers, each with a LayerNorm, of shapes that fit one another, in one piece, not too large
    """
    n_inputs = head.hidden_layers[0].linear.weight.size(1) if head.hidden_layers else 0
    for linear, norm, _ in head.hidden_layers:
        n_outputs = linear.weight.size(0)
        if norm is None or norm.shape != [n_outputs] or norm.weight.shape != (n_outputs,) or norm.bias.shape != (n_outputs,):
            return False
        if not _is_of_shape(linear, n_inputs):
            return False
        n_inputs = n_outputs
    return bool(head.hidden_layers) and _is_of_shape(head.final_layer, n_inputs)


def _is_of_shape(linear: LinearTensors, n_inputs: int) -> bool:
    """Whether it takes so many features, has one bias for each output, lies in one piece and is not too large."""
    weight, bias = linear.weight, linear.bias
    fits = weight.size(1) == n_inputs and bias.shape == weight.shape[:1] and weight.dtype in NUMPY_TYPES
    return fits and weight.is_contiguous() and bias.is_contiguous() and weight.numel() <= MOST_WEIGHTS


def compile_kernels(dtype: th.dtype, n_hidden_layers: int, use: Use) -> None:
    """
    Compile the kernels, or read them from the disk.

    :param dtype: The type of the numbers
    :param n_hidden_layers: The number of hidden layers
    :param use: What they are for
    :raises Exception: whatever Numba raises if it cannot, for instance because the disk is full or what is on it is damaged
    """
    number = NUMPY_TYPES[dtype]
    row, matrix = np.zeros(1, number), np.zeros((1, 1), number)
    layer = CompiledLayer(matrix, row, row, row, number(0), number(0))
    head = CompiledHead(n_hidden_layers * (layer,), matrix, row, 1)
    transitions = Transitions.empty(1, 1, number)
    if use == Use.ACTING:
        kernels.compile_for_acting(head, matrix)
    elif use == Use.HEAD:
        kernels.compile_for_head(head, head.workspaces(1), transitions)
    else:
        stored = StoredTransitions.of(np.zeros(2, readable_record(n_features=1)), False)
        assert stored is not None
        kernels.compile_for_steps(head, head.workspaces(1), stored, transitions)
