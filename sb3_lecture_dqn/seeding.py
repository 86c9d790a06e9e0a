"""Randomness that nothing else in the process can disturb."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

# Threads (Optuna's n_jobs) must not see each other's generator in numpy's one global place.
_global_generator_lock = threading.RLock()


def make_generator(seed: int | None) -> np.random.Generator:
    """
    The algorithm's own generator.

    :param seed: Seed; ``None`` draws one from numpy's global generator, so that ``numpy.random.seed`` (or SB3's
        ``set_random_seed``) before an unseeded run still decides it
    :return: A generator that shares its state with nothing
    """
    return np.random.default_rng(np.random.randint(2**31) if seed is None else seed)


@contextmanager
def numpy_draws_from(generator: np.random.Generator) -> Iterator[None]:
    """
    Inside this block, numpy's global functions draw from ``generator``.

    SB3's replay buffers call ``numpy.random.randint``. With this, each of them (and each that a user writes) is driven by the
    algorithm's generator, and the global one is left as it was.

    :param generator: The generator to draw from
    """
    with _global_generator_lock:
        global_bit_generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        try:  # an interruption may come between any two lines
            np.random.set_bit_generator(generator.bit_generator)  # type: ignore[attr-defined]
            yield
        finally:
            np.random.set_bit_generator(global_bit_generator)  # type: ignore[attr-defined]
