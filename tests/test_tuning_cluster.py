"""The tuning command on Ray: on this machine and on a cluster of three nodes, while workers, a node and the database die."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from postgres import PostgresServer

from sb3_lecture_dqn import zoo
from sb3_lecture_dqn.tuning.sampling import RepeatableSampler
from sb3_lecture_dqn.tuning.storage import open_storage
from sb3_lecture_dqn.tuning.studies import SCORING

pytest.importorskip("ray")

STEPS = 250
SETTINGS = zoo.TrialSettings("CartPole-v1", n_timesteps=STEPS, eval_episodes=1)
COMMAND = [sys.executable, "-m", "sb3_lecture_dqn.tune", "--env", "CartPole-v1", "-n", str(STEPS), "--eval-episodes", "1"]
# the same values and scores in any order of events
COMPARABLE = ["--sampler", "random", "--pruner", "none", "--seed", "5"]
MARK = "LECTURE_DQN_TEST"


@pytest.fixture
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Ray's files in a folder of our own, and a mark on its processes; at the end neither is there."""
    folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray makes sockets in it
    mark = uuid.uuid4().hex
    settings = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", MARK: mark}
    settings["RAY_worker_niceness"] = "0"  # else the workers wait for every other test
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield mark
    until(lambda: not [process for process in marked_processes(mark) if process != os.getpid()])
    shutil.rmtree(folder)


def marked_processes(mark: str, title: bytes = b"") -> list[int]:
    """Processes that inherited the mark and have the title."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_marked = f"{MARK}={mark}".encode() in (process / "environ").read_bytes()
            if is_marked and title in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def until(condition: Any) -> None:
    """Wait for something that must come; the limit is for a broken program alone."""
    for _ in range(1800):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within three minutes")


def trials_of(url: str, study_name: str) -> list[FrozenTrial]:
    with contextlib.suppress(KeyError):
        return optuna.load_study(study_name=study_name, storage=open_storage(url)).trials
    return []


def n_done(url: str, study_name: str) -> int:
    return sum(trial.state == TrialState.COMPLETE for trial in trials_of(url, study_name))


def uninterrupted_values(n_trials: int, folder: Path) -> list[float]:
    """What the zoo's own loop scores, in one process, with the values that the driver's seeds draw."""
    manager = zoo.make_manager(SETTINGS, str(folder / "zoo"), sampler="random", pruner="none")
    sampler, pruner = RepeatableSampler(partial(zoo.make_sampler, manager), 5), zoo.make_pruner(manager)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(manager.objective, n_trials)
    return [trial.value for trial in study.trials if trial.value is not None]


@contextlib.contextmanager
def started(*arguments: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as users start it; killed at the end if it has not come to its own."""
    with (folder / "output.txt").open("a") as output:
        process = subprocess.Popen([*COMMAND, *arguments], cwd=folder, stdout=output, stderr=output, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def finish(process: subprocess.Popen[str], folder: Path) -> str:
    """Wait for the command; the result is what it said."""
    code = process.wait(timeout=900)
    output = (folder / "output.txt").read_text()
    assert code == 0, output
    return output


@contextlib.contextmanager
def cluster_of_three() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**resources, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**resources)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


class WorkerKiller:
    """Kills a worker in the middle of a trial, again and again until it has killed enough."""

    def __init__(self, mark: str, kills: int, pause: float) -> None:
        self.kills = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(mark, kills, pause))

    def __enter__(self) -> "WorkerKiller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, mark: str, kills: int, pause: float) -> None:
        while not self._stop.wait(pause) and self.kills < kills:
            for process in marked_processes(mark, b"ray::_run_trial")[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    self.kills += 1


def test_thirty_trials_survive_killed_workers_and_a_lost_node(
    postgres: PostgresServer, ray_environment: str, tmp_path: Path
) -> None:
    url, study = postgres.url(), "killed"
    arguments = ["--storage", url, "--study-name", study, "--trials", "30", "--max-retries", "10", *COMPARABLE]
    with (
        cluster_of_three() as cluster,
        started(*arguments, "--ray-address", cluster.address, folder=tmp_path) as process,
        # to the end of the study, or eight times: a slow machine gets nothing done between more of them
        WorkerKiller(ray_environment, kills=8, pause=3.0) as killer,
    ):
        until(lambda: n_done(url, study) >= 10 or process.poll() is not None)
        cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)
        (mailbox,) = marked_processes(ray_environment, b"ray::Mailbox")
        os.kill(mailbox, signal.SIGKILL)
        output = finish(process, tmp_path)
    trials = trials_of(url, study)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 30
    assert [trial.value for trial in trials] == uninterrupted_values(30, tmp_path)
    losses = [reason for trial in trials for reason in trial.user_attrs.get("losses", [])]
    assert len(losses) >= killer.kills >= 3, output
    assert "30/30 done (0 pruned, 0 failed), 0 running" in output


