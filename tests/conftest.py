"""Fixtures that several test files share."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
import torch as th
from hypothesis import HealthCheck, settings
from postgres import PostgresServer, find_programs, postgres_server

_PROPERTIES = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("quick", max_examples=12, derandomize=True, **_PROPERTIES)  # type: ignore[arg-type]
settings.register_profile("thorough", max_examples=400, **_PROPERTIES)  # type: ignore[arg-type]
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    """What Numba compiles is kept in a folder of each worker: two types compiled at once may confuse a shared one."""
    folder = tempfile.TemporaryDirectory(prefix="numba_of_tests_")
    config.add_cleanup(folder.cleanup)
    os.environ["NUMBA_CACHE_DIR"] = folder.name


# rl_zoo3 puts a class of its own in its place as soon as anything imports it.
GYMNASIUMS_TIME_LIMIT = gymnasium.wrappers.TimeLimit


@pytest.fixture
def without_the_zoos_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """``gymnasium.make`` as it is for who does not use the zoo."""
    monkeypatch.setattr(gymnasium.wrappers, "TimeLimit", GYMNASIUMS_TIME_LIMIT)


@pytest.fixture(scope="session", autouse=True)
def sb3_logs_in_a_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SB3 makes a new folder among the system's temporary files for each run that names none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("sb3_logs")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_gpu_unless_a_test_asks_for_it() -> Iterator[None]:
    """SB3 takes a GPU by itself where there is one; what is tried here are small networks on the CPU, to the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(th.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def one_thread_and_clean_generators() -> Iterator[None]:
    """One thread is fastest for networks of this size; and no test sees what another drew."""
    th.set_num_threads(1)
    numpy_state, torch_state = np.random.get_state(), th.get_rng_state()
    yield
    np.random.set_state(numpy_state)
    th.set_rng_state(torch_state)


@pytest.fixture
def without_minatar(monkeypatch: pytest.MonkeyPatch) -> None:
    """MinAtar as it is for who has not installed it."""
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    monkeypatch.delitem(sys.modules, "sb3_lecture_dqn.envs.minatar_game", raising=False)  # which imports it


@pytest.fixture
def dead_process_id() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A server of our own; ``.ci/run`` installs its programs, and a user's machine may do without them."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL's initdb is not installed (Debian: apt-get install postgresql)")
    with postgres_server(programs) as server:
        yield server


@pytest.fixture(params=[True, False], ids=["compiled", "not compiled"])
def is_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With what Numba compiles, and with PyTorch's operations in its place, as it is where Numba is told not to compile."""
    from sb3_lecture_dqn.fast import kernels  # imported before the switch is set, which else stays as it was then

    if not request.param:
        monkeypatch.setattr(kernels.numba.config, "DISABLE_JIT", True)
    return bool(request.param)
