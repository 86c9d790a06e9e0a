"""Fixtures that several test files share."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch as th


@pytest.fixture(autouse=True)
def one_thread_and_clean_generators() -> Iterator[None]:
    """One thread is fastest for networks of this size; and no test sees what another drew."""
    th.set_num_threads(1)
    numpy_state, torch_state = np.random.get_state(), th.get_rng_state()
    yield
    np.random.set_state(numpy_state)
    th.set_rng_state(torch_state)
