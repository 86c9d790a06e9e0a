"""The state of a process's random generators."""

import random
from typing import Any

import numpy as np
import torch as th


def random_state() -> dict[str, Any]:
    """
    The state of Python's, numpy's and PyTorch's global generators.

    :return: Something that can be pickled
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        # a process that was forked cannot ask CUDA, and one that has not used it need not
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """
    Bring the generators back.

    :param state: What :func:`random_state` gave
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if state["cuda"] and th.cuda.is_available():
        th.cuda.set_rng_state_all(state["cuda"][: th.cuda.device_count()])
