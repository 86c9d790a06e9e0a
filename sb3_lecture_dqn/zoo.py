"""
Everything that touches rl_zoo3: what makes ``python -m rl_zoo3.train --algo lecture_dqn`` work.

rl_zoo3 has no plugins. ``zoo_startup.py``, which Python's start-up runs, calls :data:`EXTENSIONS` when the zoo's modules are
imported; or, without it, this module runs any of the zoo's commands by itself::

    python -m sb3_lecture_dqn.zoo train --algo lecture_dqn --env LunarLander-v2
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import optuna

from sb3_lecture_dqn.lecture_dqn import LectureDQN
from sb3_lecture_dqn.model_files import replace_when_written
from sb3_lecture_dqn.resume.checkpoint_files import has_checkpoints
from sb3_lecture_dqn.resume.checkpoints import ResumableCheckpointCallback
from sb3_lecture_dqn.resume.run_settings import NOT_GIVEN, check_same_run, in_few_words
from sb3_lecture_dqn.search_space import convert_lecture_dqn_params, merge_policy_kwargs, sample_lecture_dqn_params
from sb3_lecture_dqn.tuning.scoring import DEFAULT_SEEDS, FIRST_SEED, score_on_seeds
from sb3_lecture_dqn.tuning.storage import PatientStorage, TuningError, is_held, open_storage
from sb3_lecture_dqn.tuning.studies import Runner, find_study, note_entry, open_study
from sb3_lecture_dqn.validation import check_action_space, check_observation_space

ALGORITHM = "lecture_dqn"
#: Environment variable that switches ``zoo_startup.py`` off when it is ``0``.
SWITCH = "SB3_LECTURE_DQN_ZOO"
#: Environment variable that names a folder for checkpoints, from which the same command, started again, continues.
CHECKPOINTS = "SB3_LECTURE_DQN_CHECKPOINTS"
#: Steps between two checkpoints where the zoo's ``--save-freq`` does not say it.
DEFAULT_SAVE_FREQ = 10_000
#: File in that folder with what the zoo would decide anew.
RUN_FILE = "zoo_run.json"
#: Where the zoo's enjoy looks for an agent, and where its train writes one, unless they are told otherwise.
AGENTS_FOLDER, LOGS_FOLDER = "rl-trained-agents", "logs"
#: How the names of hyperparameter files end; any other name is a Python module's to the zoo.
CONF_FILE_ENDINGS = (".yml", ".yaml", ".py")
#: Keys of a hyperparameter entry that are the zoo's own (and, for a search, the number of seeds), not the constructor's.
ZOO_KEYS = frozenset(
    {
        "callback",
        "env_kwargs",
        "env_wrapper",
        "frame_stack",
        "monitor_kwargs",
        "n_envs",
        "n_timesteps",
        "normalize",
        "trial_seeds",
        "vec_env_wrapper",
    }
)
#: Arguments of the constructor that the zoo gives by itself; with one of an entry they would be given twice.
GIVEN_BY_THE_ZOO = frozenset({"env", "device", "seed", "tensorboard_log", "verbose", "_init_setup_model"})
COMMANDS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record_video": "rl_zoo3.record_video",
    "record_training": "rl_zoo3.record_training",
    "load_from_hub": "rl_zoo3.load_from_hub",
    "push_to_hub": "rl_zoo3.push_to_hub",
    "benchmark": "rl_zoo3.benchmark",
    # the zoo's console script reads these from its arguments
    "plot_train": "rl_zoo3.cli",
    "plot_from_file": "rl_zoo3.cli",
    "all_plots": "rl_zoo3.cli",
}


def _find_hyperparams_file() -> Path:
    package = Path(__file__).parent
    in_wheel = package / "hyperparams" / f"{ALGORITHM}.yml"
    in_source_folder = package.parent / "hyperparams" / f"{ALGORITHM}.yml"
    return in_wheel if in_wheel.exists() else in_source_folder


HYPERPARAMS_FILE = _find_hyperparams_file()


# --- What is put into the zoo's modules -----------------------------------------------------------------------------------


def add_algorithm(utils: Any) -> None:
    """
    Make the algorithm a choice of ``--algo``, and its own trainings what the zoo plays where there is no trained agent.

    :param utils: ``rl_zoo3.utils``
    """
    if ALGORITHM not in utils.ALGOS:
        utils.get_model_path = _looking_in_the_logs_too(utils.get_model_path)
    utils.ALGOS[ALGORITHM] = LectureDQN


def add_search_space(hyperparams_opt: ModuleType) -> None:
    """
    Make ``--optimize-hyperparameters`` and ``--trial-id`` work.

    :param hyperparams_opt: ``rl_zoo3.hyperparams_opt``
    """
    hyperparams_opt.HYPERPARAMS_SAMPLER[ALGORITHM] = sample_lecture_dqn_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[ALGORITHM] = convert_lecture_dqn_params


def extend_manager(exp_manager: ModuleType) -> None:
    """
    Extend the zoo's manager for this algorithm, and for no other.

    This project's hyperparameter file becomes the default, and an unknown key in any file a clear error. A trial is scored
    on several seeds, a study is never mixed with another's, and trials whose process died are taken up again. A training
    makes checkpoints where the environment variable :data:`CHECKPOINTS` names a folder for them. One that cannot begin leaves
    no run without a model, which would be the newest one that the zoo then fails to play.

    :param exp_manager: ``rl_zoo3.exp_manager``
    """
    manager = exp_manager.ExperimentManager
    if hasattr(manager, "trial_seeds"):
        return
    manager.trial_seeds = DEFAULT_SEEDS
    manager.__init__ = _with_our_config(manager.__init__)
    manager.read_hyperparameters = _with_checked_keys(manager.read_hyperparameters)
    manager.objective = _on_several_seeds(manager.objective)
    manager.hyperparameters_optimization = _with_a_safe_study(manager.hyperparameters_optimization)
    manager.create_callbacks = _with_checkpoints(manager.create_callbacks)
    manager.setup_experiment = _leaving_no_empty_run(manager.setup_experiment)


EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": add_algorithm,
    "rl_zoo3.hyperparams_opt": add_search_space,
    "rl_zoo3.exp_manager": extend_manager,
}


def _signature_with(function: Callable[..., Any], *parameters: str) -> inspect.Signature:
    """The signature of one of the zoo's functions, which must take these arguments."""
    signature = inspect.signature(function)
    for parameter in parameters:
        if parameter not in signature.parameters:
            raise TypeError(f"{function.__qualname__} takes no argument {parameter}")
    return signature


