"""
The matrix products of a Linear layer, forward and backward, by the library that is quicker on this processor.

PyTorch has MKL multiply float32 matrices, and MKL keeps to AVX2 on a processor that is not Intel's. oneDNN, which PyTorch has
for convolutions, uses AVX-512 wherever it is: a large product then takes half of the time.
"""

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch as th

#: Multiply-adds from which a product is large enough for oneDNN's overhead.
LARGE_PRODUCT = 2**21


class LinearTensors(NamedTuple):
    """Of a Linear layer, or the gradients of these; the transpose is a view."""

    weight: th.Tensor
    transposed_weight: th.Tensor
    bias: th.Tensor
    onednn_linear: Callable[..., Any] | None

    @classmethod
    def of(cls, weight: th.Tensor, bias: th.Tensor) -> "LinearTensors":
        """
        The tensors of a layer.

        :param weight: Its weight, shape (out_features, in_features)
        :param bias: Its bias, shape (out_features,)
        :return: These, with oneDNN's product where it is the quicker one
        """
        is_of_cpu = weight.device.type == "cpu" and weight.dtype == th.float32
        return cls(weight, weight.t(), bias, onednn_linear() if is_of_cpu and is_onednn_quicker() else None)

    def is_large(self, n_rows: int) -> bool:
        """
        Whether a product with the weight is one for oneDNN.

        :param n_rows: Number of rows of the other factor
        :return: Whether it is
        """
        return self.onednn_linear is not None and n_rows * self.weight.numel() >= LARGE_PRODUCT


def affine(linear: LinearTensors, inputs: th.Tensor) -> th.Tensor:
    """
    x Wᵀ + b.

    :param linear: W and b
    :param inputs: x, shape (B, in_features)
    :return: shape (B, out_features)
    """
    if linear.onednn_linear is not None and linear.is_large(len(inputs)):
        return linear.onednn_linear(inputs, linear.weight, linear.bias, "none", [], "")  # type: ignore[no-any-return]
    return th.addmm(linear.bias, inputs, linear.transposed_weight)


def inputs_gradient(linear: LinearTensors, gradient: th.Tensor) -> th.Tensor:
    """
    The gradient of x.

    :param linear: W and b
    :param gradient: The gradient of x Wᵀ + b, shape (B, out_features)
    :return: shape (B, in_features)
    """
    if linear.onednn_linear is not None and linear.is_large(len(gradient)):
        return linear.onednn_linear(gradient, linear.transposed_weight, None, "none", [], "")  # type: ignore[no-any-return]
    return th.mm(gradient, linear.weight)


def write_gradients(gradients: LinearTensors, inputs: th.Tensor, gradient: th.Tensor) -> None:
    """
    The gradients of W and b.

    :param gradients: Where they are written
    :param inputs: x, shape (B, in_features)
    :param gradient: The gradient of x Wᵀ + b, shape (B, out_features)
    """
    if gradients.onednn_linear is not None and gradients.is_large(len(inputs)):
        gradients.weight.copy_(gradients.onednn_linear(gradient.t(), inputs.t(), None, "none", [], ""))
    else:
        th.mm(gradient.t(), inputs, out=gradients.weight)
    th.sum(gradient, dim=0, out=gradients.bias)


def onednn_linear() -> Callable[..., Any]:
    """
    PyTorch's operation for x Wᵀ + b by oneDNN, which its compiler uses.

    :return: It takes x, W, b or ``None``, and three arguments that are left empty
    """
    operation: Callable[..., Any] = th.ops.mkldnn._linear_pointwise.default
    return operation


@cache
def is_onednn_quicker() -> bool:
    """
    Whether MKL leaves half of this processor's width idle. It is not measured, so that a machine always computes the same bits.

    :return: Whether the processor has AVX-512 and is not Intel's, and PyTorch has both libraries
    """
    has_both = th.backends.mkl.is_available() and th.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_both and th.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in processor_description()


def processor_description() -> str:
    """
    What the system says of the processor.

    :return: A text that names its maker
    """
    of_linux = Path("/proc/cpuinfo")
    return of_linux.read_text() if of_linux.exists() else platform.processor()
