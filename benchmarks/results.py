"""
Train LectureDQN and SB3's DQN for the tables of docs/results.md.

::

    python benchmarks/results.py                                            # whatever is missing, of all rows: days
    python benchmarks/results.py --rows CartPole-v1 --folder my_results     # a row again, in an empty folder
    python benchmarks/results.py --rows LunarLander-v2 --seeds 0 1 2 --params '{"gamma": 0.995}' --folder experiment

Both algorithms train with the same budget, seed by seed and in turn, one process a core and one thread a process, on the
environments and with the settings that the zoo's own manager makes of a hyperparameter entry. A run whose line is in its
result file is not repeated, unless the entry has changed since; a run that is killed loses only itself. Two commands with one
folder share the runs; who ends a command ends its trainings.

Evaluations do not count as time of training. The command ends with the score of each run. ``tables.py`` and ``figures.py``
take a ``--folder`` too, and show the runs of the rows as they are, not those of an experiment.

Needs ``sb3-lecture-dqn[dev]``.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import rl_zoo3
import torch as th
import yaml
from gymnasium.error import DependencyNotInstalled
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_lecture_dqn import DivergenceError, LectureDQN
from sb3_lecture_dqn.envs.robo_parking_drivers import find_optimal_drive
from sb3_lecture_dqn.model_files import replace_when_written
from sb3_lecture_dqn.validation import NUMERIC_ARGUMENTS
from sb3_lecture_dqn.zoo import CHECKPOINTS, HYPERPARAMS_FILE, register

FOLDER = Path(__file__).parent / "results"
ALGORITHMS = {"lecture_dqn": LectureDQN, "dqn": DQN}
# Seeds that no training and no search uses. Each evaluation has a thousand of its own.
FIRST_FINAL_SEED, FIRST_CURVE_SEED, SEEDS_OF_EACH = 5_000_000, 6_000_000, 1_000
N_EVALUATION_ENVS = 10
N_EVALUATIONS, EVALUATION_EPISODES, FINAL_EPISODES = 20, 20, 100
PACKAGES = ("torch", "stable-baselines3", "gymnasium", "rl-zoo3", "numpy", "sb3-lecture-dqn")
#: Exit code of a process whose run another command is training.
LEFT_TO_ANOTHER = os.EX_TEMPFAIL
OUTCOMES = {0: "done", LEFT_TO_ANOTHER: "left to the command that is training it"}


@dataclasses.dataclass(frozen=True)
class Row:
    """
    A row of the table.

    :param env: Environment id
    :param steps: Environment steps of each training
    :param target: The interquartile mean to reach; ``None`` for "above SB3's DQN"
    :param published: What the zoo publishes for its DQN
    :param settings: ``"zoo"`` for each algorithm's own hyperparameter entry, ``"ours"`` for LectureDQN's for both, or
        ``"defaults"`` for the constructors' defaults
    :param n_seeds: Number of seeds, from 0
    :param solved: Mean return from which an evaluation, or a seed, counts as solved
    :param n_solved: How many seeds have to be solved
    :param is_relative: Whether a score is the percentage by which the mean return is above the optimal driver's
    """

    env: str
    steps: int
    target: float | None = None
    published: str = ""
    settings: Literal["zoo", "ours", "defaults"] = "zoo"
    n_seeds: int = 10
    solved: float | None = None
    n_solved: int = 0
    is_relative: bool = False


ROWS = {
    "CartPole-v1": Row("CartPole-v1", 20_000, target=500, published="500 at 50 000 steps"),
    "Acrobot-v1": Row("Acrobot-v1", 50_000, target=-72, published="−76.6 at 100 000 steps"),
    "MountainCar-v0": Row("MountainCar-v0", 120_000, target=-100, published="−100.8"),
    "LunarLander-v2": Row("LunarLander-v2", 100_000, target=250, published="154.4", solved=200, n_solved=9),
    "LunarLander-v2-500k": Row("LunarLander-v2", 500_000, target=275, published="(PPO at 1 000 000 steps: 242)"),
    "RoboParking-v0": Row("RoboParking-v0", 50_000, target=-3, is_relative=True),
    "MinAtar-Breakout": Row("MinAtar/Breakout-v1", 500_000, settings="ours", n_seeds=3),
    "CartPole-v1-defaults": Row("CartPole-v1", 50_000, settings="defaults"),
    "Acrobot-v1-defaults": Row("Acrobot-v1", 50_000, settings="defaults"),
    "LunarLander-v2-defaults": Row("LunarLander-v2", 100_000, settings="defaults"),
}
#: Seeds on which nothing was chosen, for whoever asks what another seed ends at; they stand in no row.
FURTHER_SEEDS = range(100, 120)


@dataclasses.dataclass(frozen=True)
class Run:
    """
    One training.

    :param name: Name of its row
    :param row: Its row
    :param algorithm: ``"lecture_dqn"`` or ``"dqn"``
    :param seed: Its seed
    :param params: What to set on top of the row's settings
    """

    name: str
    row: Row
    algorithm: str
    seed: int
    params: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.algorithm} seed {self.seed}"


# --- Settings -------------------------------------------------------------------------------------------------------------


def read_entry(run: Run) -> dict[str, Any]:
    """The hyperparameter entry of a run, in the zoo's notation, with the row's budget."""
    if run.row.settings == "defaults":
        entry = {"policy": "MlpPolicy"}
    else:
        entry = _read_file_entry("lecture_dqn" if run.row.settings == "ours" else run.algorithm, run.row.env)
    return {**entry, **run.params, "n_timesteps": run.row.steps}


def _read_file_entry(algorithm: str, env_id: str) -> dict[str, Any]:
    if algorithm == "lecture_dqn":
        entries = _read_yaml(HYPERPARAMS_FILE)
    else:
        entries = _read_yaml(Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algorithm}.yml")
        env_id = env_id.replace("LunarLander-v2", "LunarLander-v3")  # the zoo has renamed its entry
    return dict(entries.get(env_id, entries["default"]))


@functools.cache
def _read_yaml(file: Path) -> dict[str, Any]:
    entries: dict[str, Any] = yaml.safe_load(file.read_text())
    return entries


def settings_in_use(run: Run) -> dict[str, Any]:
    """What a result file says about the settings of a run: the entry, and the constructor's defaults where it is silent."""
    parameters = inspect.signature(ALGORITHMS[run.algorithm]).parameters
    defaults = {name: parameters[name].default for name in ("learning_rate", "train_freq", *NUMERIC_ARGUMENTS)}
    plain = {name: str(value) if callable(value) else value for name, value in defaults.items()}
    settings: dict[str, Any] = json.loads(json.dumps(plain | read_entry(run)))
    return settings


