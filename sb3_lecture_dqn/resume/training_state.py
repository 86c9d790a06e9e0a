"""
The state of a training run beside its replay buffer: the algorithm, its networks, callbacks, environments, log and generators.

Everything here that is private to Stable-Baselines3 is named in the constants below, and ``tests/test_upstream.py`` says when
one of them goes. The name of a file of TensorBoard's is private too; ``tests/test_resume.py`` says when that goes.
"""

import contextlib
import inspect
import io
import pickle
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.logger import CSVOutputFormat, HumanOutputFormat, JSONOutputFormat, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecEnv

from sb3_lecture_dqn.resume.episode_recorder import rewrite
from sb3_lecture_dqn.resume.live_objects import LiveObjects
from sb3_lecture_dqn.resume.random_state import random_state, restore_random_state
from sb3_lecture_dqn.resume.run_settings import SETTINGS
from sb3_lecture_dqn.resume.vec_env_state import (
    describe_vec_env,
    insert_recorders,
    restore_vec_env_state,
    single_envs,
    take_vec_env_state,
    vec_env_layers,
)

if TYPE_CHECKING:  # it imports this module
    from sb3_lecture_dqn.lecture_dqn import LectureDQN

#: Attributes of the algorithm that training changes.
ALGORITHM_STATE = (
    "num_timesteps",
    "seed",
    "exploration_rate",
    "ep_info_buffer",
    "ep_success_buffer",
    "_total_timesteps",
    "_num_timesteps_at_start",
    "_last_obs",
    "_last_episode_starts",
    "_last_original_obs",
    "_episode_num",
    "_current_progress_remaining",
    "_n_updates",
    "_n_calls",
    "_training_metrics",
    "_divergence_watch",
)
#: Attributes of the algorithm that are made again by its constructor or by ``learn``, or saved in another way.
MADE_AGAIN = (
    "action_noise",
    "batch_norm_stats",
    "batch_norm_stats_target",
    "device",
    "env",
    "exploration_schedule",
    "lr_schedule",
    "policy",
    "q_net",
    "q_net_target",
    "random_generator",  # saved by its state
    "replay_buffer",  # saved by its rows
    "sde_sample_freq",
    "start_time",  # saved as the time that has passed
    "tensorboard_log",
    "use_sde",
    "use_sde_at_warmup",
    "verbose",
    "_custom_logger",
    "_fast_acting",
    "_fast_update",
    "_is_collecting",
    "_logger",
    "_stats_window_size",
    "_vec_normalize_env",
)
#: What every model has; other attributes are a subclass's or the user's own.
KNOWN_ATTRIBUTES = frozenset({*ALGORITHM_STATE, *MADE_AGAIN, *SETTINGS})
#: Attributes of a callback that are not its own.
NOT_A_CALLBACKS_OWN = frozenset({"model", "parent", "locals", "globals"})
#: Attributes of the logger: the values that were recorded and not yet written.
LOGGER_STATE = ("name_to_value", "name_to_count", "name_to_excluded")

PARAMETERS_FILE = "parameters.pt"
STATE_FILE = "state.pkl"


