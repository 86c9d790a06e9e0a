"""
The matrix products of a Linear layer, forward and backward, by the library that is quicker on this processor.

PyTorch has MKL multiply float32 matrices, and MKL keeps to AVX2 on a processor that is not Intel's. oneDNN, which PyTorch has
for convolutions, uses AVX-512 wherever it is: a large product then takes half of the time.
"""

import math
import platform
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch as th

#: Multiply-adds from which a product is large enough for oneDNN's overhead.
LARGE_PRODUCT = 2**21

#: x Wᵀ + b by oneDNN, which PyTorch's compiler uses. It takes x, W, b or ``None``, and three arguments that are left empty.
ONEDNN_LINEAR: Any = getattr(getattr(th.ops.mkldnn, "_linear_pointwise", None), "default", None)


class LinearTensors(NamedTuple):
    """Of a Linear layer, or the gradients of these; the transpose is a view."""

    weight: th.Tensor
    transposed_weight: th.Tensor
    bias: th.Tensor
    #: From how many rows of its other factor a product with the weight is one for oneDNN.
    onednn_rows: float

    @classmethod
    def of(cls, weight: th.Tensor, bias: th.Tensor) -> "LinearTensors":
        """
        The tensors of a layer.

        :param weight: Its weight, shape (out_features, in_features)
        :param bias: Its bias, shape (out_features,)
        :return: These
        """
        is_of_cpu = weight.device.type == "cpu" and weight.dtype == th.float32
        is_by_both = is_of_cpu and is_onednn_quicker() and bool(th.backends.mkldnn.enabled)
        return cls(weight, weight.t(), bias, LARGE_PRODUCT / weight.numel() if is_by_both else math.inf)


# size(0) and not len(): that asks whether somebody has put a method into the tensor's class


def affine(linear: LinearTensors, inputs: th.Tensor) -> th.Tensor:
    """
    x Wᵀ + b.

    :param linear: W and b
    :param inputs: x, shape (B, in_features)
    :return: shape (B, out_features)
    """
    if inputs.size(0) >= linear.onednn_rows:
        return ONEDNN_LINEAR(inputs, linear.weight, linear.bias, "none", [], "")  # type: ignore[no-any-return]
    return th.addmm(linear.bias, inputs, linear.transposed_weight)


def inputs_gradient(linear: LinearTensors, gradient: th.Tensor) -> th.Tensor:
    """
    The gradient of x.

    :param linear: W and b
    :param gradient: The gradient of x Wᵀ + b, shape (B, out_features)
    :return: shape (B, in_features)
    """
    if gradient.size(0) >= linear.onednn_rows:
        return ONEDNN_LINEAR(gradient, linear.transposed_weight, None, "none", [], "")  # type: ignore[no-any-return]
    return th.mm(gradient, linear.weight)


def write_gradients(gradients: LinearTensors, inputs: th.Tensor, gradient: th.Tensor) -> None:
    """
    The gradients of W and b.

    :param gradients: Where they are written
    :param inputs: x, shape (B, in_features)
    :param gradient: The gradient of x Wᵀ + b, shape (B, out_features)
    """
    write_weight_gradient(gradients, inputs, gradient)
    th.sum(gradient, dim=0, out=gradients.bias)


def write_weight_gradient(gradients: LinearTensors, inputs: th.Tensor, gradient: th.Tensor) -> None:
    """
    The gradient of W.

    :param gradients: Where it is written
    :param inputs: x, shape (B, in_features)
    :param gradient: The gradient of x Wᵀ + b, shape (B, out_features)
    """
    if inputs.size(0) >= gradients.onednn_rows:
        # x of an encoder of a user's own may have gaps, and oneDNN takes a thousand times as long for a W that has
        gradients.weight.copy_(ONEDNN_LINEAR(gradient.t(), inputs.contiguous().t(), None, "none", [], ""))
    else:
        th.mm(gradient.t(), inputs, out=gradients.weight)


@cache
def is_onednn_quicker() -> bool:
    """
    Whether MKL leaves half of this processor idle. That is not measured, so that a machine always computes the same bits.

    :return: Whether the processor has AVX-512 and is AMD's, or Hygon's like it, and PyTorch has both libraries
    """
    has_mkl, has_onednn = th.backends.mkl.is_available(), th.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    has_both = has_mkl and has_onednn and ONEDNN_LINEAR is not None
    has_avx512 = th.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and has_avx512 and any(maker in processor_description() for maker in ("AuthenticAMD", "HygonGenuine"))


def processor_description() -> str:
    """
    What the system says of the processor.

    :return: A text that names its maker, where the system says it
    """
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