def make_manager(run: Run, folder: Path) -> tuple[Any, Any]:
    """The zoo's manager of a run, after its set-up, and the model that it made."""
    register()
    os.environ.pop(CHECKPOINTS, None)  # else every run would go on from the first one's checkpoints
    config = folder / "entry.yml"
    config.write_text(yaml.safe_dump({run.row.env: read_entry(run)}))
    with contextlib.redirect_stdout(io.StringIO()):
        manager = ExperimentManager(
            argparse.Namespace(),
            run.algorithm,
            run.row.env,
            str(folder),
            eval_freq=-1,
            seed=run.seed,
            verbose=0,
            device="cpu",
            config=str(config),
        )
        model, _ = manager.setup_experiment()
    return manager, model


# --- One run --------------------------------------------------------------------------------------------------------------


def make_evaluation_env(manager: Any, first_seed: int) -> VecEnv:
    """Environments as the training has them, from seeds of their own; their returns are of the true rewards."""
    of_evaluation = copy.copy(manager)
    of_evaluation.seed = first_seed
    env: VecEnv = of_evaluation.create_envs(N_EVALUATION_ENVS, eval_env=True)
    return env


def greedy_returns(model: Any, env: VecEnv, n_episodes: int) -> list[float]:
    """The returns of greedy episodes, as the environment's Monitor has them: before any normalization."""
    training_env = model.get_env()
    if training_env is not None:
        sync_envs_normalization(training_env, env)
    returns, _ = evaluate_policy(model, env, n_episodes, deterministic=True, return_episode_rewards=True)
    return [round(float(episode_return), 2) for episode_return in returns]  # type: ignore[union-attr]


