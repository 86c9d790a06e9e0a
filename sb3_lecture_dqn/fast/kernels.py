"""
What lies between the matrix products of a gradient step, compiled for the CPU by Numba: loops that pass over the memory once.

PyTorch has an operation for each of LayerNorm, LeakyReLU, their gradients and the sums over a batch, and each of them passes
over all activations. Here a row of 256 numbers is read once and stays in the smallest cache until all is done with it.

All arrays are C-contiguous and of one type, ``float32`` or ``float64``. Nothing looks at their shapes here:
:mod:`sb3_lecture_dqn.fast.compiled_head` does.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

#: Sums may be made in another order, without which only one number is added at a time. NaN and ∞ stay what they are, and a
#: division is one: its approximation ("arcp") would not be.
FAST_MATH = {"reassoc", "contract", "nsz"}


def compiled(function: F) -> F:
    """
    A function compiled when it is first called, and kept on disk for the next process; it runs without Python's lock.

    :param function: The function
    :return: The compiled function
    """
    compile_with = partial(numba.njit, nogil=True, fastmath=FAST_MATH, error_model="numpy")
    config: Any = numba.config
    users_folder = config.CACHE_DIR
    try:
        config.CACHE_DIR = users_folder or str(cache_folder())  # Numba looks at it when it makes a function
        return cast(F, compile_with(cache=True)(function))
    except RuntimeError:  # there is no folder to keep it in
        return cast(F, compile_with()(function))
    finally:
        config.CACHE_DIR = users_folder


def cache_folder() -> Path:
    """
    Where compiled functions are kept if ``NUMBA_CACHE_DIR`` says nothing: not in the package, where uninstalling leaves them.

    :return: ``sb3_lecture_dqn`` in the user's folder for caches
    :raises RuntimeError: if the user has no home
    """
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "sb3_lecture_dqn"


@compiled
def narrow_affine(inputs: np.ndarray, weight: np.ndarray, bias: np.ndarray, outputs: np.ndarray) -> None:
    """
    x Wᵀ + b for few features, where a matrix product takes longer to begin than to compute.

    :param inputs: x, shape (B, in_features)
    :param weight: W, shape (out_features, in_features)
    :param bias: b, shape (out_features,)
    :param outputs: Where it is written, shape (B, out_features)
    """
    n_features, n_outputs = inputs.shape[1], weight.shape[0]
    transposed = weight.T.copy()
    by_fours = n_features // 4 * 4
    for i in range(inputs.shape[0]):
        output = outputs[i]
        for j in range(n_outputs):
            output[j] = bias[j]
        for k in range(0, by_fours, 4):
            x_0, x_1, x_2, x_3 = inputs[i, k], inputs[i, k + 1], inputs[i, k + 2], inputs[i, k + 3]
            for j in range(n_outputs):
                output[j] += (
                    x_0 * transposed[k, j]
                    + x_1 * transposed[k + 1, j]
                    + x_2 * transposed[k + 2, j]
                    + x_3 * transposed[k + 3, j]
                )
        for k in range(by_fours, n_features):
            x_0 = inputs[i, k]
            for j in range(n_outputs):
                output[j] += x_0 * transposed[k, j]


@compiled
def narrow_weight_gradient(inputs: np.ndarray, gradient: np.ndarray, weight_gradient: np.ndarray) -> None:
    """
    The gradient of W in x Wᵀ + b for few features.

    :param inputs: x, shape (B, in_features)
    :param gradient: The gradient of x Wᵀ + b, shape (B, out_features)
    :param weight_gradient: Where it is written, shape (out_features, in_features)
    """
    n_rows, n_features = inputs.shape
    n_outputs = gradient.shape[1]
    transposed = np.zeros((n_features, n_outputs), inputs.dtype)
    by_fours = n_rows // 4 * 4
    for i in range(0, by_fours, 4):
        g_0, g_1, g_2, g_3 = gradient[i], gradient[i + 1], gradient[i + 2], gradient[i + 3]
        for k in range(n_features):
            x_0, x_1, x_2, x_3 = inputs[i, k], inputs[i + 1, k], inputs[i + 2, k], inputs[i + 3, k]
            total = transposed[k]
            for j in range(n_outputs):
                total[j] += x_0 * g_0[j] + x_1 * g_1[j] + x_2 * g_2[j] + x_3 * g_3[j]
    for i in range(by_fours, n_rows):
        g_0 = gradient[i]
        for k in range(n_features):
            x_0, total = inputs[i, k], transposed[k]
            for j in range(n_outputs):
                total[j] += x_0 * g_0[j]
    for j in range(n_outputs):
        for k in range(n_features):
            weight_gradient[j, k] = transposed[k, j]


@compiled
def normalise_and_activate(
    outputs: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    epsilon: float,
    negative_slope: float,
    activations: np.ndarray,
    means: np.ndarray,
    rstds: np.ndarray,
) -> None:
    """
    LayerNorm → LeakyReLU (L6).

    :param outputs: What the Linear gives, shape (B, n)
    :param weight: LayerNorm's weight, shape (n,)
    :param bias: LayerNorm's bias, shape (n,)
    :param epsilon: What LayerNorm adds to the variance
    :param negative_slope: LeakyReLU's slope below 0, at least 0
    :param activations: Where the result is written, shape (B, n); may be ``outputs``
    :param means: Where the mean of each row is written, shape (B,)
    :param rstds: Where 1 / standard deviation of each row is written, shape (B,)
    """
    n_rows, n = outputs.shape
    one = outputs.dtype.type(1)
    inverse = one / outputs.dtype.type(n)
    centred = np.empty(n, outputs.dtype)  # written from here, activations that are outputs are computed several at a time too
    for i in range(n_rows):
        row, activation = outputs[i], activations[i]
        total = outputs.dtype.type(0)
        for j in range(n):
            total += row[j]
        mean = total * inverse
        squares = outputs.dtype.type(0)
        for j in range(n):
            centred[j] = row[j] - mean
            squares += centred[j] * centred[j]
        rstd = one / math.sqrt(squares * inverse + epsilon)
        for j in range(n):
            normalised = centred[j] * rstd * weight[j] + bias[j]
            activation[j] = normalised if normalised > 0 else normalised * negative_slope
        means[i], rstds[i] = mean, rstd


@compiled
def hidden_layer_of_one(
    inputs: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    norm_weight: np.ndarray,
    norm_bias: np.ndarray,
    epsilon: float,
    negative_slope: float,
    activations: np.ndarray,
) -> None:
    """
    Linear → LayerNorm → LeakyReLU (L6) of one observation.

    :param inputs: x, shape (1, in_features)
    :param weight: W, shape (n, in_features)
    :param bias: b, shape (n,)
    :param norm_weight: LayerNorm's weight, shape (n,)
    :param norm_bias: LayerNorm's bias, shape (n,)
    :param epsilon: What LayerNorm adds to the variance
    :param negative_slope: LeakyReLU's slope below 0, at least 0
    :param activations: Where the result is written, shape (1, n)
    """
    observation, activation = inputs[0], activations[0]
    for j in range(weight.shape[0]):
        row, output = weight[j], bias[j]
        for k in range(row.size):
            output += observation[k] * row[k]
        activation[j] = output
    mean, rstd = np.empty(1, weight.dtype), np.empty(1, weight.dtype)
    normalise_and_activate(activations, norm_weight, norm_bias, epsilon, negative_slope, activations, mean, rstd)


@compiled
def normalise_and_activate_backward(
    gradient: np.ndarray,
    outputs: np.ndarray,
    activations: np.ndarray,
    means: np.ndarray,
    rstds: np.ndarray,
    weight: np.ndarray,
    negative_slope: float,
    weight_gradient: np.ndarray,
    bias_gradient: np.ndarray,
    linear_bias_gradient: np.ndarray,
) -> None:
    """
    The gradient of :func:`normalise_and_activate`, and of the bias of the Linear before it.

    :param gradient: The gradient of the activations, shape (B, n); overwritten by that of the Linear's outputs
    :param outputs: What the Linear gave, shape (B, n)
    :param activations: The activations, whose signs tell LeakyReLU's slope, shape (B, n)
    :param means: The mean of each row, shape (B,)
    :param rstds: 1 / standard deviation of each row, shape (B,)
    :param weight: LayerNorm's weight, shape (n,)
    :param negative_slope: LeakyReLU's slope below 0
    :param weight_gradient: Where the gradient of LayerNorm's weight is written, shape (n,)
    :param bias_gradient: Where the gradient of LayerNorm's bias is written, shape (n,)
    :param linear_bias_gradient: Where the gradient of the Linear's bias is written, shape (n,)
    """
    n_rows, n = outputs.shape
    one = outputs.dtype.type(1)
    inverse = one / outputs.dtype.type(n)
    weight_gradient[:] = 0
    bias_gradient[:] = 0
    linear_bias_gradient[:] = 0
    for i in range(n_rows):
        row, activation, row_gradient, mean, rstd = outputs[i], activations[i], gradient[i], means[i], rstds[i]
        mean_gradient = outputs.dtype.type(0)
        mean_product = outputs.dtype.type(0)
        for j in range(n):
            normalised = (row[j] - mean) * rstd
            slope = one if activation[j] > 0 else negative_slope
            of_norm = row_gradient[j] * slope
            bias_gradient[j] += of_norm
            weight_gradient[j] += of_norm * normalised
            of_normalised = of_norm * weight[j]
            row_gradient[j] = of_normalised
            mean_gradient += of_normalised
            mean_product += of_normalised * normalised
        mean_gradient *= inverse
        mean_product *= inverse
        for j in range(n):
            normalised = (row[j] - mean) * rstd
            of_output = (row_gradient[j] - mean_gradient - normalised * mean_product) * rstd
            row_gradient[j] = of_output
            linear_bias_gradient[j] += of_output


@compiled
def final_layer(features: np.ndarray, weight: np.ndarray, bias: np.ndarray, q_values: np.ndarray) -> None:
    """
    Q(s, ·), from the last activations.

    :param features: x, shape (B, n)
    :param weight: W, shape (|A|, n)
    :param bias: b, shape (|A|,)
    :param q_values: Where x Wᵀ + b is written, shape (B, |A|)
    """
    for i in range(features.shape[0]):
        row = features[i]
        for action in range(weight.shape[0]):
            action_weight = weight[action]
            total = features.dtype.type(0)
            for j in range(row.size):
                total += row[j] * action_weight[j]
            q_values[i, action] = total + bias[action]


@compiled
def squared_td_error_backward(
    features: np.ndarray,
    weight: np.ndarray,
    q_values: np.ndarray,
    actions: np.ndarray,
    targets: np.ndarray,
    gradient: np.ndarray,
    weight_gradient: np.ndarray,
    bias_gradient: np.ndarray,
) -> None:
    """
    The gradients of the mean of (Q(s, a, θ) − target)² (L12) for the final layer, where only the action a has one.

    :param features: The last activations, shape (B, n)
    :param weight: The final layer's weight, shape (|A|, n)
    :param q_values: Q(s, ·, θ), shape (B, |A|)
    :param actions: a, shape (B, 1)
    :param targets: r + ¬d γ max_a' Q(s', a', ψ), shape (B, 1)
    :param gradient: Where the gradient of the features is written, shape (B, n)
    :param weight_gradient: Where that of the weight is written, shape (|A|, n)
    :param bias_gradient: Where that of the bias is written, shape (|A|,)
    :raises IndexError: if an action is none of the environment's
    """
    n_rows, n_actions = q_values.shape
    factor = features.dtype.type(2) / features.dtype.type(n_rows)
    weight_gradient[:] = 0
    bias_gradient[:] = 0
    for i in range(n_rows):
        action = actions[i, 0]
        if action < 0 or action >= n_actions:
            raise IndexError
        of_q_value = (q_values[i, action] - targets[i, 0]) * factor
        row, row_gradient = features[i], gradient[i]
        action_weight, action_weight_gradient = weight[action], weight_gradient[action]
        bias_gradient[action] += of_q_value
        for j in range(row.size):
            row_gradient[j] = of_q_value * action_weight[j]
            action_weight_gradient[j] += of_q_value * row[j]


@compiled
def squared_norm(gradient: np.ndarray) -> float:
    """
    ‖gradient‖².

    :param gradient: The gradient of θ, flat
    :return: The sum of its squares
    """
    total = gradient.dtype.type(0)
    for i in range(gradient.size):
        total += gradient[i] * gradient[i]
    return total  # type: ignore[no-any-return]


@compiled
def adam_step(
    theta: np.ndarray,
    gradient: np.ndarray,
    first_moment: np.ndarray,
    second_moment: np.ndarray,
    complement_1: float,
    beta_2: float,
    complement_2: float,
    step_size: float,
    root_correction: float,
    epsilon: float,
) -> None:
    """
    A step of Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980), in PyTorch's form.

    :param theta: θ, flat; changed
    :param gradient: The gradient of θ
    :param first_moment: m; changed
    :param second_moment: v; changed
    :param complement_1: 1 − β₁, which has more digits than a difference of numbers of θ's type
    :param beta_2: β₂
    :param complement_2: 1 − β₂
    :param step_size: Learning rate / (1 − β₁ᵗ)
    :param root_correction: 1 / √(1 − β₂ᵗ)
    :param epsilon: ϵ
    """
    for i in range(theta.size):
        first_moment[i] += complement_1 * (gradient[i] - first_moment[i])
        second_moment[i] = beta_2 * second_moment[i] + complement_2 * gradient[i] * gradient[i]
        theta[i] -= step_size * first_moment[i] / (math.sqrt(second_moment[i]) * root_correction + epsilon)


def is_compiling() -> bool:
    """
    Whether these functions are compiled at all.

    :return: ``False`` with ``NUMBA_DISABLE_JIT=1``, as debuggers want it: Python's own loops would take seconds for a step
    """
    # what the switch was when this module was imported stays
    return not numba.config.DISABLE_JIT and hasattr(adam_step, "py_func")  # type: ignore[attr-defined]


def compile_for(dtype: Any) -> None:
    """
    Compile all functions, or read them from the disk, for arrays of a type.

    :param dtype: ``np.float32`` or ``np.float64``
    :raises Exception: whatever Numba raises if it cannot, for instance because the disk is full or what is on it is damaged
    """
    number, row, matrix = dtype(0.5), np.ones(1, dtype), np.ones((1, 1), dtype)
    norm = (row, row, number, number)
    narrow_affine(matrix, matrix, row, matrix)
    narrow_weight_gradient(matrix, matrix, matrix)
    hidden_layer_of_one(matrix, matrix, row, *norm, matrix)
    normalise_and_activate(matrix, *norm, matrix, row, row)
    normalise_and_activate_backward(matrix, matrix, matrix, row, row, row, number, row, row, row)
    final_layer(matrix, matrix, row, matrix)
    squared_td_error_backward(matrix, matrix, matrix, np.zeros((1, 1), np.int64), matrix, matrix, matrix, row)
    squared_norm(row)
    adam_step(row, row, row, row, number, number, number, number, number, number)
