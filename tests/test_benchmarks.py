"""The programs of benchmarks/ that measure: that each runs with its documented arguments, and what it counts."""

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tuning
from postgres import PostgresServer

#: Program, arguments, and what its output says.
COMMANDS = [
    ("anatomy", "parts", "| norm of the gradient |"),
    ("checkpoint_overhead", "--steps 1200 --save-freq 1000", "checkpoints cost "),
    ("environments", "--rounds 1 --num-envs 2", "| a vector of 2 |"),
    ("fuzz_files", "--files 12", "12 files, 0 loaded with another content"),
    ("kills", "--kills 1 --only CartPole-v1 n_envs=1 dummy", "1 of 1 killed runs ended bit for bit"),
    ("paths", "--steps 20 --points 1 --seeds 3 --processes 1", "| 20 | "),
    ("save_crashes", "--crashes 2", "2 of 2 crashes left a whole checkpoint"),
    ("speed", "--rows gradient_step --rounds 1 --threads 1", "| one gradient step | floor |"),
    ("startup", "", "import of the hook: median "),
]


def once(work: Callable[[], object], **_: int) -> float:
    """In the place of a measurement."""
    work()
    return 1.0


#: What no argument says: to repeat nothing, and not to end the tests where the machine is slow.
REPLACED = {"anatomy": {"microseconds": once}, "fuzz_files": {"SECONDS_TO_HANG": 0}, "startup": {"ROUNDS": 1}}


@pytest.mark.parametrize(("name", "arguments", "expected"), COMMANDS, ids=[name for name, _, _ in COMMANDS])
def test_a_program_runs_and_leaves_nothing_behind(
    name: str,
    arguments: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = importlib.import_module(name)
    for attribute, value in REPLACED.get(name, {}).items():
        monkeypatch.setattr(program, attribute, value)
    only, _, scenario = arguments.partition("--only ")  # the one argument with spaces in it
    monkeypatch.setattr(sys, "argv", [name, *only.split(), *(["--only", scenario] if scenario else [])])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program.main()
    assert expected in capfd.readouterr().out
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")]  # PyTorch's cache


def test_the_driver_of_a_search_is_measured(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "STUDIES", ((1, 1),))
    tuning.measure_driver(postgres, 1)
    lines = capfd.readouterr().out.splitlines()
    assert len([line for line in lines if "1 finished, 1 running" in line]) == 2  # in a file, and in PostgreSQL
