"""The programs of benchmarks/ that measure: that each runs with its documented arguments, and what it counts."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anatomy
import fuzz_files
import kills
import numpy as np
import paths
import pytest
import speed
import tuning
from postgres import PostgresServer
from scipy.stats import bootstrap

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


# --- kills.py and fuzz_files.py -------------------------------------------------------------------------------------------


def test_a_process_is_killed_with_those_that_it_has_started() -> None:
    reading, writing = os.pipe()

    def start_another() -> None:
        if os.fork() == 0:
            time.sleep(20)
            os.write(writing, b"it lives")
            os._exit(0)
        time.sleep(20)

    assert kills.exit_code_of(start_another, seconds=1) == -signal.SIGKILL
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == b""  # until nobody has the other end any more


def test_a_training_that_fails_has_not_been_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(kills, "train", fail)
    scenario = kills.Scenario("CartPole-v1", 1, "dummy", 800, 100)
    with pytest.raises(RuntimeError, match=r"^CartPole-v1 n_envs=1 dummy was to end or to be killed, got the exit code 1$"):
        kills.killed_until_done(scenario, tmp_path / "killed", 1e6, 1, kills.random.Random(0))
    assert "no space left on device" in capfd.readouterr().err


def test_an_error_that_is_not_clear_ends_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> str:
        raise ValueError("not enough values to unpack")

    fuzzer = fuzz_files.Fuzzer(tmp_path)
    monkeypatch.setitem(fuzz_files.LOADERS, ".safetensors", fail)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        fuzzer.model_file(".safetensors", fuzz_files.random.Random(0))


# --- speed.py and paths.py ------------------------------------------------------------------------------------------------


def test_a_peer_that_does_not_start_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbx.py").write_text("raise ImportError('no such version of JAX')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    workers: dict[str, Any] = {}
    speed._start(workers, "train", "sbx", 1)
    output, errors = capfd.readouterr()
    assert not workers
    assert output == "left out: sbx does not start; its error is above\n"
    assert "no such version of JAX" in errors


def test_the_peer_that_all_are_compared_with_has_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ChildProcessError("lecture_dqn does not start; its error is above")

    monkeypatch.setattr(speed, "Worker", refuse)
    with pytest.raises(SystemExit, match=r"^lecture_dqn does not start; its error is above$"):
        speed.measure("train", 1, 1)


def test_a_ratio_says_how_many_times_faster_we_are_and_of_the_floor_how_many_times_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"lecture_dqn": [200.0, 300.0, 200.0], "sb3": [100.0, 50.0, 100.0], "floor": [400.0, 400.0, 500.0]}
    monkeypatch.setattr(speed, "measure", lambda name, *_: rates)
    file = tmp_path / "rounds.jsonl"
    monkeypatch.setattr(sys, "argv", ["speed.py", "--rows", "gradient_step", "collect", "--output", str(file)])
    speed.main()
    assert capsys.readouterr().out.splitlines()[-6:-3] == [
        "| one gradient step | lecture_dqn | 200 (200 to 300) steps/s |  |",
        "| one gradient step | sb3 | 100 (50 to 100) steps/s | 2.00 × |",
        "| one gradient step | floor | 400 (400 to 500) steps/s | 2.00 × the floor's time |",
    ]
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == ["gradient_step", "collect"]


@pytest.mark.parametrize("row", ["train", "collect", "robo_parking", "gradient_step"])
def test_a_rate_counts_the_steps_that_were_made(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        """Each of its steps takes a second."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.seconds = 0

        def learn(self, steps: int, **_: Any) -> None:
            self.seconds += steps

        def train(self, gradient_steps: int, batch_size: int) -> None:
            self.seconds += gradient_steps

    model = Model()
    monkeypatch.setattr(speed, "algorithm", lambda peer: lambda *_, **__: model)
    one_round = speed.ROWS[row].rounds_of("sb3")
    monkeypatch.setattr(speed.time, "perf_counter", lambda: model.seconds)
    assert one_round() == 1


def test_one_core_is_busy_in_the_row_that_says_so_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(speed, "busy_core", lambda is_busy: (asked.append(is_busy), contextlib.nullcontext())[1])
    monkeypatch.setattr(speed, "_start", lambda *_: None)
    for name in speed.ROWS:
        speed.measure(name, 1, 1)
    assert [name for name, is_busy in zip(speed.ROWS, asked, strict=True) if is_busy] == ["train_busy"]


def test_all_rows_but_cudas_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class MadeOnError(Exception):
        """Says on which device, and ends what would take long."""

    def algorithm(*_: Any, device: str, **__: Any) -> None:
        raise MadeOnError(device)

    monkeypatch.setattr(speed, "algorithm", lambda peer: algorithm)
    for name, row in speed.ROWS.items():
        with pytest.raises(MadeOnError, match="^cuda$" if name.startswith("cuda") else "^cpu$"):
            row.rounds_of("sb3")


def test_the_table_of_a_cuda_device_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["anatomy.py", "cuda"])
    with pytest.raises(SystemExit, match=r"^there is no CUDA device$"):
        anatomy.main()


def test_a_busy_core_is_free_again_when_the_benchmark_is_killed() -> None:
    program = "import speed, sys\nwith speed.busy_core(True):\n    print('busy', flush=True)\n    sys.stdin.read()"
    folder = str(Path(speed.__file__).parent)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        process.kill()
        assert process.stdout.read() == ""  # ends when all that could write have ended


def test_seeds_that_agree_have_an_interval_too() -> None:
    assert paths.interval(np.full(10, 500.0)) == (500.0, 500.0)
    values = np.arange(10.0) ** 2
    expected = bootstrap((values,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    assert paths.interval(values) == tuple(expected)
