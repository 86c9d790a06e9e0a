"""
Measure the tuning engine, with a PostgreSQL server of its own.

::

    python benchmarks/tuning.py overhead   # seconds a trial: the engine with one worker against the zoo's own loop
    python benchmarks/tuning.py scaling    # trials a second: two workers against one
    python benchmarks/tuning.py driver     # queries and driver seconds a trial, with up to 1000 that run
    python benchmarks/tuning.py outage     # the database is away for 30 seconds in the middle

Rounds alternate, because the machine may be busy; its load is printed beside each. Only ratios mean anything.
"""

import argparse
import collections
import contextlib
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import TrialState

from sb3_lecture_dqn import zoo
from sb3_lecture_dqn.tuning.driver import Driver
from sb3_lecture_dqn.tuning.engine import Outcome, Report
from sb3_lecture_dqn.tuning.sampling import RepeatableSampler
from sb3_lecture_dqn.tuning.storage import held_trials, open_storage
from sb3_lecture_dqn.tuning.studies import Runner, open_study

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from postgres import PostgresServer, find_programs, postgres_server

#: The first trials of a run find their workers still importing.
WARM_UP = 4
STEPS = 1_000
#: Scaling is measured with trials that are long enough to be work.
SCALING_STEPS = 3_000
#: Trials that are finished, and that run, when the driver is measured.
STUDIES = ((0, 0), (1000, 0), (0, 100), (0, 1000), (1000, 1000))
#: All trials alike: else chance decides who is alone at the end, and one wide network weighs more than all the others.
PARAMS = {
    "learning_rate": 1e-3,
    "learning_rate_schedule": "constant",
    "batch_size": 128,
    "buffer_size": 50_000,
    "learning_starts": 100,
    "one_minus_gamma": 0.01,
    "train_freq": 4,
    "update_ratio": 1.0,
    "target_update_interval": 250,
    "exploration_fraction": 0.1,
    "exploration_final_eps": 0.05,
    "width": 256,
}
TRAINING = ["--env", "CartPole-v1", "--eval-episodes", "1"]
SEARCH = ["--sampler", "random", "--pruner", "none", "--seed", "0"]


