"""
A gradient step, compiled for the CPU by Numba: without PyTorch's dispatching, and without Python between its parts.

PyTorch has an operation for each product, LayerNorm, LeakyReLU, their gradients and the sums over a batch. Each begins with
what costs as much as a small product, each passes over all activations, and the Python between them is no longer in the cache
when its turn comes. Here a step is one call, and a row of numbers stays in the smallest cache until all is done with it.

All arrays are of one type, ``float32`` or ``float64``, and C-contiguous unless it is said otherwise. Nothing looks at their
shapes here: :mod:`sb3_lecture_dqn.fast.compiled_head` does.
"""

import math
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic
from numba.np import arrayobj as _arrayobj

if TYPE_CHECKING:
    from sb3_lecture_dqn.fast.compiled_head import CompiledHead, CompiledLayer, Workspace
    from sb3_lecture_dqn.fast.stored_transitions import StoredTransitions, Transitions

# Numba says no types of its own
cgutils: Any = _cgutils
make_array: Any = _arrayobj.make_array

F = TypeVar("F", bound=Callable[..., Any])

#: Sums may be made in another order, without which only one number is added at a time. NaN and ∞ stay what they are, and a
#: division is one: its approximation ("arcp") would not be.
FAST_MATH = {"reassoc", "contract", "nsz"}


def compiled(function: F) -> F:
    """
    A function compiled when it is first called, and kept on disk for the next process; it runs without Python's lock.

    Where another one calls it, its text is put there. Called for itself, it might add in another order in the process that
    compiles it than in those that read it from the disk. Nor does a loop that adds up numbers write to arrays: LLVM would
    choose the order by how near these are to what is read, which changes with the addresses.

    :param function: The function
    :return: The compiled function
    """
    return _compiled(function, fastmath=FAST_MATH, inline="always")


def compiled_once(function: F) -> F:
    """
    The same for a function that adds in the order in which it is written, so that it need not be compiled for each caller.

    :param function: The function
    :return: The compiled function
    """
    return _compiled(function, fastmath={"contract", "nsz"})


def _compiled(function: F, **options: Any) -> F:
    compile_with = partial(numba.njit, nogil=True, error_model="numpy", **options)
    config: Any = numba.config
    users_folder = config.CACHE_DIR
    try:
        config.CACHE_DIR = users_folder or str(cache_folder())  # Numba looks at it when it makes a function
        return cast(F, compile_with(cache=True)(function))
    except RuntimeError:  # there is no folder to keep it in
        return cast(F, compile_with()(function))
    finally:
        config.CACHE_DIR = users_folder


