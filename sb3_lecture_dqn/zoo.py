"""
Everything that touches rl_zoo3: what makes ``python -m rl_zoo3.train --algo lecture_dqn`` work.

rl_zoo3 has no plugins. :mod:`sb3_lecture_dqn.zoo_startup` calls :data:`EXTENSIONS` when the zoo's modules are imported; or,
without it, this module runs any of the zoo's commands by itself::

    python -m sb3_lecture_dqn.zoo train --algo lecture_dqn --env LunarLander-v2
"""

import functools
import importlib
import inspect
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sb3_lecture_dqn.checkpoints import ResumableCheckpointCallback
from sb3_lecture_dqn.files import replace_when_written
from sb3_lecture_dqn.lecture_dqn import LectureDQN
from sb3_lecture_dqn.search_space import convert_lecture_dqn_params, sample_lecture_dqn_params

ALGORITHM = "lecture_dqn"
#: Environment variable that switches :mod:`sb3_lecture_dqn.zoo_startup` off when it is ``0``.
SWITCH = "SB3_LECTURE_DQN_ZOO"
#: Environment variable that names a folder for checkpoints, from which the same command, started again, continues.
CHECKPOINTS = "SB3_LECTURE_DQN_CHECKPOINTS"
#: Steps between two checkpoints where the zoo's ``--save-freq`` does not say it.
DEFAULT_SAVE_FREQ = 10_000
#: File in that folder with what the zoo would decide anew.
RUN_FILE = "zoo_run.json"
#: Keys of a hyperparameter entry that are the zoo's own, not the constructor's.
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
        "vec_env_wrapper",
    }
)
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


def add_algorithm(utils: ModuleType) -> None:
    """
    Make the algorithm a choice of ``--algo``.

    :param utils: ``rl_zoo3.utils``
    """
    utils.ALGOS[ALGORITHM] = LectureDQN


def add_search_space(hyperparams_opt: ModuleType) -> None:
    """
    Make ``--optimize-hyperparameters`` and ``--trial-id`` work.

    :param hyperparams_opt: ``rl_zoo3.hyperparams_opt``
    """
    hyperparams_opt.HYPERPARAMS_SAMPLER[ALGORITHM] = sample_lecture_dqn_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[ALGORITHM] = convert_lecture_dqn_params


def add_hyperparams_file(exp_manager: ModuleType) -> None:
    """
    Make this project's hyperparameter file the default, an unknown key in any file a clear error, and checkpoints a choice.

    :param exp_manager: ``rl_zoo3.exp_manager``
    """
    manager = exp_manager.ExperimentManager
    manager.__init__ = _with_our_config(manager.__init__)
    manager.read_hyperparameters = _with_checked_keys(manager.read_hyperparameters)
    manager.create_callbacks = _with_checkpoints(manager.create_callbacks)


EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": add_algorithm,
    "rl_zoo3.hyperparams_opt": add_search_space,
    "rl_zoo3.exp_manager": add_hyperparams_file,
}


def _with_our_config(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)
    for parameter in ("algo", "config"):
        if parameter not in signature.parameters:
            raise TypeError(f"ExperimentManager takes no argument {parameter}")

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
    run_file = folder / RUN_FILE
    env_id = manager.env_name.gym_id
    if not run_file.exists():
        run = {"env": env_id, "save_path": str(Path(manager.save_path).resolve()), "seed": manager.seed}
        with replace_when_written(run_file) as unfinished:
            unfinished.write_text(json.dumps(run))
    run = json.loads(run_file.read_text())
    if run["env"] != env_id:
        raise ValueError(f"{CHECKPOINTS} must name a folder for {env_id}, got {folder} with a run of {run['env']}")
    manager.seed = manager.args.seed = run["seed"]
    manager.save_path = run["save_path"]
    manager.params_path = f"{manager.save_path}/{manager.env_name}"


def _with_checkpoints(create_callbacks: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(create_callbacks)
    def create_callbacks_and_ours(manager: Any) -> None:
        save_freq = manager.save_freq if manager.save_freq > 0 else DEFAULT_SAVE_FREQ
        create_callbacks(manager)
        if _makes_checkpoints(manager):
            folder = os.environ[CHECKPOINTS]
            manager.callbacks.append(ResumableCheckpointCallback(save_freq, folder, verbose=manager.verbose))

    return create_callbacks_and_ours


def _with_checked_keys(read_hyperparameters: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(read_hyperparameters)
    def read_and_check(manager: Any) -> Any:
        result = read_hyperparameters(manager)
        if manager.algo == ALGORITHM:
            check_hyperparameter_keys(result[0])
        return result

    return read_and_check


def check_hyperparameter_keys(hyperparams: dict[str, Any]) -> None:
    """
    Check that each key of a hyperparameter entry is an argument of ``LectureDQN`` or one of the zoo's.

    :param hyperparams: The entry of one environment
    :raises ValueError: if there is another key
    """
    arguments = set(inspect.signature(LectureDQN).parameters) - {"env", "_init_setup_model"}
    for key in hyperparams:
        if key not in arguments | ZOO_KEYS:
            raise ValueError(f"unknown hyperparameter {key!r}, may be one of {', '.join(sorted(arguments | ZOO_KEYS))}")


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
