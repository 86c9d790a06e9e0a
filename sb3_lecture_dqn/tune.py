"""
Tune LectureDQN's hyperparameters on this machine or on a Ray cluster, and write the best trial into a hyperparameter file.

::

    python -m sb3_lecture_dqn.tune --env CartPole-v1 --trials 100
    python -m sb3_lecture_dqn.tune best --env CartPole-v1 --output my_hyperparams.yml

The objective is rl_zoo3's own. Options that rl_zoo3.train has too are called and mean the same here.
"""

import argparse
import contextlib
import importlib.util
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import gymnasium
import optuna
from optuna.trial import TrialState

from sb3_lecture_dqn import zoo
from sb3_lecture_dqn.tuning.driver import Driver, Engine
from sb3_lecture_dqn.tuning.report import Progress, best_entry, write_entry, write_report
from sb3_lecture_dqn.tuning.scoring import DEFAULT_SEEDS
from sb3_lecture_dqn.tuning.storage import TuningError, first_line, open_storage
from sb3_lecture_dqn.tuning.studies import MAX_RETRIES, SCORING, Runner, find_study, note_entry, open_study


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return value

    return integer


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--study-name", help="name of the study (default: lecture_dqn-ENV)")
    parser.add_argument("--storage", help="database URL or journal file (default: an SQLite file in the log folder)")
    parser.add_argument("-f", "--log-folder", default="logs", help="folder of the reports")
    parser.add_argument(
        "-conf", "--conf-file", help="hyperparameter file that the search starts from (default: the package's)"
    )
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules that register environments")


def _tune_parser() -> argparse.ArgumentParser:
    parser = _Parser("sb3_lecture_dqn.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_study_arguments(parser)
    parser.add_argument("--trials", type=_at_least(1), required=True, help="finished trials that the study shall have in all")
    parser.add_argument("--ray-address", help="cluster: HOST:PORT, or auto on one of its machines (default: start Ray here)")
    parser.add_argument("--workers", type=_at_least(1), help="trials at once (default: one for each core)")
    parser.add_argument("--seeds", type=_at_least(2), default=DEFAULT_SEEDS, help="seeds that a trial is scored on")
    parser.add_argument("--max-retries", type=_at_least(0), default=MAX_RETRIES, help="new attempts at a trial that was lost")
    parser.add_argument("-n", "--n-timesteps", type=_at_least(1), default=-1, help="steps of each training")
    parser.add_argument(
        "--n-evaluations", type=_at_least(1), help="evaluations of each training (default: each 100 000 steps)"
    )
    parser.add_argument("--eval-episodes", type=_at_least(1), default=5, help="episodes of each evaluation")
    parser.add_argument("--sampler", choices=["random", "tpe"], default="tpe")
    parser.add_argument("--pruner", choices=["halving", "median", "none"], default="median")
    parser.add_argument("--n-startup-trials", type=_at_least(0), default=10, help="trials before sampler and pruner compare")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="seed of the sampler")
    return parser


def _best_parser() -> argparse.ArgumentParser:
    parser = _Parser("sb3_lecture_dqn.tune best", description="Write the best trial into a hyperparameter file.")
    _add_study_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="the .yml file, for rl_zoo3.train's --conf-file")
    parser.add_argument("--replace", action="store_true", help="replace the entry that the environment has there")
    return parser


def tune(arguments: argparse.Namespace) -> None:
    """
    Run a study.

    :param arguments: What the command line said
    :raises TuningError: if something is wrong, before anything starts; or, at the end, if every trial has failed
    :raises KeyboardInterrupt: if the study was stopped; the same command continues it
    """
    _check_engine(arguments)
    manager, settings = _make_manager(arguments)
    study, is_stopped = _run_study(arguments, manager, settings)
    name = f"report_{manager.env_name}_{arguments.trials}-trials-{manager.n_timesteps}-{arguments.sampler}-{arguments.pruner}"
    for path in write_report(study, Path(arguments.log_folder) / zoo.ALGORITHM, f"{name}_{int(time.time())}"):
        print(f"wrote {path}")
    if is_stopped:
        raise KeyboardInterrupt
    _check_success(study)


