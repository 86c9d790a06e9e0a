"""
The head of the Q network, ``[Linear → LayerNorm → LeakyReLU] × n → Linear``, forward and backward by hand.

It computes what ``QNetwork.q_net`` and autograd compute, without modules and without a graph.
"""

from typing import NamedTuple, TypeGuard

import torch as th
from torch import nn

from sb3_lecture_dqn.policies import QNetwork


class HiddenLayer(NamedTuple):
    """Linear → LayerNorm (or nothing) → LeakyReLU, whose slope is 0 for ReLU."""

    linear: nn.Linear
    layer_norm: nn.LayerNorm | None
    negative_slope: float


class Head(NamedTuple):
    """The layers behind the encoder."""

    hidden_layers: list[HiddenLayer]
    final_layer: nn.Linear


def read_head(q_net: QNetwork) -> Head | None:
    """
    The layers of a Q network, if they are of the lecture's kind.

    :param q_net: The network
    :return: Its layers; ``None`` if there is any other layer, a hook, or a forward pass of a user's own
    """
    if type(q_net).forward is not QNetwork.forward or has_hooks(q_net):
        return None
    *layers, final_layer = q_net.q_net
    hidden_layers: list[HiddenLayer] = []
    while layers:
        linear = layers.pop(0)
        layer_norm = layers[0] if layers and isinstance(layers[0], nn.LayerNorm) else None
        layers = layers[1:] if layer_norm is not None else layers
        activation = layers.pop(0) if layers else None
        if not _is_full_linear(linear) or type(activation) not in (nn.LeakyReLU, nn.ReLU):
            return None
        if layer_norm is not None and (layer_norm.weight is None or layer_norm.bias is None):
            return None
        hidden_layers.append(HiddenLayer(linear, layer_norm, getattr(activation, "negative_slope", 0.0)))
    return Head(hidden_layers, final_layer) if _is_full_linear(final_layer) else None


def _is_full_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.bias is not None


def has_hooks(q_net: QNetwork) -> bool:
    """
    Whether something wants to see the passes through a Q network.

    :param q_net: The network
    :return: Whether a hook is registered on it, its encoder or one of its layers
    """
    modules = (q_net, q_net.features_extractor, *q_net.q_net)
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


class HeadPass(NamedTuple):
    """What a forward pass keeps for the backward pass: for each hidden layer what is named, and the Q values."""

    inputs: list[th.Tensor]
    linear_outputs: list[th.Tensor]
    means_and_rstds: list[tuple[th.Tensor, th.Tensor]]
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
        features = th.addmm(linear.bias, features, linear.weight.t())
        if layer_norm is not None:
            features, _, _ = _normalise(features, layer_norm)
        nn.functional.leaky_relu_(features, negative_slope)
    return th.addmm(head.final_layer.bias, features, head.final_layer.weight.t())


def forward_for_backward(head: Head, features: th.Tensor) -> HeadPass:
    """
    The same, keeping what :func:`backward` needs.

    :param head: The layers
    :param features: What the encoder gives, shape (B, features_dim)
    :return: The Q values and the rest
    """
    inputs, linear_outputs, means_and_rstds = [features], [], []
    for linear, layer_norm, negative_slope in head.hidden_layers:
        output = th.addmm(linear.bias, inputs[-1], linear.weight.t())
        mean = rstd = output
        linear_outputs.append(output)
        if layer_norm is not None:
            output, mean, rstd = _normalise(output, layer_norm)
        means_and_rstds.append((mean, rstd))
        inputs.append(nn.functional.leaky_relu_(output, negative_slope))
    q_values = th.addmm(head.final_layer.bias, inputs[-1], head.final_layer.weight.t())
    return HeadPass(inputs, linear_outputs, means_and_rstds, q_values)


def backward(head: Head, made: HeadPass, gradient: th.Tensor, needs_features: bool) -> th.Tensor | None:
    """
    Write the gradients of the head's parameters into their ``.grad``.

    :param head: The layers
    :param made: The forward pass
    :param gradient: The gradient of the Q values, shape (B, |A|)
    :param needs_features: Whether the gradient of the features is needed
    :return: The gradient of the features, shape (B, features_dim), if needed
    """
    _linear_gradients(head.final_layer, made.inputs[-1], gradient)
    gradient = gradient @ head.final_layer.weight
    for index in reversed(range(len(head.hidden_layers))):
        linear, layer_norm, negative_slope = head.hidden_layers[index]
        # LeakyReLU keeps the sign, so its output tells its slope as well as its input does
        th.ops.aten.leaky_relu_backward(gradient, made.inputs[index + 1], negative_slope, True, grad_input=gradient)
        if layer_norm is not None:
            gradient = _layer_norm_gradients(layer_norm, made.linear_outputs[index], *made.means_and_rstds[index], gradient)
        _linear_gradients(linear, made.inputs[index], gradient)
        if index > 0 or needs_features:
            gradient = gradient @ linear.weight
    return gradient if needs_features else None


def _normalise(inputs: th.Tensor, layer_norm: nn.LayerNorm) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    return th.native_layer_norm(inputs, layer_norm.normalized_shape, layer_norm.weight, layer_norm.bias, layer_norm.eps)


def _layer_norm_gradients(
    layer_norm: nn.LayerNorm, inputs: th.Tensor, mean: th.Tensor, rstd: th.Tensor, gradient: th.Tensor
) -> th.Tensor:
    needed = [True, True, True]
    gradient, weight_gradient, bias_gradient = th.ops.aten.native_layer_norm_backward(
        gradient, inputs, layer_norm.normalized_shape, mean, rstd, layer_norm.weight, layer_norm.bias, needed
    )
    gradient_of(layer_norm.weight).copy_(weight_gradient)
    gradient_of(layer_norm.bias).copy_(bias_gradient)
    return gradient


def _linear_gradients(linear: nn.Linear, inputs: th.Tensor, gradient: th.Tensor) -> None:
    th.mm(gradient.t(), inputs, out=gradient_of(linear.weight))
    th.sum(gradient, dim=0, out=gradient_of(linear.bias))


def gradient_of(parameter: th.Tensor) -> th.Tensor:
    """
    The place of a parameter's gradient, which the fast update allocated.

    :param parameter: The parameter
    :return: Its ``.grad``
    """
    assert parameter.grad is not None
    return parameter.grad