class LearningCurve(BaseCallback):
    """
    Evaluates the greedy policy a few times during training, and measures the time of the training without that.

    :param evaluate: What gives the returns of a model
    :param steps: Environment steps of the training
    :param report: Called with a line at each evaluation
    """

    def __init__(self, evaluate: Callable[[Any], list[float]], steps: int, report: Callable[[str], None]) -> None:
        super().__init__()
        self.evaluate, self.steps, self.report = evaluate, steps, report
        #: Environment steps, seconds of training, mean return
        self.points: list[tuple[int, float, float]] = []
        self._start = self._paused = 0.0

    def _on_training_start(self) -> None:
        self._start = time.perf_counter()

    def training_seconds(self) -> float:
        """Wall clock of the training so far, without the evaluations."""
        return round(time.perf_counter() - self._start - self._paused, 2)

    def _on_step(self) -> bool:
        n_points = len(self.points)  # a training goes on to the end of its last train_freq
        if n_points < N_EVALUATIONS and self.num_timesteps >= (n_points + 1) * self.steps / N_EVALUATIONS:
            seconds, pause_start = self.training_seconds(), time.perf_counter()
            mean_return = round(float(np.mean(self.evaluate(self.model))), 2)
            self.points.append((self.num_timesteps, seconds, mean_return))
            self._paused += time.perf_counter() - pause_start
            self.report(
                f"{self.num_timesteps:,} of {self.steps:,} steps in {seconds:.0f} s of training, mean return {mean_return:.1f}"
            )
        return True


