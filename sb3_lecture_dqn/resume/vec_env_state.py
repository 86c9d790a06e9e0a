"""The state of Stable-Baselines3's vector environments: their wrappers, and each environment in them."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import gymnasium
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_lecture_dqn.envs.gym_vector_vec_env import GymVectorVecEnv
from sb3_lecture_dqn.resume.episode_recorder import (
    EnvDescription,
    EnvState,
    EpisodeRecorder,
    InsertRecorder,
    describe_layers,
    describe_spec,
    env_layers,
    insert_recorder,
    read_log,
    write_log,
)
from sb3_lecture_dqn.resume.live_objects import LiveObjects

#: Attributes that belong to the process and not to the run.
_NOT_STATE = frozenset(
    {"venv", "env", "envs", "env_fns", "class_attributes", "results_writer", "remotes", "work_remotes", "processes"}
)


class VecEnvState(NamedTuple):
    """
    The state of a vector environment.

    :param layers: For each wrapper, and what it wraps, the pickle of its attributes
    :param logs: For each ``VecMonitor`` the content of its file
    :param envs: The state of each environment
    :param reason: Why the environments cannot be brought back, or ``None``
    :param left_out: Attributes of wrappers that cannot be pickled
    """

    layers: list[bytes]
    logs: list[bytes | None]
    envs: list[EnvState]
    reason: str | None
    left_out: list[str]


def insert_recorders(vec_env: VecEnv) -> None:
    """
    Have every environment remember what it takes to bring it back; this must come before the reset of the first episode.

    :param vec_env: The vector environment; doing it twice changes nothing
    """
    base = vec_env.unwrapped
    if isinstance(base, GymVectorVecEnv):
        sub_envs = _sub_envs(base.env)
        if sub_envs is not None:
            _insert_into_list(sub_envs)
        return
    if isinstance(base, DummyVecEnv):
        _insert_into_list(base.envs)
        return
    base.env_is_wrapped(cast("type[gymnasium.Wrapper[Any, Any, Any, Any]]", InsertRecorder()))


def describe_vec_env(vec_env: VecEnv) -> dict[str, str]:
    """
    What a vector environment is: only into one that is the same can its state be restored.

    :param vec_env: The vector environment, after :func:`insert_recorders`
    :return: By name, in words that are the same in every process
    """
    base = vec_env.unwrapped
    envs = _describe_envs(base)
    specs = [(env.id, env.kwargs) for env in envs]
    if isinstance(base, GymVectorVecEnv):
        specs.append(describe_spec(base.env.unwrapped.spec))
    sub_envs = f"{vec_env.num_envs} x {_once([env.layers for env in envs])}" if envs else str(vec_env.num_envs)
    return {
        "env": describe_layers(vec_env_layers(vec_env), sub_envs),
        "env id": _once([env_id for env_id, _ in specs]),
        "env kwargs": _once([kwargs for _, kwargs in specs]),
    }


def take_vec_env_state(vec_env: VecEnv, live: LiveObjects) -> VecEnvState:
    """
    The state of a vector environment.

    :param vec_env: The vector environment
    :param live: Objects to refer to by name
    :return: Something that can be pickled
    :raises OSError: if the file of a ``Monitor`` or a ``VecMonitor`` cannot be read
    """
    layers = vec_env_layers(vec_env)
    envs, reason = _take_env_states(vec_env.unwrapped)
    pickles, left_out = [], []
    for layer in layers:
        data, names = live.dumps_attributes(_state_of(layer))
        pickles.append(data)
        if isinstance(layer, VectorEnv) and names:
            reason = f"{', '.join(names)} of {type(layer).__name__} cannot be pickled"
        else:
            left_out += [f"{type(layer).__name__}.{name}" for name in names]
    return VecEnvState(pickles, [read_log(layer) for layer in layers], envs, reason, left_out)


def restore_vec_env_state(vec_env: VecEnv, state: VecEnvState, live: LiveObjects) -> str | None:
    """
    Bring a vector environment back.

    :param vec_env: The vector environment
    :param state: What :func:`take_vec_env_state` gave
    :param live: Objects that are referred to by name
    :return: ``None``, or why the environments are not where they were and have to be reset
    """
    for layer, attributes, content in zip(vec_env_layers(vec_env), state.layers, state.logs, strict=True):
        if state.reason is None or not isinstance(layer, VectorEnv):  # which may share memory with other processes
            vars(layer).update(live.loads(attributes))
        write_log(layer, content)
    reasons = [state.reason, *_restore_env_states(vec_env.unwrapped, state.envs)]
    return next((reason for reason in reasons if reason is not None), None)


def vec_env_layers(vec_env: VecEnv) -> list[Any]:
    """
    The wrappers of a vector environment, the outermost first, and what they wrap.

    :param vec_env: The vector environment
    :return: All of them, also the layers of a Gymnasium vector environment
    """
    layers: list[Any] = [vec_env]
    while isinstance(layers[-1], VecEnvWrapper):
        layers.append(layers[-1].venv)
    if isinstance(layers[-1], GymVectorVecEnv):
        layers.append(layers[-1].env)
        while isinstance(layers[-1], VectorWrapper):
            layers.append(layers[-1].env)
    return layers


def single_envs(vec_env: VecEnv) -> Iterator[gymnasium.Env[Any, Any]]:
    """
    The environments that live in this process, with each of their layers.

    :param vec_env: The vector environment
    :return: Environments and wrappers
    """
    base = vec_env.unwrapped
    envs = base.envs if isinstance(base, DummyVecEnv) else []
    for env in envs:
        yield from env_layers(env)


def _describe_envs(base: VecEnv) -> list[EnvDescription]:
    if isinstance(base, GymVectorVecEnv):
        return [recorder.describe_for_checkpoint() for recorder in _recorders(base.env)]
    return base.env_method("describe_for_checkpoint") if base.has_attr("describe_for_checkpoint") else []


def _once(words: list[str]) -> str:
    """What environments are, said once if they are all the same."""
    return ", ".join(words if len(set(words)) > 1 else words[:1])


def _take_env_states(base: VecEnv) -> tuple[list[EnvState], str | None]:
    if isinstance(base, GymVectorVecEnv):
        return [_state_or_raise(recorder.take_checkpoint_state()) for recorder in _recorders(base.env)], None
    if not base.has_attr("take_checkpoint_state"):
        return [], f"the environments of {type(base).__name__} are in no wrapper: put each in SB3's Monitor"
    return [_state_or_raise(state) for state in base.env_method("take_checkpoint_state")], None


def _state_or_raise(state: EnvState | OSError) -> EnvState:
    if isinstance(state, OSError):
        raise state
    return state


def _restore_env_states(base: VecEnv, states: list[EnvState]) -> list[str | None]:
    if isinstance(base, GymVectorVecEnv):
        recorders = _recorders(base.env)
        return [recorder.restore_checkpoint_state(state) for recorder, state in zip(recorders, states, strict=True)]
    return [base.env_method("restore_checkpoint_state", state, indices=[i])[0] for i, state in enumerate(states)]


def _insert_into_list(envs: list[Any]) -> None:
    for i, env in enumerate(envs):
        if not insert_recorder(env):
            envs[i] = EpisodeRecorder(env)


def _sub_envs(vector_env: VectorEnv[Any, Any, Any]) -> list[Any] | None:
    base = vector_env.unwrapped
    return base.envs if isinstance(base, SyncVectorEnv) else None


def _recorders(vector_env: VectorEnv[Any, Any, Any]) -> list[EpisodeRecorder]:
    envs = _sub_envs(vector_env) or []
    return [env if isinstance(env, EpisodeRecorder) else env.env for env in envs]


def _state_of(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name not in _NOT_STATE}