def load() -> str:
    """How busy the machine is, this program left out only if nothing runs yet."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def seconds_a_trial(url: str, study_name: str) -> float:
    """From the completion of the last warm-up trial to that of the last but one: with the last one a worker may be alone."""
    trials = optuna.load_study(study_name=study_name, storage=open_storage(url)).trials
    ends = sorted(trial.datetime_complete for trial in trials if trial.datetime_complete)
    return (ends[-2] - ends[WARM_UP - 1]).total_seconds() / (len(ends) - 1 - WARM_UP)


def run_engine(url: str, n_trials: int, workers: int, steps: int) -> float:
    """Seconds a trial of the tuning command, which finds the trials in the study's queue."""
    name = f"engine-{uuid.uuid4().hex[:8]}"
    settings = zoo.TrialSettings("CartPole-v1", n_timesteps=steps, eval_episodes=1)
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(open_storage(url), name, zoo.scoring_of(zoo.make_manager(settings, folder)))
    for _ in range(n_trials):
        study.enqueue_trial(PARAMS)
    command = [sys.executable, "-m", "sb3_lecture_dqn.tune", *TRAINING, "-n", str(steps), *SEARCH, "--trials", str(n_trials)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--storage", url, "--study-name", name, "--workers", str(workers), "-f", folder]
        # Ray gives its workers way to everything else (niceness 15): on a busy machine that alone would be measured
        environment = {**os.environ, "RAY_worker_niceness": "0"}
        subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return seconds_a_trial(url, name)


def run_zoo(url: str, n_trials: int) -> float:
    """Seconds a trial of the zoo's loop in one process: the same trainings."""
    name = f"zoo-{uuid.uuid4().hex[:8]}"
    settings = zoo.TrialSettings("CartPole-v1", n_timesteps=STEPS, eval_episodes=1)
    with tempfile.TemporaryDirectory() as folder:
        manager = zoo.make_manager(settings, folder, sampler="random", pruner="none")
        sampler = RepeatableSampler(functools.partial(zoo.make_sampler, manager), seed=0)
        pruner = zoo.make_pruner(manager)  # Optuna's own default would end trials that the engine trains to the end
        study = optuna.create_study(
            storage=open_storage(url), study_name=name, direction="maximize", sampler=sampler, pruner=pruner
        )
        for _ in range(n_trials):
            study.enqueue_trial(PARAMS)
        study.optimize(manager.objective, n_trials)
    return seconds_a_trial(url, name)


def measure_overhead(server: PostgresServer, n_trials: int, rounds: int) -> None:
    """Print seconds a trial of both, round by round."""
    pairs = []
    for _ in range(rounds):
        pairs.append((run_zoo(server.url(), n_trials), run_engine(server.url(), n_trials, 1, STEPS)))
        print("zoo {:.3f} s a trial, engine {:.3f} s".format(*pairs[-1]), f"({load()})", flush=True)
    print(f"engine / zoo: median {statistics.median(engine / alone for alone, engine in pairs):.3f}")
    print(f"engine - zoo: median {statistics.median(engine - alone for alone, engine in pairs) * 1000:.0f} ms a trial")


def measure_scaling(server: PostgresServer, n_trials: int, rounds: int) -> None:
    """Print seconds a trial with one and with two workers, round by round."""
    ratios = []
    for _ in range(rounds):
        one, two = (run_engine(server.url(), n_trials, workers, SCALING_STEPS) for workers in (1, 2))
        ratios.append(one / two)
        print(f"1 worker {one:.3f} s a trial, 2 workers {two:.3f} s: {ratios[-1]:.2f} times ({load()})", flush=True)
    print(f"2 workers against 1: median {statistics.median(ratios):.2f} times")


class NothingToDoError(Exception):
    """All trials that may run have run."""


class InstantEngine:
    """Workers that train nothing: each trial reports once, and is complete when its answer has come."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._events: collections.deque[Report | Outcome] = collections.deque()

    def capacity(self) -> int:
        """All are there from the start."""
        return self._workers

    def submit(self, settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int) -> None:
        """Report at once; the value is any function of what was drawn."""
        self._events.append(Report(number, number, attempt, -abs(params["learning_rate"] - 1e-3), 1))

    def wait(self, seconds: float) -> list[Report | Outcome]:
        """Hand over the oldest event, so that as many trials run as there are workers."""
        if not self._events:
            raise NothingToDoError
        return [self._events.popleft()]

    def answer(self, report: Report, is_pruned: bool) -> None:
        """End the trial."""
        state = TrialState.PRUNED if is_pruned else TrialState.COMPLETE
        value = None if is_pruned else report.value
        self._events.append(Outcome(report.number, state, value, attributes={"scores": [report.value] * 2}))


def fill(study: optuna.Study, n_trials: int, state: TrialState, runner: Runner) -> None:
    """Add trials that others are thought to have run or to be running."""
    memory = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(n_trials):
        zoo.sample_lecture_dqn_params(memory.ask(), 0, 1, {})
    is_complete = state == TrialState.COMPLETE
    for trial in memory.trials:
        score = float(trial.number % 97)
        added = optuna.create_trial(
            state=state,
            value=score if is_complete else None,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**trial.user_attrs, "runner": runner.id},
            intermediate_values={1: score} if is_complete else {},
        )
        study.add_trial(added)


def measure_driver(server: PostgresServer, n_trials: int) -> None:
    """Print what a trial costs the driver and the database, by the number of trials that are finished and that run."""
    settings = zoo.TrialSettings("CartPole-v1", n_timesteps=200)
    with tempfile.TemporaryDirectory() as folder:
        manager = zoo.make_manager(settings, folder, sampler="tpe", pruner="median", n_startup_trials=10)
        for url in (f"{folder}/study.log", server.url()):
            for finished, running in STUDIES:
                study = open_study(open_storage(url), f"{finished} finished, {running} running", zoo.scoring_of(manager))
                with Runner(study) as runner:
                    fill(study, finished, TrialState.COMPLETE, runner)
                    fill(study, running, TrialState.RUNNING, runner)
                    # as if this driver had started them
                    held_trials(study).update(trial._trial_id for trial in study.get_trials(states=(TrialState.RUNNING,)))
                    driver = Driver(study, manager, settings, InstantEngine(10), runner, seed=0)
                    print(url[-9:], study.study_name, time_driver(driver, finished + running, n_trials), load(), flush=True)


def time_driver(driver: Driver, n_there: int, n_trials: int) -> str:
    """Run trials in a study that is there, and say what one cost."""
    driver.study.get_trials()  # what is there is read once, and then kept
    queries = 0

    def count(*_: Any) -> None:
        nonlocal queries
        queries += 1

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", count)
    begin, processor = time.perf_counter(), time.process_time()
    with contextlib.suppress(NothingToDoError):
        driver.run(n_there + n_trials, lambda trials: None)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", count)
    milliseconds = f"{seconds / n_trials * 1000:.0f} ms of the driver ({processor / n_trials * 1000:.0f} ms processor)"
    return f": {queries / n_trials:.0f} queries, {milliseconds} a trial,"


def measure_outage(server: PostgresServer, n_trials: int, seconds: float) -> None:
    """Take the database away in the middle of a study, and print what came of it."""
    stop, start = threading.Timer(30.0, server.stop), threading.Timer(30.0 + seconds, server.start)
    stop.start()
    start.start()
    name = f"outage-{uuid.uuid4().hex[:8]}"
    command = [sys.executable, "-m", "sb3_lecture_dqn.tune", *TRAINING, "-n", str(STEPS), *SEARCH, "--workers", "2"]
    command += ["--trials", str(n_trials)]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run([*command, "--storage", server.url(), "--study-name", name, "-f", folder], check=False)
    start.join()
    states = [trial.state.name for trial in optuna.load_study(study_name=name, storage=open_storage(server.url())).trials]
    print(f"exit status {result.returncode}, {collections.Counter(states)}")


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "scaling", "driver", "outage"])
    parser.add_argument("--trials", type=int, default=24, help="trials a run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    programs = find_programs()
    if programs is None:
        parser.error("PostgreSQL's initdb is not installed (Debian: apt-get install postgresql)")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(load())
    with postgres_server(programs) as server:
        if arguments.what == "overhead":
            measure_overhead(server, arguments.trials, arguments.rounds)
        elif arguments.what == "scaling":
            measure_scaling(server, arguments.trials, arguments.rounds)
        elif arguments.what == "driver":
            measure_driver(server, arguments.trials)
        else:
            measure_outage(server, arguments.trials, 30.0)


if __name__ == "__main__":
    main()
