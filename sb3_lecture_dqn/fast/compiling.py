"""Whether Numba compiles here. It is imported when a training begins: who only loads a model need not wait for it."""

import warnings
from functools import cache

import numpy as np
import torch as th

#: Types of numbers that the kernels are for.
NUMPY_TYPES = {th.float32: np.float32, th.float64: np.float64}


@cache
def can_compile(dtype: th.dtype) -> bool:
    """
    Compile the kernels for a type of numbers, or read them from the disk.

    :param dtype: The type
    :return: Whether that worked; whatever the reason is that it did not, PyTorch's operations take their place
    """
    if dtype not in NUMPY_TYPES:
        return False
    try:
        from sb3_lecture_dqn.fast import kernels

        kernels.compile_for(NUMPY_TYPES[dtype])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"Numba does not compile here, and training takes longer without it ({reason})", stacklevel=2)
        return False
    return True
