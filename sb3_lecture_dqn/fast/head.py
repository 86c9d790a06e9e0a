"""
The head of the Q network, ``[Linear → LayerNorm → LeakyReLU] × n → Linear``, forward and backward by hand.

It computes what ``QNetwork.q_net`` and autograd compute, without modules and without a graph.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, repeat
from operator import is_
from typing import Any, NamedTuple, TypeGuard

import torch as th
from torch import nn

from sb3_lecture_dqn.fast.products import LinearTensors, affine, inputs_gradient, write_gradients
from sb3_lecture_dqn.fast.second_thread import SecondThread, Task, Work, wait_for_all
from sb3_lecture_dqn.policies import QNetwork

#: Methods of a network and its layers that the fast path does the work of, or goes around.
CALLED_METHODS = frozenset({"forward", "extract_features", "predict", "_predict", "obs_to_tensor"})

#: What a layer's attributes are called that its forward pass depends on.
SETTINGS = frozenset({"negative_slope", "eps"})

# A loop in C: this is asked before each rollout and each training.
_are_disjoint: Callable[..., bool] = type({}.keys()).isdisjoint

# Without the overload's name PyTorch would look for it at each call.
_layer_norm_backward = th.ops.aten.native_layer_norm_backward.default
_leaky_relu_backward = th.ops.aten.leaky_relu_backward.grad_input

# Tensors stand here instead of modules: asking a module for a parameter takes as long as a small operation.


class LayerNormTensors(NamedTuple):
    """Of a LayerNorm, with its two settings."""

    weight: th.Tensor
    bias: th.Tensor
    shape: list[int]
    epsilon: float


class HiddenLayer(NamedTuple):
    """Linear → LayerNorm (or nothing) → LeakyReLU, whose slope is 0 for ReLU."""

    linear: LinearTensors
    layer_norm: LayerNormTensors | None
    negative_slope: float


class Head(NamedTuple):
    """The layers behind the encoder: their parameters, or the gradients of these."""

    hidden_layers: list[HiddenLayer]
    final_layer: LinearTensors


def gradient_of(parameter: th.Tensor) -> th.Tensor:
    """
    The place of a parameter's gradient, which the fast update allocated.

    :param parameter: The parameter
    :return: Its ``.grad``
    """
    assert parameter.grad is not None
    return parameter.grad


def read_head(q_net: QNetwork, tensor_of: Callable[[th.Tensor], th.Tensor] = th.Tensor.detach) -> Head | None:
    """
    The layers of a Q network, if they are of the lecture's kind.

    :param q_net: The network
    :param tensor_of: What to take of a parameter, by default the memory of its values; or :func:`gradient_of`
    :return: Its layers; ``None`` if there is any other layer, a hook, or a forward pass or features of a user's own
    """
    is_the_lectures = all(is_own_method(q_net, name, QNetwork) for name in ("forward", "extract_features"))
    if not is_the_lectures or replaces_methods(q_net) or type(q_net.q_net) is not nn.Sequential or any(hooks_of(q_net)):
        return None
    *layers, final_layer = q_net.q_net
    hidden_layers: list[HiddenLayer] = []
    while layers:
        linear = layers.pop(0)
        layer_norm = layers[0] if layers and type(layers[0]) is nn.LayerNorm else None
        layers = layers[1:] if layer_norm is not None else layers
        activation = layers.pop(0) if layers else None
        slope = _negative_slope(activation)
        if slope is None or not _is_full_linear(linear):
            return None
        if layer_norm is not None and (layer_norm.weight is None or layer_norm.bias is None):
            return None
        hidden_layers.append(
            HiddenLayer(
                _linear_tensors(linear, tensor_of),
                None if layer_norm is None else _layer_norm_tensors(layer_norm, tensor_of),
                slope,
            )
        )
    return Head(hidden_layers, _linear_tensors(final_layer, tensor_of)) if _is_full_linear(final_layer) else None


def _negative_slope(activation: nn.Module | None) -> float | None:
    if type(activation) is nn.ReLU:
        return 0.0
    # with a slope below 0 the output would not tell on which side the input was
    return activation.negative_slope if type(activation) is nn.LeakyReLU and activation.negative_slope >= 0 else None


def _is_full_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.bias is not None


def _linear_tensors(layer: nn.Linear, tensor_of: Callable[[th.Tensor], th.Tensor]) -> LinearTensors:
    return LinearTensors.of(tensor_of(layer.weight), tensor_of(layer.bias))


def _layer_norm_tensors(layer: nn.LayerNorm, tensor_of: Callable[[th.Tensor], th.Tensor]) -> LayerNormTensors:
    return LayerNormTensors(tensor_of(layer.weight), tensor_of(layer.bias), list(layer.normalized_shape), layer.eps)


def is_own_method(owner: Any, name: str, cls: type) -> bool:
    """
    Whether an object has a method from a class, replaced neither by a subclass nor in the object itself.

    :param owner: The object
    :param name: Name of the method
    :param cls: The class
    :return: Whether it is the class's own
    """
    return getattr(getattr(owner, name), "__func__", None) is getattr(cls, name)


def replaces_methods(network: nn.Module) -> bool:
    """
    Whether somebody has put a method of their own into a network, or into one of its layers.

    :param network: The network
    :return: Whether one of them has, as an attribute, what acting or training would call
    """
    return not all(CALLED_METHODS.isdisjoint(vars(module)) for module in network.modules())


def hooks_of(q_net: QNetwork) -> list[dict[int, Any]]:
    """
    What holds the hooks of a Q network, its encoder and all of their layers, and the hooks of all modules there are.

    :param q_net: The network
    :return: Dictionaries that are empty as long as no hook is registered
    """
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    of_all_modules: list[dict[int, Any]] = [getattr(nn.modules.module, f"_global_{kind}") for kind in kinds]
    return of_all_modules + [getattr(module, f"_{kind}") for module in q_net.modules() for kind in kinds]


def have_hooks(parameters: Iterable[th.Tensor]) -> bool:
    """
    Whether somebody wants to see the gradients of parameters, or to change them.

    :param parameters: The parameters
    :return: Whether one of them has a hook
    """
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


class Composition:
    """
    What a network is made of, to see whether somebody has exchanged a layer, a parameter, a method or a layer's setting.

    :param network: The network
    """

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        registries: list[dict[str, Any]] = [registry for m in modules for registry in (m._modules, m._parameters)]
        # what has no layers or parameters now does nothing with those that it is given later
        self._registries = [registry for registry in registries if registry]
        self._names = [vars(module).keys() for module in modules]  # the attributes' names at any time
        self._settings_of = [vars(m) for m in modules if not SETTINGS.isdisjoint(vars(m))]
        self._contents, self._settings = self._read(), self._read_settings()

    def _read(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._registries)))

    def _read_settings(self) -> list[Any]:
        return [attributes.get(setting) for attributes in self._settings_of for setting in SETTINGS]

    def is_unchanged(self) -> bool:
        """
        Whether all modules and parameters are the same objects as when this was made, with the same settings, and the methods
        of their classes.

        :return: Whether they are
        """
        contents = self._read()
        is_same = len(contents) == len(self._contents) and all(map(is_, contents, self._contents))
        has_own_methods = all(map(_are_disjoint, self._names, repeat(CALLED_METHODS)))
        return is_same and has_own_methods and self._read_settings() == self._settings


class HeadPass(NamedTuple):
    """What a forward pass keeps for the backward pass: for each hidden layer what is named, and the Q values."""

    inputs: list[th.Tensor]
    linear_outputs: list[th.Tensor]
    means_and_rstds: list[list[th.Tensor]]  # each empty where there is no LayerNorm
    q_values: th.Tensor


# Temporaries are a good part of the cache, so what is not needed again is overwritten.


def forward(head: Head, features: th.Tensor) -> th.Tensor:
    """
    Q(s, ·) of the head.

    :param head: The layers
    :param features: What the encoder gives, shape (B, features_dim)
    :return: The Q values, shape (B, |A|)
    """
    for linear, layer_norm, negative_slope in head.hidden_layers:
        features = affine(linear, features)
        if layer_norm is not None:
            features, _, _ = _normalise(features, layer_norm)
        nn.functional.leaky_relu_(features, negative_slope)
    return affine(head.final_layer, features)


def forward_for_backward(head: Head, features: th.Tensor) -> HeadPass:
    """
    The same, keeping what :func:`backward` needs.

    :param head: The layers
    :param features: What the encoder gives, shape (B, features_dim)
    :return: The Q values and the rest
    """
    inputs, linear_outputs, means_and_rstds = [features], [], []
    for linear, layer_norm, negative_slope in head.hidden_layers:
        output = affine(linear, inputs[-1])
        mean_and_rstd: list[th.Tensor] = []
        linear_outputs.append(output)
        if layer_norm is not None:
            output, *mean_and_rstd = _normalise(output, layer_norm)
        means_and_rstds.append(mean_and_rstd)
        inputs.append(nn.functional.leaky_relu_(output, negative_slope))
    return HeadPass(inputs, linear_outputs, means_and_rstds, affine(head.final_layer, inputs[-1]))


def backward(
    head: Head, gradients: Head, forward_pass: HeadPass, gradient: th.Tensor, needs_features: bool, second_thread: SecondThread
) -> th.Tensor | None:
    """
    The gradients of the head's parameters.

    :param head: The layers
    :param gradients: Where to write the gradients of their parameters
    :param forward_pass: What :func:`forward_for_backward` gave
    :param gradient: The gradient of the Q values, shape (B, |A|)
    :param needs_features: Whether the gradient of the features is needed
    :param second_thread: What computes the weights' gradients while this goes on with the layers below
    :return: The gradient of the features, shape (B, features_dim), if needed
    """
    write_gradients(gradients.final_layer, forward_pass.inputs[-1], gradient)
    gradient = inputs_gradient(head.final_layer, gradient)
    tasks: list[Task[None]] = []
    try:
        for index in reversed(range(len(head.hidden_layers))):
            layer, layer_gradients = head.hidden_layers[index], gradients.hidden_layers[index]
            gradient = _backward_to_linear(layer, layer_gradients, forward_pass, index, gradient)
            linear_gradients = partial(write_gradients, layer_gradients.linear, forward_pass.inputs[index], gradient)
            if index > 0 or needs_features:
                tasks.append(second_thread.start(linear_gradients, Work.GRADIENTS))
                gradient = inputs_gradient(layer.linear, gradient)
            else:
                linear_gradients()
    finally:  # so that nobody writes into the gradients later, even if this was interrupted
        wait_for_all(tasks)
    return gradient if needs_features else None


def _backward_to_linear(
    layer: HiddenLayer, gradients: HiddenLayer, forward_pass: HeadPass, index: int, gradient: th.Tensor
) -> th.Tensor:
    """From the gradient of a layer's output, which is overwritten, to that of its Linear's output."""
    # LeakyReLU keeps the sign, so its output tells its slope as well as its input does
    _leaky_relu_backward(gradient, forward_pass.inputs[index + 1], layer.negative_slope, True, grad_input=gradient)
    if layer.layer_norm is None or gradients.layer_norm is None:
        return gradient
    gradient, weight_gradient, bias_gradient = _layer_norm_backward(
        gradient,
        forward_pass.linear_outputs[index],
        layer.layer_norm.shape,
        *forward_pass.means_and_rstds[index],
        layer.layer_norm.weight,
        layer.layer_norm.bias,
        [True, True, True],
    )
    gradients.layer_norm.weight.copy_(weight_gradient)
    gradients.layer_norm.bias.copy_(bias_gradient)
    return gradient


def _normalise(inputs: th.Tensor, layer_norm: LayerNormTensors) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    return th.native_layer_norm(inputs, layer_norm.shape, layer_norm.weight, layer_norm.bias, layer_norm.epsilon)