def _check_engine(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("ray") is None:
        raise TuningError("the engine is missing: pip install 'sb3-lecture-dqn[tune]'")
    from sb3_lecture_dqn.tuning.engine import check_address

    check_address(arguments.ray_address)


def _make_manager(arguments: argparse.Namespace) -> tuple[Any, zoo.TrialSettings]:
    """The zoo's manager of the search, and what its trials need to know, on other machines too."""
    settings = zoo.TrialSettings(
        arguments.env,
        arguments.n_timesteps,
        arguments.n_evaluations,
        arguments.eval_episodes,
        arguments.seeds,
        arguments.conf_file,
        tuple(arguments.gym_packages),
    )
    search = {key: getattr(arguments, key) for key in ("sampler", "pruner", "n_startup_trials")}
    with tempfile.TemporaryDirectory() as folder, _one_line_errors():
        manager = zoo.make_manager(settings, folder, **search)
        zoo.check_spaces(manager)
        return manager, zoo.with_conf_content(settings)


def _run_study(arguments: argparse.Namespace, manager: Any, settings: zoo.TrialSettings) -> tuple[optuna.Study, bool]:
    """The study after its trials, and whether it was stopped."""
    storage = open_storage(_storage_url(arguments))
    with contextlib.ExitStack() as stack:
        # to join a cluster starts nothing, so that comes first; a cluster of our own is started when all else is right
        cluster = _enter_engine(stack, arguments) if arguments.ray_address else None
        study = open_study(storage, _study_name(arguments), zoo.scoring_of(manager))
        note_entry(study, zoo.entry_in_words(manager))
        engine = cluster or _enter_engine(stack, arguments)
        runner = stack.enter_context(Runner(study, arguments.max_retries))
        driver = Driver(study, manager, settings, engine, runner, arguments.seed)
        with _stopped_by_signals(driver) as signals:
            driver.run(arguments.trials, Progress(arguments.trials, sys.stdout))
    return study, bool(signals)


def _check_success(study: optuna.Study) -> None:
    trials = study.get_trials(deepcopy=False)
    failures = [trial.user_attrs.get("failure", "no reason") for trial in trials if trial.state == TrialState.FAIL]
    if not any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials):
        what = f"all {len(failures)} trials of study {study.study_name!r}"
        raise TuningError(f"{what} have failed, the last with {failures[-1]}")


def _enter_engine(stack: contextlib.ExitStack, arguments: argparse.Namespace) -> Engine:
    from sb3_lecture_dqn.tuning.engine import RayEngine

    return stack.enter_context(contextlib.closing(RayEngine(arguments.ray_address, arguments.workers)))


@contextlib.contextmanager
def _stopped_by_signals(driver: Driver) -> Iterator[list[int]]:
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        driver.stop()
        print("stopping; what runs goes back into the queue", flush=True)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (AssertionError, gymnasium.error.Error, ImportError, OSError, ValueError) as error:
        raise TuningError(first_line(error)) from error
    except (AttributeError, KeyError, NameError, SyntaxError, TypeError) as error:  # by the Python code in an entry
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise TuningError(f"the hyperparameter entry must be one that the zoo can use, got {reason}") from error


def _study_name(arguments: argparse.Namespace) -> str:
    return arguments.study_name or f"{zoo.ALGORITHM}-{arguments.env}"


def _storage_url(arguments: argparse.Namespace) -> str:
    return arguments.storage or f"sqlite:///{Path(arguments.log_folder).absolute() / zoo.ALGORITHM / 'studies.db'}"


def write_best(arguments: argparse.Namespace) -> None:
    """
    Write the best trial of a study into a hyperparameter file.

    :param arguments: What the command line said
    :raises TuningError: if there is no such trial, or the file cannot take it
    """
    if arguments.output.suffix not in (".yml", ".yaml"):  # the zoo would run it as Python
        raise TuningError(f"--output must end in .yml or .yaml, got {arguments.output}")
    expected = {"algorithm": zoo.ALGORITHM, "environment": arguments.env}
    study = find_study(_storage_url(arguments), _study_name(arguments), expected)
    scoring = study.user_attrs.get(SCORING, {})
    settings = zoo.TrialSettings(
        arguments.env,
        scoring.get("n_timesteps", -1),
        conf_file=arguments.conf_file,
        gym_packages=tuple(arguments.gym_packages),
    )
    with _one_line_errors():
        entry = best_entry(study, settings)
        best = study.best_trial
        comment = f"Trial {best.number} of study {study.study_name}: {best.value:.2f}, the mean over seeds {scoring['seeds']}"
        write_entry(arguments.output, arguments.env, entry, comment, arguments.replace)
    print(f"wrote {arguments.env} into {arguments.output}")


def main(arguments: list[str]) -> int:
    """
    Run the command.

    :param arguments: The command line, without the program's name
    :return: The exit status: 0; 1 for an error; 130 if a study was stopped
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if arguments[:1] == ["best"]:
            write_best(_best_parser().parse_args(arguments[1:]))
        else:
            tune(_tune_parser().parse_args(arguments))
    except TuningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except optuna.exceptions.StorageInternalError as error:
        print(f"error: the database did not come back, start again when it has: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
