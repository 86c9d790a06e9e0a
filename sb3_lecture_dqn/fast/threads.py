"""The number of threads for small work, which PyTorch would split among all cores."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

#: Multiply-adds of a gradient step's forward pass (rows × parameters) up to which one thread does it. Two were a third faster
#: than one on idle cores, and many times slower as soon as another process wanted one of them; see docs/performance.md.
SMALL_WORK = 2**26


@contextmanager
def threads_for(multiply_adds: int | None) -> Iterator[bool]:
    """
    Inside this block PyTorch uses one thread if the work is small, and as many as before if it is not.

    One thread also makes a seeded run independent of the number of cores.

    :param multiply_adds: How much work it is, as rows of a batch × parameters of the network; ``None`` if that is not known
    :return: Whether threads are left over inside the block
    """
    threads = th.get_num_threads()
    if threads == 1 or multiply_adds is None or multiply_adds > SMALL_WORK:
        yield False
        return
    try:  # an interruption may come between any two lines
        th.set_num_threads(1)
        yield True
    finally:
        th.set_num_threads(threads)