class TrainingState:
    """
    Takes and restores the state of a run.

    :param model: The model that is trained
    :param callback: The run's callback; those within it are found from there
    """

    def __init__(self, model: "LectureDQN", callback: BaseCallback) -> None:
        self._model = model
        self._callbacks = _callback_tree(callback)
        self._vec_envs = self._find_vec_envs()
        for vec_env in self._vec_envs:
            insert_recorders(vec_env)
        #: What the environments are, in words, by name.
        self.env_settings = self._describe_vec_envs()

    def take(self) -> dict[str, Any]:
        """
        The state, without the networks and the replay buffer.

        :return: Something that can be pickled
        :raises OSError: if a file of the logger's or of a ``Monitor`` cannot be read
        """
        model, live = self._model, self._live_objects()
        algorithm = live.dumps({name: getattr(model, name) for name in ALGORITHM_STATE})
        own_attributes = {name: value for name, value in vars(model).items() if name not in KNOWN_ATTRIBUTES}
        own, attributes = live.dumps_attributes(own_attributes)
        callbacks, left_out = {}, [f"{type(model).__name__}.{attribute}" for attribute in attributes]
        for name, callback in self._callbacks.items():
            callbacks[name], attributes = live.dumps_attributes(_own_attributes(callback))
            left_out += [f"{type(callback).__name__}.{attribute}" for attribute in attributes]
        vec_envs = [take_vec_env_state(vec_env, live) for vec_env in self._vec_envs]
        left_out += [attribute for vec_env in vec_envs for attribute in vec_env.left_out]
        if left_out:
            warnings.warn(f"a checkpoint cannot keep {', '.join(left_out)}, which cannot be pickled", stacklevel=2)
        return {
            "algorithm": algorithm,
            "own": own,
            "generator": model.random_generator.bit_generator.state,
            "spaces": {name: live.dumps(vars(space)) for name, space in live.named_spaces()},
            "callbacks": callbacks,
            "vec_envs": vec_envs,
            "logger": live.dumps({name: dict(getattr(model.logger, name)) for name in LOGGER_STATE}),
            "logs": [_take_log(log) for log in model.logger.output_formats],
            "seconds": (time.time_ns() - model.start_time) / 1e9,
            "random": random_state(),
        }

    def restore(self, state: dict[str, Any]) -> list[str | None]:
        """
        Bring the run back, but for the networks and the replay buffer.

        :param state: What :meth:`take` gave
        :return: For the training environment, then for those of the callbacks: why it is not where it was, or ``None``
        :raises ValueError: if the run has other callbacks or environments
        """
        model, live = self._model, self._live_objects()
        if state["callbacks"].keys() != self._callbacks.keys() or len(state["vec_envs"]) != len(self._vec_envs):
            raise ValueError("callback must hold the same callbacks as in the run that is continued")
        vars(model).update(live.loads(state["algorithm"]))
        vars(model).update(live.loads(state["own"]))
        model.random_generator.bit_generator.state = state["generator"]
        model.start_time = time.time_ns() - int(state["seconds"] * 1e9)
        for name, callback in self._callbacks.items():
            vars(callback).update(live.loads(state["callbacks"][name]))
        for name, values in live.loads(state["logger"]).items():
            mapping = getattr(model.logger, name)
            mapping.clear()
            mapping.update(values)
        self._restore_logs(state["logs"])
        reasons = [
            restore_vec_env_state(vec_env, vec_env_state, live)
            for vec_env, vec_env_state in zip(self._vec_envs, state["vec_envs"], strict=True)
        ]
        # Last, for an environment that was replayed left them where they were at the beginning of its episode.
        spaces = dict(live.named_spaces())
        for name, attributes in state["spaces"].items():
            vars(spaces[name]).update(live.loads(attributes))
        restore_random_state(state["random"])
        return reasons

    def _restore_logs(self, states: list[dict[str, Any]]) -> None:
        logger = self._model.logger
        if [type(log).__name__ for log in logger.output_formats] != [state["type"] for state in states]:
            return  # the user logs elsewhere now
        for log, state in zip(logger.output_formats, states, strict=True):
            _restore_log(log, state, self._model.num_timesteps)
            if "folder" in state:
                logger.dir = state["folder"]

    def _find_vec_envs(self) -> list[VecEnv]:
        """The training environment, and those of the callbacks."""
        training_env = self._model.get_env()
        assert training_env is not None
        found = [training_env]
        for callback in self._callbacks.values():
            found += [value for value in vars(callback).values() if isinstance(value, VecEnv)]
        by_base = {id(vec_env.unwrapped): vec_env for vec_env in reversed(found)}
        return [vec_env for vec_env in dict.fromkeys(found) if by_base[id(vec_env.unwrapped)] is vec_env]

    def _describe_vec_envs(self) -> dict[str, str]:
        settings: dict[str, str] = {}
        for index, vec_env in enumerate(self._vec_envs):
            owner = f" {index} of the callbacks" if index else ""
            settings.update({f"{name}{owner}": words for name, words in describe_vec_env(vec_env).items()})
        return settings

    def _live_objects(self) -> LiveObjects:
        live, model = LiveObjects(), self._model
        for name in ("policy", "q_net", "q_net_target", "logger", "replay_buffer", "observation_space", "action_space"):
            live.add(name, getattr(model, name))
        live.add("model", model)
        live.add("optimizer", model.policy.optimizer)
        for name, part in (*model.policy.named_modules(), *model.policy.named_parameters(), *model.policy.named_buffers()):
            live.add(f"policy.{name}", part)
        for name, callback in self._callbacks.items():
            live.add(name, callback)
        for index, vec_env in enumerate(self._vec_envs):
            for depth, layer in enumerate(vec_env_layers(vec_env)):
                live.add(f"vec_env_{index}_{depth}", layer)
                live.add_spaces(f"vec_env_{index}_{depth}", layer)
            for number, env in enumerate(single_envs(vec_env)):
                live.add(f"env_{index}_{number}", env)
        return live