def train_and_evaluate(run: Run, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """
    Train, and evaluate the final model.

    :param run: What to train
    :param report: Called with a line now and then
    :return: The line of the result file
    """
    th.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        manager, model = make_manager(run, Path(folder))
        offset = SEEDS_OF_EACH * run.seed
        curve_env = make_evaluation_env(manager, FIRST_CURVE_SEED + offset)
        curve = LearningCurve(lambda m: greedy_returns(m, curve_env, EVALUATION_EPISODES), run.row.steps, report)
        error = _learn(model, run.row.steps, [*manager.callbacks, curve])
        training_seconds = curve.training_seconds()
        final_env = make_evaluation_env(manager, FIRST_FINAL_SEED + offset)
        returns = greedy_returns(model, final_env, FINAL_EPISODES)
        for env in (model.get_env(), curve_env, final_env):
            env.close()
    result = {
        "row": run.name,
        "env": run.row.env,
        "algorithm": run.algorithm,
        "seed": run.seed,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "settings": settings_in_use(run),
        "steps": model.num_timesteps,
        "training_seconds": training_seconds,
        "curve": curve.points,
        "returns": returns,
    }
    if run.row.is_relative:
        result["optimal_return"] = optimal_return(run.row.env, FIRST_FINAL_SEED + offset)
    if error:
        result["error"] = error
    return result


def _learn(model: OffPolicyAlgorithm, steps: int, callbacks: list[BaseCallback]) -> str:
    """Train; a diverged run ends here, and counts with the policy that it has got."""
    try:
        model.learn(steps, callback=callbacks)
    except DivergenceError as error:
        return str(error)
    return ""


def optimal_return(env_id: str, first_seed: int) -> float:
    """The mean return of RoboParking's optimal driver from the starts of a final evaluation."""
    starts = final_starts(env_id, first_seed)
    return round(float(np.mean([find_optimal_drive(start).episode_return for start in starts])), 4)


def final_starts(env_id: str, first_seed: int) -> list[np.ndarray]:
    """The first observations of a final evaluation, for an environment that draws nothing but its starts."""
    starts = []
    for index in range(N_EVALUATION_ENVS):
        env = gymnasium.make(env_id)
        starts.append(env.reset(seed=first_seed + index)[0])
        starts += [env.reset()[0] for _ in range(FINAL_EPISODES // N_EVALUATION_ENVS - 1)]
    return starts


def score(row: Row, result: dict[str, Any]) -> float:
    """What a run counts with: its mean return, or by how many percent that is above the optimal driver's (so, below 0)."""
    mean_return = float(np.mean(result["returns"]))
    if not row.is_relative:
        return mean_return
    optimal: float = result["optimal_return"]
    return 100 * (mean_return - optimal) / abs(optimal)


# --- Result files ---------------------------------------------------------------------------------------------------------


def result_file(name: str, folder: Path) -> Path:
    """The result file of a row."""
    return folder / f"{name}.jsonl"


def read_results(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All lines of a row's result file; none if there is no file."""
    file = result_file(name, folder)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def results_of(runs: Iterable[Run], folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The results of those runs that are done, in their order; a line with other settings than today's is not of the run."""
    read = functools.cache(lambda name: read_results(name, folder))
    results = []
    for run in runs:
        wanted = run.algorithm, run.seed, settings_in_use(run)
        fitting = [line for line in read(run.name) if (line["algorithm"], line["seed"], line["settings"]) == wanted]
        results += fitting[:1]
    return results


def append_result(result: dict[str, Any], folder: Path) -> None:
    """Add a line to its result file, unless the run has one: the file is replaced by a longer one, or stays as it was."""
    with _locked(folder):
        lines = read_results(result["row"], folder)
        if any(all(line[key] == result[key] for key in ("algorithm", "seed", "settings")) for line in lines):
            return
        with replace_when_written(result_file(result["row"], folder)) as unfinished:
            unfinished.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*lines, result]))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# --- All runs -------------------------------------------------------------------------------------------------------------


def runs_of(
    name: str,
    row: Row,
    algorithms: Iterable[str] = tuple(ALGORITHMS),
    seeds: Iterable[int] | None = None,
    params: Mapping[str, Any] | None = None,
) -> list[Run]:
    """The runs of a row: seed by seed and the algorithms in turn, so that a part of them is a fair comparison too."""
    seeds = range(row.n_seeds) if seeds is None else seeds
    return [Run(name, row, algorithm, seed, dict(params or {})) for seed in seeds for algorithm in algorithms]


def carry_out(run: Run, folder: Path) -> None:
    """Train, evaluate and write the line, unless another process does or has done it: what each process does."""
    _end_with_the_command()
    with _claimed(run, folder) as is_ours:
        if not is_ours:
            sys.exit(LEFT_TO_ANOTHER)
        if results_of([run], folder):
            return
        print(f"{run}: starts", flush=True)
        try:
            result = train_and_evaluate(run, lambda line: print(f"{run}: {line}", flush=True))
        except DependencyNotInstalled as error:
            sys.exit(f"{run}: {error}")
        _append_or_print(result, folder)


def _end_with_the_command() -> None:
    """Have this process end, with its claim given back, when it is told to and when the command that started it is gone."""
    command = multiprocessing.parent_process()
    if command is None:
        return

    def wait_for_its_end() -> None:
        command.join()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=wait_for_its_end, daemon=True).start()


@contextlib.contextmanager
def _claimed(run: Run, folder: Path) -> Iterator[bool]:
    """Whether the run is this process's alone. However a process dies, the system takes its lock away."""
    settings = hashlib.sha256(json.dumps(settings_in_use(run), sort_keys=True).encode()).hexdigest()[:8]
    file = folder / f".{run.name}-{run.algorithm}-{run.seed}-{settings}.lock"
    is_ours = False
    with _locked(folder):  # nobody removes the file before it is locked
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
    try:
        yield is_ours
    finally:
        if is_ours:
            with _locked(folder):
                file.unlink()
        os.close(descriptor)


def _append_or_print(result: dict[str, Any], folder: Path) -> None:
    """A line that cannot be written is printed: it took a training."""
    try:
        append_result(result, folder)
    except (OSError, ValueError) as error:
        print(json.dumps(result, ensure_ascii=False), flush=True)
        sys.exit(f"{result_file(result['row'], folder)} cannot be written ({error}); its new line is printed above")


def run_in_processes(
    runs: Sequence[Any], folder: Path, n_processes: int, work: Callable[[Any, Path], None] = carry_out
) -> int:
    """
    Start a process for each run, so many at once; they end with this function.

    :param runs: The runs, in their order
    :param folder: Folder of the result files
    :param n_processes: How many at once
    :param work: What a process does
    :return: How many have failed
    """
    context = multiprocessing.get_context("spawn")
    waiting, running, n_done, n_failed = list(runs), {}, 0, 0
    start = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < n_processes:
                run = waiting.pop(0)
                process = context.Process(target=work, args=(run, folder), daemon=True)
                _start_leaving_ctrl_c_to_us(process)
                running[process.sentinel] = (run, process)
            for sentinel in wait(list(running)):
                run, process = running.pop(sentinel)  # type: ignore[call-overload]
                process.join()
                n_done += 1
                n_failed += process.exitcode not in OUTCOMES
                hours_left = (time.monotonic() - start) / n_done * (len(runs) - n_done) / 3600
                outcome = OUTCOMES.get(process.exitcode, f"FAILED with exit code {process.exitcode}")
                print(f"{run}: {outcome}; {n_done} of {len(runs)} runs, about {hours_left:.1f} h left", flush=True)
    finally:
        _end([process for _, process in running.values()])
    return n_failed


def _start_leaving_ctrl_c_to_us(process: Any) -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is ignored stays so in a new process
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: as many as the row asks for")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the result files")
    parser.add_argument("--steps", type=int, help="for an experiment: other environment steps than the row's")
    parser.add_argument("--params", type=json.loads, default={}, help="for an experiment: JSON, set on top of the settings")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes must be at least 1, got {arguments.processes}")
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if not isinstance(arguments.params, dict):
        parser.error(f"--params must be a JSON object, got {json.dumps(arguments.params)}")
    if min(arguments.seeds or [0]) < 0:
        parser.error(f"--seeds must be at least 0, got {min(arguments.seeds)}")
    if arguments.folder.resolve() == FOLDER.resolve():
        _check_that_the_rows_stay_as_they_are(parser, arguments)
    _check_folder(parser, arguments.folder)
    return arguments