def entry_of(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """
    What Numba calls for arguments of some types. To find that out for sixty arrays takes longer than to take them over.

    :param function: The compiled function
    :param arguments: Such arguments
    :return: The same function for arguments of these types only, which nobody looks at
    """
    compile_for = getattr(function, "compile", None)
    return function if compile_for is None else cast(Callable[..., Any], compile_for(tuple(map(numba.typeof, arguments))))


def cache_folder() -> Path:
    """
    Where compiled functions are kept if ``NUMBA_CACHE_DIR`` says nothing: not in the package, where uninstalling leaves them.

    :return: ``sb3_lecture_dqn`` in the user's folder for caches
    :raises RuntimeError: if the user has no home
    """
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "sb3_lecture_dqn"


# --- The matrix product -----------------------------------------------------------------------------------------------------


class Registers(NamedTuple):
    """The registers for several numbers at once that a core has."""

    n_bytes: int
    number: int


def registers() -> Registers:
    """
    Those of this processor.

    :return: What Numba compiles for: the processor at hand, or what ``NUMBA_CPU_FEATURES`` says
    """
    config: Any = numba.config
    features = _features_of_this_processor() if config.CPU_NAME is None else set((config.CPU_FEATURES or "").split(","))
    if "+avx512f" in features:
        return Registers(64, 32)
    return Registers(32, 16) if "+avx" in features else Registers(16, 32 if "+neon" in features else 16)


def _features_of_this_processor() -> set[str]:
    try:
        return {f"+{name}" for name, is_there in binding.get_host_cpu_features().items() if is_there}
    except RuntimeError:  # LLVM does not know how to ask
        return set()


REGISTERS = registers()
#: A tile of a product is so many rows of two registers each, which leaves some of them for the factors.
TILE_ROWS = 8 if REGISTERS.number == 32 else 6
TILE_REGISTERS = 2


def _vector_of(context: Any, number: Any) -> Any:
    """The type of a register full of numbers."""
    return ir.VectorType(number, REGISTERS.n_bytes // context.get_abi_sizeof(number))


def _place(builder: Any, array: Any, kind: Any, *indices: Any) -> Any:
    """Where an element of an array is, as the address of what is read there or written."""
    address = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    for index, stride in zip(indices, cgutils.unpack_tuple(builder, array.strides), strict=True):
        address = builder.gep(address, [builder.mul(index, stride)])
    return builder.bitcast(address, kind.as_pointer())


def _places_behind(builder: Any, index: Any, number: int, step: int = 1) -> list[Any]:
    """So many indices: this one, and those behind it."""
    return [builder.add(index, ir.Constant(index.type, i * step)) for i in range(number)]


def _tile_of(n_rows: int) -> Any:
    """A function that computes some rows of a b + bias; Numba by itself would write each sum to memory after each addend."""

    @intrinsic
    def tile(_: Any, a: Any, row: Any, b: Any, bias: Any, out: Any) -> Any:
        return types.void(a, row, b, bias, out), partial(_build_tile, n_rows)

    return tile


def _build_tile(n_rows: int, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """The instructions of a tile: for each k, a column of ``a`` times a row of ``b``, with all sums in registers."""
    a, b, bias, out = (make_array(signature.args[i])(context, builder, value=arguments[i]) for i in (0, 2, 3, 4))
    number = context.get_value_type(signature.args[4].dtype)
    n_bytes, vector = context.get_abi_sizeof(number), _vector_of(context, number)
    in_one_place = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
    rows = _places_behind(builder, arguments[1], n_rows)
    columns = _places_behind(builder, ir.Constant(arguments[1].type, 0), TILE_REGISTERS, vector.count)
    start = [builder.load(_place(builder, bias, vector, column), align=n_bytes) for column in columns]
    sums = [[cgutils.alloca_once_value(builder, value) for value in start] for _ in rows]
    with cgutils.for_range(builder, cgutils.unpack_tuple(builder, b.shape)[0]) as k:
        of_b = [builder.load(_place(builder, b, vector, k.index, column), align=n_bytes) for column in columns]
        for row, sums_of_row in zip(rows, sums, strict=True):
            factor = builder.load(_place(builder, a, number, row, k.index), align=n_bytes)
            first = builder.insert_element(vector(ir.Undefined), factor, ir.IntType(32)(0))
            factors = builder.shuffle_vector(first, vector(ir.Undefined), in_one_place)
            for total, numbers in zip(sums_of_row, of_b, strict=True):
                product = builder.fmul(factors, numbers, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
    for row, sums_of_row in zip(rows, sums, strict=True):
        for column, total in zip(columns, sums_of_row, strict=True):
            builder.store(builder.load(total), _place(builder, out, vector, row, column), align=n_bytes)
    return context.get_dummy_value()


_tile, _tile_of_one_row = _tile_of(TILE_ROWS), _tile_of(1)


def _type_transpose_block(_: Any, matrix: Any, row: Any, column: Any, out: Any) -> Any:
    return types.void(matrix, row, column, out), _build_transpose_block


def _build_transpose_block(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """The instructions of a block: one half of its registers is interleaved with the other until the columns are rows."""
    matrix, out = (make_array(signature.args[i])(context, builder, value=arguments[i]) for i in (0, 3))
    number = context.get_value_type(signature.args[3].dtype)
    n_bytes, vector = context.get_abi_sizeof(number), _vector_of(context, number)
    side = vector.count
    rows, columns = (_places_behind(builder, index, side) for index in arguments[1:3])
    block = [builder.load(_place(builder, matrix, vector, row, arguments[2]), align=n_bytes) for row in rows]
    pairs = [place for i in range(side) for place in (i, side + i)]
    halves = [ir.Constant(ir.VectorType(ir.IntType(32), side), half) for half in (pairs[:side], pairs[side:])]
    for _ in range(side.bit_length() - 1):
        of_both = zip(block[: side // 2], block[side // 2 :], strict=True)
        block = [builder.shuffle_vector(*both, half) for both in of_both for half in halves]
    for column, numbers in zip(columns, block, strict=True):
        builder.store(numbers, _place(builder, out, vector, column, arguments[1]), align=n_bytes)
    return context.get_dummy_value()


#: Transposes as many rows and columns as a register has numbers; Numba by itself would move number by number.
_transpose_block: Any = intrinsic(_type_transpose_block)


@compiled_once
def transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """
    A matrix whose rows are another's columns.

    :param matrix: shape (n, m)
    :param out: Where it is written, shape (m, n)
    """
    n_rows, n_columns = matrix.shape
    side = REGISTERS.n_bytes // out.itemsize
    if min(n_rows, n_columns) < side:
        for i in range(n_rows):
            for j in range(n_columns):
                out[j, i] = matrix[i, j]
        return
    for begin_column in range(0, n_columns, side):
        column = min(begin_column, n_columns - side)  # the last blocks may lie over those before them
        for begin in range(0, n_rows, side):
            _transpose_block(matrix, min(begin, n_rows - side), column, out)


@compiled_once
def multiply(a: np.ndarray, b: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """
    a b + bias. A row of the result does not depend on which other rows there are.

    :param a: shape (n, k), in any layout
    :param b: shape (k, m)
    :param bias: Added to each row, shape (m,)
    :param out: Where it is written, shape (n, m); none of the others
    """
    n_columns, width = out.shape[1], TILE_REGISTERS * REGISTERS.n_bytes // out.itemsize
    if n_columns < width:
        _multiply_few_columns(a, b, bias, out)
        return
    for begin in range(0, n_columns, width):
        column = min(begin, n_columns - width)  # the last tiles may lie over those before them
        end = column + width
        _multiply_columns_of_a_tile(a, b[:, column:end], bias[column:end], out[:, column:end])


@compiled_once
def multiply_transposed(a: np.ndarray, matrix: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """
    a matrixᵀ + bias, as :func:`multiply` computes it.

    :param a: shape (n, k), in any layout
    :param matrix: shape (m, k)
    :param bias: Added to each row, shape (m,)
    :param out: Where it is written, shape (n, m); none of the others
    """
    n_columns, width = out.shape[1], TILE_REGISTERS * REGISTERS.n_bytes // out.itemsize
    rows = np.empty((matrix.shape[1], min(n_columns, width)), out.dtype)
    if n_columns < width:
        transpose(matrix, rows)
        _multiply_few_columns(a, rows, bias, out)
        return
    for begin in range(0, n_columns, width):
        column = min(begin, n_columns - width)
        end = column + width
        transpose(matrix[column:end], rows)
        _multiply_columns_of_a_tile(a, rows, bias[column:end], out[:, column:end])


@compiled_once
def _multiply_columns_of_a_tile(a: np.ndarray, b: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    n_rows = out.shape[0]
    if n_rows < TILE_ROWS:
        for row in range(n_rows):
            _tile_of_one_row(a, row, b, bias, out)
        return
    for begin in range(0, n_rows, TILE_ROWS):
        _tile(a, min(begin, n_rows - TILE_ROWS), b, bias, out)


@compiled_once
def _multiply_few_columns(a: np.ndarray, b: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):
        row = out[i]
        for j in range(row.size):
            row[j] = bias[j]
        for k in range(b.shape[0]):
            factor = a[i, k]
            for j in range(row.size):
                row[j] += factor * b[k, j]


# --- Two threads ------------------------------------------------------------------------------------------------------------

#: What a piece of work has come to: not yet possible, nobody's, the first thread's, the second one's, done.
NOT_READY, READY, CLAIMED_BY_FIRST, CLAIMED_BY_SECOND, DONE = range(5)

#: Processors whose cores may have two threads, of which a waiting one should leave the core to the other.
HYPERTHREADED = ("x86_64", "amd64")


def _type_claim(_: Any, progress: Any, piece: Any, claimed: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, number = _place_of_piece(context, builder, signature, arguments)
        states = ir.Constant(number, READY), builder.trunc(arguments[2], number)
        return builder.extract_value(builder.cmpxchg(place, *states, "acq_rel", "acquire"), 1)

    return types.boolean(progress, piece, types.int64), build


def _type_state(_: Any, progress: Any, piece: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, _ = _place_of_piece(context, builder, signature, arguments)
        state = builder.load_atomic(place, "acquire", progress.dtype.bitwidth // 8)
        if platform.machine().lower() in HYPERTHREADED:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return state

    return progress.dtype(progress, piece), build


def _type_set_state(_: Any, progress: Any, piece: Any, state: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, number = _place_of_piece(context, builder, signature, arguments)
        builder.store_atomic(builder.trunc(arguments[2], number), place, "release", progress.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(progress, piece, types.int64), build


def _place_of_piece(context: Any, builder: Any, signature: Any, arguments: Any) -> tuple[Any, Any]:
    number = context.get_value_type(signature.args[0].dtype)
    progress = make_array(signature.args[0])(context, builder, value=arguments[0])
    return _place(builder, progress, number, arguments[1]), number


#: Whether this thread, and no other, does a piece of work from now on: one that is ready and nobody's.
_claim: Any = intrinsic(_type_claim)
#: What a piece of work has come to; what has been written before is there.
_state: Any = intrinsic(_type_state)
_set_state: Any = intrinsic(_type_set_state)


@compiled_once
def _keep_core() -> None:
    """What a thread does that has no way to offer its core."""


#: Lets others have the core for a while; the C library, which has this function, is in every process.
_offer_core: Any = types.ExternalFunction("sched_yield", types.int32()) if os.name == "posix" else _keep_core
#: So many looks at a piece come before that: whose turn it is then may be the thread that is waited for.
PATIENCE = 1_000
#: After so many looks for the next call's pieces the second thread leaves: some milliseconds, if nobody else wants its core.
STAY = 10_000
#: Whether the second thread may leave at once, or has been called and should stay a while.
GONE, HERE = range(2)


@compiled_once
def _wait_while(progress: np.ndarray, piece: int, state: int) -> None:
    n_looks = 0
    while _state(progress, piece) == state:
        n_looks += 1
        if n_looks > PATIENCE:
            _offer_core()


@compiled_once
def _is_done(progress: np.ndarray, piece: int) -> bool:
    """Whether nobody need do it any more; if the second thread is at it, wait until it is through or gives it back."""
    _wait_while(progress, piece, CLAIMED_BY_SECOND)
    return bool(_state(progress, piece) == DONE)


@compiled_once
def _open(progress: np.ndarray) -> None:
    """Let all pieces of the steps be claimed, the weights' gradients when they are ready."""
    for step in range(progress.shape[0]):
        for piece in range(1, progress.shape[1]):
            _set_state(progress[step], piece, NOT_READY)
        _set_state(progress[step], 0, READY)


@compiled_once
def _are_opened(progress: np.ndarray, presence: np.ndarray) -> bool:
    """Whether there are pieces again, for which the second thread waits a while, if it should stay."""
    n_looks = 0
    while n_looks < STAY and _state(presence, 0) == HERE:
        if _state(progress[0], 0) != DONE:
            return True
        n_looks += 1
        if n_looks > PATIENCE:
            _offer_core()
    return False


# --- The layers -------------------------------------------------------------------------------------------------------------


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
            squares += (row[j] - mean) * (row[j] - mean)
        for j in range(n):
            centred[j] = row[j] - mean
        rstd = one / math.sqrt(squares * inverse + epsilon)
        for j in range(n):
            normalised = centred[j] * rstd * weight[j] + bias[j]
            activation[j] = normalised if normalised > 0 else normalised * negative_slope
        means[i], rstds[i] = mean, rstd


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
        for j in range(n):
            normalised = (row[j] - mean) * rstd
            slope = one if activation[j] > 0 else negative_slope
            of_norm = row_gradient[j] * slope
            bias_gradient[j] += of_norm
            weight_gradient[j] += of_norm * normalised
            row_gradient[j] = of_norm * weight[j]
        mean_gradient = outputs.dtype.type(0)
        mean_product = outputs.dtype.type(0)
        for j in range(n):
            mean_gradient += row_gradient[j]
            mean_product += row_gradient[j] * ((row[j] - mean) * rstd)
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


# --- The network ------------------------------------------------------------------------------------------------------------


@compiled
def hidden_layer(
    layer: "CompiledLayer",
    inputs: np.ndarray,
    outputs: np.ndarray,
    activations: np.ndarray,
    means: np.ndarray,
    rstds: np.ndarray,
) -> None:
    """
    Linear → LayerNorm → LeakyReLU (L6).

    :param layer: Its parameters
    :param inputs: x, shape (B, in_features)
    :param outputs: Where x Wᵀ + b is written, shape (B, n)
    :param activations: Where the result is written, shape (B, n); may be ``outputs``
    :param means: Where the mean of each row is written, shape (B,)
    :param rstds: Where 1 / standard deviation of each row is written, shape (B,)
    """
    multiply_transposed(inputs, layer.weight, layer.bias, outputs)
    normalise_and_activate(
        outputs, layer.norm_weight, layer.norm_bias, layer.epsilon, layer.negative_slope, activations, means, rstds
    )


@compiled
def weight_gradient(inputs: np.ndarray, gradient: np.ndarray, result: np.ndarray) -> None:
    """
    The gradient of W in x Wᵀ + b.

    :param inputs: x, shape (B, in_features)
    :param gradient: The gradient of x Wᵀ + b, shape (B, n)
    :param result: Where it is written, shape (n, in_features)
    """
    n_outputs, n_inputs = result.shape
    if n_inputs < n_outputs:  # so that the rows of the product are the longer ones
        transposed = np.empty((n_inputs, n_outputs), inputs.dtype)
        multiply(inputs.T, gradient, np.zeros(n_outputs, inputs.dtype), transposed)
        transpose(transposed, result)
    else:
        multiply(gradient.T, inputs, np.zeros(n_inputs, inputs.dtype), result)


@compiled
def q_values(head: "CompiledHead", features: np.ndarray) -> np.ndarray:
    """
    Q(s, ·).

    :param head: Its layers
    :param features: What the encoder gives, shape (B, features_dim)
    :return: Q values, shape (B, |A|)
    """
    n_rows = len(features)
    means, rstds = np.empty(n_rows, features.dtype), np.empty(n_rows, features.dtype)
    for layer in head.hidden_layers:
        outputs = np.empty((n_rows, len(layer.bias)), features.dtype)
        hidden_layer(layer, features, outputs, outputs, means, rstds)
        features = outputs
    result = np.empty((n_rows, len(head.final_bias)), features.dtype)
    final_layer(features, head.final_weight, head.final_bias, result)
    return result


@compiled
def q_values_of_one(
    hidden_layers: tuple[tuple[Any, ...], ...], final_weight: np.ndarray, final_bias: np.ndarray, features: np.ndarray
) -> np.ndarray:
    """
    Q(s, ·) of one observation: there are too few numbers for a matrix product.

    :param hidden_layers: A head's, as plain tuples, which Numba takes over in half of the time
    :param final_weight: The head's
    :param final_bias: The head's
    :param features: What the encoder gives, shape (1, features_dim)
    :return: Q values, shape (1, |A|)
    """
    mean, rstd = np.empty(1, features.dtype), np.empty(1, features.dtype)
    for weight, bias, norm_weight, norm_bias, epsilon, negative_slope in hidden_layers:
        outputs = np.empty((1, len(bias)), features.dtype)
        final_layer(features, weight, bias, outputs)
        normalise_and_activate(outputs, norm_weight, norm_bias, epsilon, negative_slope, outputs, mean, rstd)
        features = outputs
    result = np.empty((1, len(final_bias)), features.dtype)
    final_layer(features, final_weight, final_bias, result)
    return result


@compiled
def forward_pass(
    head: "CompiledHead", workspaces: "tuple[Workspace, ...]", features: np.ndarray, q_values: np.ndarray
) -> None:
    """
    Q(s, ·, θ), keeping what :func:`backward_pass` needs.

    :param head: Q's layers
    :param workspaces: Memory for each hidden layer
    :param features: What the encoder gives for s, shape (B, features_dim)
    :param q_values: Where Q(s, ·, θ) is written, shape (B, |A|)
    """
    inputs = features
    for layer, kept in zip(head.hidden_layers, workspaces):  # noqa: B905 Numba does not know strict
        hidden_layer(layer, inputs, kept.outputs, kept.activations, kept.means, kept.rstds)
        inputs = kept.activations
    final_layer(inputs, head.final_weight, head.final_bias, q_values)


@compiled
def backward_pass(
    head: "CompiledHead",
    gradients: "CompiledHead",
    workspaces: "tuple[Workspace, ...]",
    features: np.ndarray,
    actions: np.ndarray,
    targets: np.ndarray,
    q_values: np.ndarray,
    features_gradient: np.ndarray,
    progress: np.ndarray,
) -> None:
    """
    The gradient of the mean of (Q(s, a, θ) − target)² (L12), but for the weights of the hidden layers above the first.

    :param head: Q's layers
    :param gradients: Where the gradients of their parameters are written
    :param workspaces: Of :func:`forward_pass`
    :param features: As for :func:`forward_pass`
    :param actions: a, shape (B, 1)
    :param targets: r + ¬d γ max_a' Q(s', a', ψ), shape (B, 1)
    :param q_values: Q(s, ·, θ), shape (B, |A|)
    :param features_gradient: Where the gradient of the features is written, shape (B, features_dim), or (0, …) for nowhere
    :param progress: Of the hidden layers' weights, shape (number of hidden layers,); those that are left are ready then
    :raises IndexError: if an action is none of the environment's
    """
    last = len(workspaces) - 1
    squared_td_error_backward(
        workspaces[last].activations,
        head.final_weight,
        q_values,
        actions,
        targets,
        workspaces[last].gradient,
        gradients.final_weight,
        gradients.final_bias,
    )
    for i in range(last, -1, -1):
        layer, of_layer, kept = head.hidden_layers[i], gradients.hidden_layers[i], workspaces[i]
        normalise_and_activate_backward(
            kept.gradient,
            kept.outputs,
            kept.activations,
            kept.means,
            kept.rstds,
            layer.norm_weight,
            layer.negative_slope,
            of_layer.norm_weight,
            of_layer.norm_bias,
            of_layer.bias,
        )
        if i > 0:
            _set_state(progress, i, READY)
        else:
            weight_gradient(features, kept.gradient, of_layer.weight)
        of_inputs = workspaces[i - 1].gradient if i > 0 else features_gradient
        if len(of_inputs) > 0:
            multiply(kept.gradient, layer.weight, np.zeros(layer.weight.shape[1], features.dtype), of_inputs)


@compiled
def weight_gradients_by_either(
    pieces: np.ndarray, is_first_thread: bool, workspaces: "tuple[Workspace, ...]", gradients: "CompiledHead"
) -> None:
    """
    The gradients of the hidden layers' weights from the second layer on, each computed by the thread that comes first; when
    the first thread is through, they are there.

    :param pieces: What the pieces of the step have come to
    :param is_first_thread: As for :func:`gradient_steps`; the other one waits for each piece to be ready
    :param workspaces: As for :func:`gradient_steps`
    :param gradients: As for :func:`gradient_steps`
    """
    is_over = False
    while not is_over:
        for i in range(len(workspaces) - 1, 0, -1):
            if not is_first_thread:
                _wait_while(pieces, i, NOT_READY)
            if _claim(pieces, i, CLAIMED_BY_FIRST if is_first_thread else CLAIMED_BY_SECOND):
                weight_gradient(workspaces[i - 1].activations, workspaces[i].gradient, gradients.hidden_layers[i].weight)
                _set_state(pieces, i, DONE)
        is_over = True
        for i in range(1, len(workspaces) if is_first_thread else 1):
            is_over = _is_done(pieces, i) and is_over


@compiled
def squared_td_error_gradients(
    head: "CompiledHead",
    gradients: "CompiledHead",
    workspaces: "tuple[Workspace, ...]",
    features: np.ndarray,
    actions: np.ndarray,
    targets: np.ndarray,
    q_values: np.ndarray,
    features_gradient: np.ndarray,
) -> None:
    """
    The gradient of the mean of (Q(s, a, θ) − target)² (L12).

    :param head: As for :func:`backward_pass`
    :param gradients: As for :func:`backward_pass`
    :param workspaces: As for :func:`backward_pass`
    :param features: As for :func:`backward_pass`
    :param actions: As for :func:`backward_pass`
    :param targets: As for :func:`backward_pass`
    :param q_values: Where Q(s, ·, θ) is written, shape (B, |A|)
    :param features_gradient: As for :func:`backward_pass`
    :raises IndexError: if an action is none of the environment's
    """
    progress = np.zeros(len(workspaces), np.int64)
    forward_pass(head, workspaces, features, q_values)
    backward_pass(head, gradients, workspaces, features, actions, targets, q_values, features_gradient, progress)
    weight_gradients_by_either(progress, True, workspaces, gradients)


@compiled_once
def read_transitions(stored: "StoredTransitions", indices: np.ndarray, transitions: "Transitions") -> None:
    """
    Read some of the transitions in a replay buffer.

    :param stored: The buffer's records
    :param indices: Which of them, shape (B,)
    :param transitions: Where they are written, without discounts, which no record has
    """
    # what is one number of each is read first, because the processor then fetches many records at once
    for i in range(len(indices)):
        record = stored.numbers[indices[i]]
        transitions.actions[i, 0] = stored.actions[indices[i], 0]
        transitions.rewards[i, 0] = record[stored.rewards]
        not_done = 1 - record[stored.timeouts] if stored.handle_timeout_termination else record.dtype.type(1)
        transitions.dones[i, 0] = record[stored.dones] * not_done
    observations, next_observations = transitions.observations, transitions.next_observations
    for i in range(len(indices)):
        record = stored.numbers[indices[i]]
        for j in range(observations.shape[1]):
            observations[i, j] = record[stored.observations + j]
            next_observations[i, j] = record[stored.next_observations + j]


@compiled
def td_metrics(q_values: np.ndarray, actions: np.ndarray, targets: np.ndarray) -> tuple[float, float, float]:
    """
    What is logged of a batch.

    :param q_values: Q(s, ·, θ), shape (B, |A|)
    :param actions: a, shape (B, 1)
    :param targets: r + ¬d γ max_a' Q(s', a', ψ), shape (B, 1)
    :return: The mean of (Q(s, a, θ) − target)², of Q(s, a, θ) and of the targets
    """
    zero = q_values.dtype.type(0)
    loss, q_value, target = zero, zero, zero
    for i in range(len(actions)):
        of_action = q_values[i, actions[i, 0]]
        loss += (of_action - targets[i, 0]) * (of_action - targets[i, 0])
        q_value += of_action
        target += targets[i, 0]
    return loss / len(actions), q_value / len(actions), target / len(actions)


@compiled
def td_targets(
    head: "CompiledHead",
    workspaces: "tuple[Workspace, ...]",
    next_features: np.ndarray,
    rewards: np.ndarray,
    dones: np.ndarray,
    discounts: np.ndarray,
    targets: np.ndarray,
) -> None:
    """
    The targets (L12): r + ¬d γ max_a' Q(s', a', ψ).

    :param head: ψ's layers
    :param workspaces: Memory for each hidden layer, of which only ``gradient`` is written
    :param next_features: What the encoder gives for s', shape (B, features_dim)
    :param rewards: r, shape (B, 1)
    :param dones: d, shape (B, 1)
    :param discounts: γ, or with n-step returns γⁿ of each, shape (B, 1)
    :param targets: Where they are written, shape (B, 1)
    """
    n_rows, features = len(next_features), next_features
    means, rstds = np.empty(n_rows, features.dtype), np.empty(n_rows, features.dtype)
    for layer, kept in zip(head.hidden_layers, workspaces):  # noqa: B905 Numba does not know strict
        hidden_layer(layer, features, kept.gradient, kept.gradient, means, rstds)
        features = kept.gradient
    next_q_values = np.empty((n_rows, len(head.final_bias)), features.dtype)
    final_layer(features, head.final_weight, head.final_bias, next_q_values)
    for i in range(n_rows):
        largest = next_q_values[i, 0]
        for action in range(1, next_q_values.shape[1]):
            q_value = next_q_values[i, action]
            if q_value > largest or math.isnan(q_value):
                largest = q_value
        targets[i, 0] = rewards[i, 0] + (1 - dones[i, 0]) * discounts[i, 0] * largest


# --- The optimizer ----------------------------------------------------------------------------------------------------------


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
def clip(gradient: np.ndarray, gradient_norm: float, max_grad_norm: float) -> None:
    """
    What PyTorch's ``clip_grad_norm_`` does.

    :param gradient: The gradient of θ, flat; scaled where it is too large
    :param gradient_norm: Its norm
    :param max_grad_norm: Largest norm; ∞ for no clipping
    """
    scale = max_grad_norm / (gradient_norm + 1e-6)
    if scale < 1:
        factor = gradient.dtype.type(scale)
        for i in range(gradient.size):
            gradient[i] *= factor


class AdamArguments(NamedTuple):
    """Adam's arrays, which it changes, and its settings."""

    theta: np.ndarray  # θ, flat
    gradient: np.ndarray  # the gradient of θ
    first_moment: np.ndarray  # m
    second_moment: np.ndarray  # v
    step_counts: np.ndarray  # t, as often as PyTorch keeps it
    learning_rate: float
    betas: tuple[float, float]  # β₁ and β₂
    epsilon: float  # ϵ


@compiled
def adam_step(adam: AdamArguments) -> None:
    """
    A step of Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980), in PyTorch's form.

    :param adam: Its arrays and settings
    """
    theta, gradient, first_moment, second_moment = adam.theta, adam.gradient, adam.first_moment, adam.second_moment
    number = theta.dtype.type
    beta_1, beta_2 = adam.betas
    count = int(adam.step_counts[0]) + 1
    for i in range(adam.step_counts.size):
        adam.step_counts[i] = count
    # in float64 until here: 1 − β₂ has more digits than a difference of numbers of θ's type
    complement_1, complement_2, factor_2 = number(1 - beta_1), number(1 - beta_2), number(beta_2)
    step_size, root_correction = number(adam.learning_rate / (1 - beta_1**count)), number((1 - beta_2**count) ** -0.5)
    epsilon = number(adam.epsilon)
    for i in range(theta.size):
        first_moment[i] += complement_1 * (gradient[i] - first_moment[i])
        second_moment[i] = factor_2 * second_moment[i] + complement_2 * gradient[i] * gradient[i]
        theta[i] -= step_size * first_moment[i] / (math.sqrt(second_moment[i]) * root_correction + epsilon)


@compiled
def clipped_adam_step(adam: AdamArguments, max_grad_norm: float) -> float:
    """
    Clip the gradient, and make a step of Adam with it.

    :param adam: As for :func:`adam_step`
    :param max_grad_norm: As for :func:`clip`
    :return: ‖gradient‖ before clipping
    """
    gradient_norm = math.sqrt(squared_norm(adam.gradient))
    clip(adam.gradient, gradient_norm, max_grad_norm)
    adam_step(adam)
    return gradient_norm


# --- A gradient step --------------------------------------------------------------------------------------------------------


@compiled
def check_actions(actions: np.ndarray, n_actions: int) -> None:
    """
    Look at the actions of transitions.

    :param actions: a, shape (n, 1)
    :param n_actions: |A|
    :raises IndexError: if an action is none of the environment's
    """
    for i in range(len(actions)):
        if actions[i, 0] < 0 or actions[i, 0] >= n_actions:
            raise IndexError


@compiled
def td_targets_by_either(
    pieces: np.ndarray,
    is_first_thread: bool,
    target_head: "CompiledHead",
    scratch: "tuple[Workspace, ...]",
    transitions: "Transitions",
    rows: slice,
    targets: np.ndarray,
) -> None:
    """
    The targets of a batch, computed by the thread that comes first; when the first thread is through, they are there.

    :param pieces: What the pieces of the step have come to
    :param is_first_thread: As for :func:`gradient_steps`
    :param target_head: As for :func:`gradient_steps`
    :param scratch: As for :func:`gradient_steps`
    :param transitions: As for :func:`gradient_steps`
    :param rows: Those of the batch
    :param targets: As for :func:`gradient_steps`
    """
    is_over = False
    while not is_over:
        if _claim(pieces, 0, CLAIMED_BY_FIRST if is_first_thread else CLAIMED_BY_SECOND):
            of_next, rewards, dones = transitions.next_observations[rows], transitions.rewards[rows], transitions.dones[rows]
            td_targets(target_head, scratch, of_next, rewards, dones, transitions.discounts[rows], targets[rows])
            _set_state(pieces, 0, DONE)
        is_over = not is_first_thread or _is_done(pieces, 0)


@compiled
def gradient_steps(
    is_first_thread: bool,
    scratch: "tuple[Workspace, ...]",
    head: "CompiledHead",
    target_head: "CompiledHead",
    gradients: "CompiledHead",
    workspaces: "tuple[Workspace, ...]",
    adam: AdamArguments,
    max_grad_norm: float,
    transitions: "Transitions",
    targets: np.ndarray,
    metrics: np.ndarray,
    presence: np.ndarray,
    progress: np.ndarray,
) -> None:
    """
    Gradient steps on the mean of (Q(s, a, θ) − target)² (L12), one for each batch.

    A second thread that calls this with the same arrays takes pieces of it: the targets of a batch, and the gradients of the
    hidden layers' weights above the first. Who comes first to a piece claims it; the first thread waits for nothing that
    nobody has claimed. Both run the same instructions, so that it makes no difference to the result who does what. The second
    thread stays for a while to help with the next call, if that is for the same arrays. Adam's settings and the clipping may
    be others then, so it looks at none of them.

    :param is_first_thread: Whether this is the one that does all that the other has not claimed
    :param scratch: Memory for each hidden layer for the targets, the thread's own: of the first one, the workspaces
    :param head: θ's layers, whose parameters are views of Adam's θ
    :param target_head: ψ's layers, of the same shapes
    :param gradients: Where the gradients of θ's layers are written; views of Adam's gradient
    :param workspaces: Memory for each hidden layer, for B rows
    :param adam: As for :func:`adam_step`
    :param max_grad_norm: As for :func:`clip`
    :param transitions: Those of one batch after the other, n · B rows
    :param targets: Where the targets are written, shape (n · B, 1)
    :param metrics: Where the loss, the mean Q(s, a, θ), the mean target and ‖gradient‖ of each step are written, shape (n, 4)
    :param presence: ``HERE`` while the second thread should stay, shape (1,)
    :param progress: What the targets of each step and the gradients of the weights of its hidden layers from the second on
        have come to, shape (n, number of hidden layers); all ``DONE`` before and after the call
    :raises IndexError: if an action is none of the environment's; nothing is changed then
    """
    n_actions, n_steps = len(head.final_bias), len(metrics)
    if is_first_thread:
        check_actions(transitions.actions, n_actions)
        _open(progress)
    batch_size = len(transitions.actions) // n_steps
    q_values = np.empty((batch_size, n_actions), targets.dtype)
    while is_first_thread or _are_opened(progress, presence):
        for step in range(n_steps):
            rows, pieces = slice(step * batch_size, (step + 1) * batch_size), progress[step]
            features, actions = transitions.observations[rows], transitions.actions[rows]
            if is_first_thread:
                forward_pass(head, workspaces, features, q_values)
            td_targets_by_either(pieces, is_first_thread, target_head, scratch, transitions, rows, targets)
            if is_first_thread:
                backward_pass(head, gradients, workspaces, features, actions, targets[rows], q_values, features[:0], pieces)
            weight_gradients_by_either(pieces, is_first_thread, workspaces, gradients)
            if is_first_thread:
                metrics[step, :3] = td_metrics(q_values, actions, targets[rows])
                metrics[step, 3] = clipped_adam_step(adam, max_grad_norm)
        if is_first_thread:
            return
        _wait_while(progress[0], 0, CLAIMED_BY_FIRST)  # it is not yet done with what the second thread looks for next


def is_compiling() -> bool:
    """
    Whether these functions are compiled at all.

    :return: ``False`` with ``NUMBA_DISABLE_JIT=1``, as debuggers want it: Python's own loops would take seconds for a step
    """
    # what the switch was when this module was imported stays
    return not numba.config.DISABLE_JIT and hasattr(adam_step, "py_func")  # type: ignore[attr-defined]


# These raise whatever Numba raises if it cannot compile, for instance because the disk is full or what is on it is damaged.


def compile_for_acting(head: "CompiledHead", features: np.ndarray) -> None:
    """
    Compile what acts, or read it from the disk.

    :param head: Some head
    :param features: Features of one observation
    """
    q_values(head, features)
    q_values_of_one(head.plain_hidden_layers, head.final_weight, head.final_bias, features)


def compile_for_head(head: "CompiledHead", workspaces: "tuple[Workspace, ...]", transitions: "Transitions") -> None:
    """
    Compile what a gradient step needs behind an encoder, or read it from the disk.

    :param head: Some head, whose numbers are overwritten
    :param workspaces: Memory for each hidden layer, for one row
    :param transitions: Memory for one of them
    """
    features, actions, *_, targets = transitions
    actions[:] = 0
    squared_td_error_gradients(head, head, workspaces, features, actions, targets, targets.copy(), features)
    squared_norm(head.final_bias)
    adam_step(_adam_on(head.final_bias))


def compile_for_steps(
    head: "CompiledHead", workspaces: "tuple[Workspace, ...]", stored: "StoredTransitions", transitions: "Transitions"
) -> None:
    """
    Compile what whole gradient steps need, or read it from the disk.

    :param head: Some head
    :param workspaces: Memory for each hidden layer, for one row
    :param stored: Some transitions
    :param transitions: Memory for one of them
    """
    read_transitions(stored, np.zeros(1, np.int64), transitions)
    adam, metrics = _adam_on(head.final_bias), np.zeros((1, 4), head.final_bias.dtype)
    targets, presence, progress = transitions.rewards, np.full(1, GONE), np.full((1, len(workspaces)), DONE)
    of_both = head, head, head, workspaces, adam, np.inf, transitions, targets, metrics, presence, progress
    gradient_steps(False, workspaces, *of_both)


def _adam_on(numbers: np.ndarray) -> AdamArguments:
    return AdamArguments(numbers, numbers, numbers, numbers, np.zeros(1, np.float32), 0.0, (0.0, 0.0), 0.0)