def test_a_study_goes_on_when_its_database_comes_back(postgres: PostgresServer, ray_environment: str, tmp_path: Path) -> None:
    url, study = postgres.url(), "outage"
    arguments = ["--storage", url, "--study-name", study, "--trials", "12", "--workers", "2", *COMPARABLE]
    with started(*arguments, folder=tmp_path) as process:
        until(lambda: n_done(url, study) >= 2 or process.poll() is not None)
        postgres.stop()
        try:
            time.sleep(4)
        finally:
            postgres.start()
        output = finish(process, tmp_path)
    assert "the study's database does not answer, waiting" in output
    assert "the study's database is back" in output
    trials = trials_of(url, study)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 12
    assert [trial.value for trial in trials] == uninterrupted_values(12, tmp_path)
    assert not any("losses" in trial.user_attrs for trial in trials)


def test_a_study_that_was_stopped_and_then_killed_continues(ray_environment: str, tmp_path: Path) -> None:
    url, study = f"sqlite:///{tmp_path}/logs/lecture_dqn/studies.db", "lecture_dqn-CartPole-v1"
    arguments = ["--workers", "1", *COMPARABLE]
    with started("--trials", "100", *arguments, folder=tmp_path) as process:
        until(lambda: n_done(url, study) >= 1 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=900) == 130
    n_stopped = n_done(url, study)
    assert n_stopped >= 1
    assert {trial.state for trial in trials_of(url, study)} <= {TrialState.COMPLETE, TrialState.WAITING}

    with started("--trials", "100", *arguments, folder=tmp_path) as process:
        until(lambda: n_done(url, study) > n_stopped or process.poll() is not None)
        process.kill()
    n_trials = len(trials_of(url, study)) + 2

    with started("--trials", str(n_trials), *arguments, folder=tmp_path) as process:
        finish(process, tmp_path)
    trials = trials_of(url, study)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * n_trials
    assert [trial.value for trial in trials] == uninterrupted_values(n_trials, tmp_path)
    reports = {path.name.split("_", 3)[-1].partition("_")[2] or path.suffix for path in (tmp_path / "logs").rglob("report_*")}
    assert reports == {".csv", ".pkl", "history.png", "importances.png"}


def test_trials_are_pruned_and_errors_are_kept_with_their_reason(
    ray_environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    arguments = ["--env", "Fragile-v0", "--gym-packages", "fragile", "--trials", "12", "--workers", "1"]
    arguments += ["--n-startup-trials", "1", "--sampler", "random", "--n-evaluations", "2"]
    with started(*arguments, folder=tmp_path) as process:
        output = finish(process, tmp_path)
    url = f"sqlite:///{tmp_path}/logs/lecture_dqn/studies.db"
    trials = trials_of(url, "lecture_dqn-Fragile-v0")
    by_state = {state: [trial for trial in trials if trial.state == state] for state in TrialState}
    assert len(by_state[TrialState.COMPLETE]) + len(by_state[TrialState.PRUNED]) + len(by_state[TrialState.FAIL]) == 12
    assert by_state[TrialState.PRUNED], output
    assert by_state[TrialState.FAIL], output
    assert {trial.user_attrs["failure"] for trial in by_state[TrialState.FAIL]} == {"RuntimeError: the world has ended"}
    assert all("scores" not in trial.user_attrs for trial in by_state[TrialState.PRUNED])
    assert all(len(trial.user_attrs["scores"]) == 2 for trial in by_state[TrialState.COMPLETE])
    scoring = optuna.load_study(study_name="lecture_dqn-Fragile-v0", storage=url).user_attrs[SCORING]
    assert scoring["environment"] == "Fragile-v0"


# The later a world is made, the worse it is, so that later trials are pruned; now and then one ends in training.
FRAGILE = """
import itertools

import gymnasium
import numpy as np

worlds = itertools.count()


class FragileEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self):
        self.world = next(worlds)
        self.steps = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 60 and self.world % 10 == 9:
            raise RuntimeError("the world has ended")
        return np.zeros(1, np.float32), float(-self.world), self.steps % 10 == 0, False, {}


gymnasium.register("Fragile-v0", FragileEnv)
"""
