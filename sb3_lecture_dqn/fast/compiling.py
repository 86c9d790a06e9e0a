"""Whether Numba compiles here. It is imported when a training begins: who only loads a model need not wait for it."""

import warnings
from enum import Enum
from functools import cache

import torch as th

from sb3_lecture_dqn.fast.head import Head


class Use(Enum):
    """What the kernels are for."""

    ACTING = "acting"
    STEPS = "whole gradient steps"
    HEAD = "a gradient step on what comes behind an encoder"


def can_compile(head: Head | None, use: Use) -> bool:
    """
    Whether the kernels compute what a head does; they are compiled, or read from the disk, when this is first asked.

    :param head: The head
    :param use: What they are for
    :return: Whether they do; if Numba does not compile here, for whatever reason, PyTorch's operations take their place
    """
    if head is None or any(layer.layer_norm is None for layer in head.hidden_layers):
        return False
    try:
        from sb3_lecture_dqn.fast import compiled_head, kernels  # they import Numba
    except Exception as error:
        return _warn(error)
    if not kernels.is_compiling() or not compiled_head.is_compilable(head):
        return False
    return _can_compile_for(head.final_layer.weight.dtype, len(head.hidden_layers), use)


@cache
def _can_compile_for(dtype: th.dtype, n_hidden_layers: int, use: Use) -> bool:
    from sb3_lecture_dqn.fast import compiled_head

    if use != Use.ACTING and not _can_compile_for(dtype, n_hidden_layers, Use.ACTING):
        return False

    try:
        compiled_head.compile_kernels(dtype, n_hidden_layers, use)
    except Exception as error:
        return _warn(error)
    return True


def _warn(error: Exception) -> bool:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(f"Numba does not compile here, and training takes longer without it ({reason})", stacklevel=2)
    return False