def _check_that_the_rows_stay_as_they_are(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.steps or arguments.params:
        parser.error("--steps and --params need a --folder of their own: the committed results are of the rows as they are")
    for name in arguments.rows:
        last_seed = ROWS[name].n_seeds - 1
        if max(arguments.seeds or [0]) > last_seed:
            parser.error(f"--seeds must be at most {last_seed} for {name} without a --folder, got {max(arguments.seeds)}")


def _check_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"--folder must be a folder that can be written to, got {folder} ({error.strerror})")


def main() -> None:
    """Run what is missing, and print the score of each run."""
    arguments = _parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that this one starts
    runs = []
    for name in arguments.rows:
        row = dataclasses.replace(ROWS[name], steps=arguments.steps or ROWS[name].steps)
        runs += runs_of(name, row, arguments.algorithms, arguments.seeds, arguments.params)
    missing = [run for run in runs if not results_of([run], arguments.folder)]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already", flush=True)
    try:
        n_failed = run_in_processes(missing, arguments.folder, arguments.processes)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with what is missing")
    for run in runs:
        for result in results_of([run], arguments.folder):
            print(f"{run}: {score(run.row, result):.2f} after {result['training_seconds']:.0f} s of training")
    if n_failed:
        sys.exit(f"{n_failed} runs have failed; the same command repeats them")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the trainings end too
    main()