def take_parameters(model: "LectureDQN") -> bytes:
    """
    θ, ψ and the state of the optimizer.

    :param model: The model
    :return: A file of PyTorch's
    """
    file = io.BytesIO()
    th.save({"policy": model.policy.state_dict(), "optimizer": _plain(model.policy.optimizer.state_dict())}, file)
    return file.getvalue()


def _plain(value: Any) -> Any:
    """Without numpy's scalars, which PyTorch writes, and does not read again where it runs no code."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def restore_parameters(model: "LectureDQN", path: Path) -> None:
    """
    Bring θ, ψ and the optimizer back.

    :param model: The model
    :param path: A file with what :func:`take_parameters` gave
    """
    saved = th.load(path, map_location=model.device, weights_only=True)
    model.policy.load_state_dict(saved["policy"])
    model.policy.optimizer.load_state_dict(saved["optimizer"])


def dump_state(state: dict[str, Any]) -> bytes:
    """
    Pickle what :meth:`TrainingState.take` gave.

    :param state: The state
    :return: The pickle
    """
    return pickle.dumps(state, protocol=pickle.HIGHEST_PROTOCOL)


def _callback_tree(root: BaseCallback) -> dict[str, BaseCallback]:
    """A callback and those within it, each named by the way to it."""
    tree: dict[str, BaseCallback] = {}
    waiting = [("callback", root)]
    while waiting:
        name, callback = waiting.pop()
        if all(callback is not known for known in tree.values()):
            tree[f"{name}:{type(callback).__name__}"] = callback
            waiting += reversed(_children(name, callback))
    return tree


def _children(name: str, callback: BaseCallback) -> list[tuple[str, BaseCallback]]:
    return [
        (f"{name}.{attribute}[{index}]", child)
        for attribute, value in vars(callback).items()
        if attribute not in NOT_A_CALLBACKS_OWN
        for index, child in enumerate(value if isinstance(value, list) else [value])
        if isinstance(child, BaseCallback)
    ]


def _own_attributes(callback: BaseCallback) -> dict[str, Any]:
    """A callback's state. The paths that it was made with are not: a run may be continued in another place."""
    excluded = NOT_A_CALLBACKS_OWN | getattr(callback, "not_in_checkpoints", frozenset())
    if isinstance(callback, ProgressBarCallback):
        excluded |= {"pbar"}  # a part of the screen
    arguments = inspect.signature(type(callback)).parameters
    return {
        name: value
        for name, value in vars(callback).items()
        if name not in excluded and not (name in arguments and isinstance(value, (str, Path)))
    }


def _take_log(log: Any) -> dict[str, Any]:
    """What a log has written: the content of its file, or the folder of TensorBoard's."""
    state: dict[str, Any] = {"type": type(log).__name__}
    if isinstance(log, TensorBoardOutputFormat):
        state["folder"] = log.writer.log_dir
    elif _has_own_file(log):
        state["content"] = Path(log.file.name).read_bytes()
        state["keys"] = list(getattr(log, "keys", []))
    return state


def _restore_log(log: Any, state: dict[str, Any], num_timesteps: int) -> None:
    if isinstance(log, TensorBoardOutputFormat):
        _continue_tensorboard(log, state["folder"], num_timesteps)
    elif "content" in state and _has_own_file(log):
        rewrite(log.file, state["content"])
        if isinstance(log, CSVOutputFormat):
            log.keys = state["keys"]


def _continue_tensorboard(log: TensorBoardOutputFormat, folder: str, num_timesteps: int) -> None:
    """Go on in the folder of before; TensorBoard drops what the lost part of the run wrote after the checkpoint."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = log.writer
    new_file = Path(writer.file_writer.event_writer._file_name)
    writer.close()
    if new_file.parent.resolve() != Path(folder).resolve():  # made a moment ago, for nothing
        new_file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds the files of another run
            new_file.parent.rmdir()
    log.writer = SummaryWriter(log_dir=folder, purge_step=num_timesteps + 1)


def _has_own_file(log: Any) -> bool:
    return isinstance(log, (CSVOutputFormat, JSONOutputFormat)) or (isinstance(log, HumanOutputFormat) and log.own_file)