# --- Playing --------------------------------------------------------------------------------------------------------------


def _looking_in_the_logs_too(get_model_path: Callable[..., Any]) -> Callable[..., Any]:
    signature = _signature_with(get_model_path, "exp_id", "folder", "algo", "env_name")

    @functools.wraps(get_model_path)
    def get_path(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given["algo"] != ALGORITHM:
            return get_model_path(*args, **kwargs)
        try:
            return get_model_path(**_skipping_runs_without_a_model(given))
        except (AssertionError, ValueError):
            if given["folder"] != AGENTS_FOLDER:
                raise
            with contextlib.suppress(AssertionError, ValueError):
                return get_model_path(**_skipping_runs_without_a_model({**given, "folder": LOGS_FOLDER}))
            raise

    return get_path


def _skipping_runs_without_a_model(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``get_model_path``, where 0 no longer means a search or a run that ended before it had a model."""
    if given["exp_id"] != 0:
        return given
    run_name = re.compile(rf"{re.escape(given['env_name'])}_(\d+)")
    models = Path(given["folder"], ALGORITHM).glob("*/*.zip")
    matches = [run_name.fullmatch(path.parent.name) for path in models]
    return {**given, "exp_id": max((int(match[1]) for match in matches if match), default=0)}


# --- Runs, and their checkpoints ------------------------------------------------------------------------------------------


def _with_our_config(init: Callable[..., None]) -> Callable[..., None]:
    signature = _signature_with(init, "algo", "config")

    @functools.wraps(init)
    def init_with_our_config(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs)
        if arguments.arguments["algo"] == ALGORITHM and not arguments.arguments.get("config"):
            arguments.arguments["config"] = str(HYPERPARAMS_FILE)
        init(*arguments.args, **arguments.kwargs)
        manager = arguments.args[0]
        if _makes_checkpoints(manager):
            _take_up_run(manager, Path(os.environ[CHECKPOINTS]))

    return init_with_our_config


def _makes_checkpoints(manager: Any) -> bool:
    return bool(os.environ.get(CHECKPOINTS)) and manager.algo == ALGORITHM and not manager.optimize_hyperparameters


def _take_up_run(manager: Any, folder: Path) -> None:
    """Give a run that was started again the folder and the seed of its first start."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{CHECKPOINTS} must name a folder, got {folder}, which is a file")
    run = _read_run(folder)
    if run is None:
        return
    env_id = manager.env_name.gym_id
    if run["env"] != env_id:
        raise ValueError(f"{CHECKPOINTS} must name a folder for {env_id}, got {folder} with a run of {run['env']}")
    if _seed_was_given():
        check_same_run({"seed": str(run["seed"])}, {"seed": str(manager.seed)}, folder)
    manager.seed = manager.args.seed = run["seed"]
    manager.save_path = run["save_path"]
    manager.params_path = f"{manager.save_path}/{manager.env_name}"


def _read_run(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder was started with; a start that came to no checkpoint left nothing to go on from."""
    run_file = folder / RUN_FILE
    if not has_checkpoints(folder) or not run_file.exists():
        return None
    run: dict[str, Any] = json.loads(run_file.read_text())
    return run


def _write_run(manager: Any, folder: Path) -> None:
    run = {
        "env": manager.env_name.gym_id,
        "save_path": str(Path(manager.save_path).resolve()),
        "seed": manager.seed,
        "settings": _run_settings(manager),
    }
    with replace_when_written(folder / RUN_FILE) as unfinished:
        unfinished.write_text(json.dumps(run))


def _run_settings(manager: Any) -> dict[str, str]:
    """What makes a run another run, of all that the zoo was told, in words."""
    settings = {
        **manager.given_hyperparams,
        "n_timesteps": manager.n_timesteps,
        "env_kwargs": manager.env_kwargs,
        "eval_env_kwargs": manager.eval_env_kwargs,
        "eval_freq": manager.eval_freq,
        "eval_episodes": manager.n_eval_episodes,
        "n_eval_envs": manager.n_eval_envs,
        "trained_agent": manager.trained_agent and str(Path(manager.trained_agent).resolve()),
        "vec_env": manager.vec_env_class.__name__,
        "callbacks": [type(callback).__name__ for callback in manager.callbacks],
    }
    return {name: in_few_words(value) for name, value in settings.items()}


def _seed_was_given() -> bool:
    # the zoo has put one that it drew in the place of none
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seed", type=int, default=-1)
    return bool(parser.parse_known_args()[0].seed >= 0)


def _with_checkpoints(create_callbacks: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(create_callbacks)
    def create_callbacks_and_ours(manager: Any) -> None:
        save_freq = manager.save_freq if manager.save_freq > 0 else DEFAULT_SAVE_FREQ
        create_callbacks(manager)
        if _makes_checkpoints(manager):
            folder = Path(os.environ[CHECKPOINTS])
            manager.callbacks.append(ResumableCheckpointCallback(save_freq, folder, verbose=manager.verbose))
            _check_continues_run(manager, folder)

    return create_callbacks_and_ours


def _check_continues_run(manager: Any, folder: Path) -> None:
    """Refuse another run before the zoo writes over the files of the one whose folder it would go on in."""
    saved = (_read_run(folder) or {}).get("settings")
    if saved is not None:
        settings = _run_settings(manager)
        check_same_run({**dict.fromkeys(settings, NOT_GIVEN), **saved}, settings, folder)


def _leaving_no_empty_run(setup_experiment: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(setup_experiment)
    def set_up_or_clean_up(manager: Any) -> Any:
        run_folder = Path(manager.save_path)
        was_there = run_folder.exists()
        try:
            results = setup_experiment(manager)
        except Exception:
            # the zoo writes this file last: a run that has it is another process's, begun at the same moment
            has_begun = (Path(manager.params_path) / "config.yml").exists()
            if manager.algo == ALGORITHM and not was_there and not has_begun:
                shutil.rmtree(run_folder, ignore_errors=True)
            raise
        if _makes_checkpoints(manager) and _read_run(Path(os.environ[CHECKPOINTS])) is None:
            _write_run(manager, Path(os.environ[CHECKPOINTS]))
        return results

    return set_up_or_clean_up


# --- Hyperparameter entries -----------------------------------------------------------------------------------------------


def _with_checked_keys(read_hyperparameters: Callable[[Any], Any]) -> Callable[[Any], Any]:
    read = _naming_the_file(read_hyperparameters)

    @functools.wraps(read_hyperparameters)
    def read_and_check(manager: Any) -> Any:
        if manager.algo != ALGORITHM:
            return read_hyperparameters(manager)
        _load_trial(manager, read)
        hyperparams, saved_hyperparams = read(manager)
        hyperparams = dict(hyperparams)  # of a module it is the module's own, and the zoo takes it apart
        if manager._eval_env_kwargs_args is None and "env_kwargs" in hyperparams:
            manager.eval_env_kwargs = hyperparams["env_kwargs"]  # as for those of the command line
        manager.trial_seeds = _check_trial_seeds(hyperparams.pop("trial_seeds", DEFAULT_SEEDS))
        check_hyperparameter_keys(hyperparams)
        saved_hyperparams.pop("trial_seeds", None)
        manager.given_hyperparams = dict(saved_hyperparams)
        return hyperparams, saved_hyperparams

    return read_and_check


def _naming_the_file(read_hyperparameters: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(manager: Any) -> Any:
        try:
            return read_hyperparameters(manager)
        except (ImportError, OSError):
            raise
        except Exception as error:  # a Python file may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"--conf-file must hold hyperparameter entries, got {manager.config}: {reason}") from error

    return read


def _load_trial(manager: Any, read_hyperparameters: Callable[[Any], Any]) -> None:
    if not manager.storage or not manager.study_name or manager.trial_id is None:
        return
    # to the zoo, --trial-id 0 looks like no --trial-id; and it would lose the entry's policy_kwargs
    trial_id, manager.trial_id = manager.trial_id, None
    with contextlib.redirect_stdout(io.StringIO()):
        entry = read_hyperparameters(manager)[1]
    drawn = convert_lecture_dqn_params(_drawn_by(manager, trial_id))
    manager.custom_hyperparams = {**keep_policy_kwargs(entry, drawn), **(manager.custom_hyperparams or {})}


def _drawn_by(manager: Any, trial_id: int) -> dict[str, Any]:
    try:
        expected = {"algorithm": ALGORITHM, "environment": manager.env_name.gym_id}
        study = find_study(manager.storage, manager.study_name, expected)
    except TuningError as error:
        raise SystemExit(f"error: {error}") from error
    params = {trial.number: trial.params for trial in study.get_trials(deepcopy=False) if trial.params}
    if trial_id not in params:
        trials = f"{min(params)}..{max(params)}" if params else "none"
        raise SystemExit(f"error: --trial-id must be a trial of study {manager.study_name!r} ({trials}), got {trial_id}")
    return params[trial_id]


def keep_policy_kwargs(entry: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """
    Complete what a trial drew, so that the entry that its search started from can be updated with it.

    :param entry: The entry
    :param drawn: The trial's hyperparameters, with ``policy_kwargs``
    :return: The same, where ``policy_kwargs`` has those of the entry that the trial did not draw
    """
    return {**drawn, "policy_kwargs": merge_policy_kwargs(entry.get("policy_kwargs"), drawn["policy_kwargs"])}


def _check_trial_seeds(trial_seeds: Any) -> int:
    if not isinstance(trial_seeds, int) or trial_seeds < 2:
        raise ValueError(f"trial_seeds must be an integer of at least 2, got {trial_seeds!r}")
    return trial_seeds


def check_hyperparameter_keys(hyperparams: dict[str, Any]) -> None:
    """
    Check that each key of a hyperparameter entry is an argument of ``LectureDQN`` or one of the zoo's, and none is missing.

    :param hyperparams: The entry of one environment
    :raises ValueError: if there is another key, or one that each entry needs is missing
    """
    arguments = set(inspect.signature(LectureDQN).parameters) - GIVEN_BY_THE_ZOO
    for key in hyperparams:
        if key not in arguments | ZOO_KEYS:
            raise ValueError(f"unknown hyperparameter {key!r}, may be one of {', '.join(sorted(arguments | ZOO_KEYS))}")
    for key in ("n_timesteps", "policy"):
        if key not in hyperparams:
            raise ValueError(f"a hyperparameter entry must have {key}, got {', '.join(hyperparams) or 'an empty one'}")


# --- Searches -------------------------------------------------------------------------------------------------------------


class _Entry(dict[str, Any]):
    """An entry's hyperparameters, of which the zoo makes a copy and updates it with what a trial drew."""

    def copy(self) -> "_Entry":
        return _Entry(self)

    def update(self, drawn: dict[str, Any]) -> None:  # type: ignore[override]
        super().update(keep_policy_kwargs(self, drawn))


def _on_several_seeds(objective: Callable[[Any, Any], float]) -> Callable[[Any, Any], float]:
    @functools.wraps(objective)
    def score(manager: Any, trial: Any) -> float:
        if manager.algo != ALGORITHM:
            return objective(manager, trial)
        manager._hyperparams = _Entry(manager._hyperparams)
        with _claimed(manager, trial):
            return score_on_seeds(objective, manager, trial, manager.trial_seeds)

    return score


@contextlib.contextmanager
def _claimed(manager: Any, trial: Any) -> Iterator[None]:
    if not hasattr(manager, "runner"):
        yield
        return
    manager.runner.claim(trial)
    try:
        yield
    except optuna.exceptions.StorageInternalError:
        raise
    except Exception:
        _check_held(manager.runner, trial)
        raise
    _check_held(manager.runner, trial)


def _check_held(runner: Runner, trial: Any) -> None:
    # as when this process was suspended: Optuna would overwrite what the other one says, or fail with a traceback
    if not is_held(runner.study, trial, runner.id):
        advice = "its result is dropped, start this one again"
        raise SystemExit(f"error: trial {trial.number} was taken over by another process: {advice}")


def _with_a_safe_study(optimize: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(optimize)
    def optimize_safely(manager: Any) -> None:
        if manager.algo != ALGORITHM:
            return optimize(manager)
        n_trials = manager.n_trials if manager.max_total_trials is None else manager.max_total_trials
        if n_trials < 1:
            raise SystemExit(f"error: the number of trials must be at least 1, got {n_trials}")
        if manager.n_jobs != 1:  # its trials are threads, which would draw from the same seeded generators
            advice = "start several processes on one --storage instead"
            raise SystemExit(f"error: --n-jobs must be 1 for {ALGORITHM}, got {manager.n_jobs}: {advice}")
        # without a name nobody can join the study, nor take up what it lost
        if not manager.storage or not manager.study_name:
            return optimize(manager)
        try:
            storage = open_storage(manager.storage)
            study = open_study(storage, manager.study_name, scoring_of(manager))
            note_entry(study, entry_in_words(manager))
        except TuningError as error:
            raise SystemExit(f"error: {error}") from error
        if isinstance(storage, PatientStorage):
            manager.storage = storage
        with Runner(study) as manager.runner:
            return optimize(manager)

    return optimize_safely


def scoring_of(manager: Any) -> dict[str, Any]:
    """
    Say what the scores of a study mean: trials of two studies compare only if they agree in this.

    :param manager: An ``ExperimentManager`` after ``setup_experiment``
    :return: What :func:`~sb3_lecture_dqn.tuning.studies.open_study` records
    """
    return {
        "algorithm": manager.algo,
        "environment": manager.env_name.gym_id,
        "env_kwargs": _as_json(manager.env_kwargs),
        "eval_env_kwargs": _as_json(manager.eval_env_kwargs),
        "n_timesteps": manager.n_timesteps,
        "n_evaluations": manager.n_evaluations,
        "eval_episodes": manager.n_eval_episodes,
        "seeds": [FIRST_SEED + index for index in range(manager.trial_seeds)],
    }


def entry_in_words(manager: Any) -> dict[str, str]:
    """
    Say what a hyperparameter entry holds, in words that two entries can be compared by.

    :param manager: An ``ExperimentManager`` after ``setup_experiment``
    :return: The words of each value
    """
    return {name: in_few_words(value) for name, value in manager.given_hyperparams.items()}


def _as_json(value: Any) -> Any:
    """A value as a database gives it back, where tuples are lists; what JSON does not know is its ``repr``."""
    return json.loads(json.dumps(value, default=repr))


# --- Trials outside of the zoo's own search -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrialSettings:
    """
    What a trial of the engine needs to know: the arguments of rl_zoo3.train that decide its score.

    :param env: Environment id
    :param n_timesteps: Steps of each training; -1 for the hyperparameter entry's
    :param n_evaluations: Evaluations of each training; ``None`` for rl_zoo3's one each 100 000 steps
    :param eval_episodes: Episodes of each evaluation
    :param seeds: Number of seeds, at least 2
    :param conf_file: Hyperparameter file; ``None`` for this project's
    :param gym_packages: Modules that register environments
    :param conf_content: What is in that file, for a machine that has no such file; see :func:`with_conf_content`
    """

    env: str
    n_timesteps: int = -1
    n_evaluations: int | None = None
    eval_episodes: int = 5
    seeds: int = DEFAULT_SEEDS
    conf_file: str | None = None
    gym_packages: tuple[str, ...] = ()
    conf_content: bytes | None = None


def with_conf_content(settings: TrialSettings) -> TrialSettings:
    """
    Read the hyperparameter file, so that trials may run where it is not.

    :param settings: What decides the score of a trial
    :return: The same with what is in the file; a Python module stays a name, and must be on every machine
    :raises OSError: if the file cannot be read
    """
    if settings.conf_file is None or not settings.conf_file.endswith(CONF_FILE_ENDINGS):
        return settings
    return dataclasses.replace(settings, conf_content=Path(settings.conf_file).read_bytes())


def _find_conf_file(settings: TrialSettings, folder: Path) -> str | None:
    if settings.conf_file is None or settings.conf_content is None:
        return settings.conf_file
    file = folder / Path(settings.conf_file).name
    file.write_bytes(settings.conf_content)
    return str(file)


def make_manager(settings: TrialSettings, log_folder: str, **search: Any) -> Any:
    """
    Make the zoo's manager of a search, as ``rl_zoo3.train -optimize`` does, silently.

    :param settings: What decides the score of a trial
    :param log_folder: Where the zoo may make its folders; it must exist if the settings bring what is in a file
    :param search: rl_zoo3's ``sampler``, ``pruner`` and ``n_startup_trials``
    :return: An ``ExperimentManager`` whose ``objective`` may be called
    :raises ValueError: if the hyperparameter entry is wrong
    :raises gymnasium.error.Error: if there is no such environment
    """
    register()
    for package in settings.gym_packages:
        importlib.import_module(package)
    gymnasium.spec(settings.env)
    manager = importlib.import_module("rl_zoo3.exp_manager").ExperimentManager(
        argparse.Namespace(),
        ALGORITHM,
        settings.env,
        log_folder,
        n_timesteps=settings.n_timesteps,
        n_evaluations=settings.n_evaluations,
        n_eval_episodes=settings.eval_episodes,
        hyperparams={"trial_seeds": settings.seeds},
        config=_find_conf_file(settings, Path(log_folder)),
        optimize_hyperparameters=True,
        device="cpu",
        verbose=0,
        **search,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        manager.setup_experiment()
    return manager


def check_spaces(manager: Any) -> None:
    """
    Check that the algorithm can train in the environment of a search, in which else every trial would fail.

    :param manager: What :func:`make_manager` returned
    :raises AssertionError: if its actions are not a DQN's
    :raises ValueError: if its observations are none that the networks can take
    """
    with contextlib.closing(manager.create_envs(1, no_log=True)) as env:
        check_action_space(env.action_space)
        check_observation_space(env.observation_space)


def make_sampler(manager: Any, seed: int) -> optuna.samplers.BaseSampler:
    """
    Make the zoo's sampler.

    :param manager: What :func:`make_manager` returned
    :param seed: Its seed
    :return: The sampler that ``--sampler`` names
    """
    seeded = copy.copy(manager)
    seeded.seed = seed
    sampler: optuna.samplers.BaseSampler = seeded._create_sampler(manager.sampler)
    return sampler


def make_pruner(manager: Any) -> optuna.pruners.BasePruner:
    """
    Make the zoo's pruner.

    :param manager: What :func:`make_manager` returned
    :return: The pruner that ``--pruner`` names
    """
    pruner: optuna.pruners.BasePruner = manager._create_pruner(manager.pruner)
    return pruner


def read_entry(manager: Any) -> dict[str, Any]:
    """
    Read the hyperparameter entry that a search starts from.

    :param manager: What :func:`make_manager` returned
    :return: The entry of its environment, in the notation of the file
    """
    with contextlib.redirect_stdout(io.StringIO()):
        return dict(manager.read_hyperparameters()[1])


# --- Commands -------------------------------------------------------------------------------------------------------------


def register() -> None:
    """Extend rl_zoo3 in this process, whether or not Python's start-up did; doing it twice changes nothing."""
    for name, extend in EXTENSIONS.items():
        extend(importlib.import_module(name))


def main() -> None:
    """
    Run a command of the zoo: ``python -m sb3_lecture_dqn.zoo COMMAND [ARGUMENT ...]``.

    :raises SystemExit: if the command is missing or unknown
    """
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        given = f", got {sys.argv[1]!r}" if len(sys.argv) > 1 else ""
        raise SystemExit(f"command must be one of {', '.join(COMMANDS)}{given}")
    os.environ.pop(SWITCH, None)  # record_training starts rl_zoo3.record_video in a new Python
    register()
    module = COMMANDS[sys.argv[1]]
    if module != "rl_zoo3.cli":
        del sys.argv[1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
