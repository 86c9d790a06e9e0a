"""
Bringing an environment back into the middle of its episode.

Where everything that an environment and its wrappers remember can be pickled, that is its state. Where it cannot (a physics
engine), the recorder keeps what there was before the episode's reset and the actions since, and replays them; the last
observation tells whether the environment is where it was.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from sb3_lecture_dqn.resume.live_objects import LiveObjects
from sb3_lecture_dqn.resume.random_state import random_state, restore_random_state
from sb3_lecture_dqn.resume.run_settings import in_few_words

#: Attributes of an environment that belong to the process and not to the episode.
_NOT_STATE = frozenset({"env", "results_writer"})


class EnvState(NamedTuple):
    """
    The state of one environment.

    :param attributes: Pickle of the attributes that can be pickled, now or (for a replay) before the episode's reset
    :param outer_attributes: Pickle of those of the wrapper around the recorder, now
    :param logs: For each ``Monitor`` the content of its file
    :param random_state: State of the process's generators, of a process that has no other use for them
    :param replay: Pickle of the :class:`Episode` so far, or ``None`` where the attributes are all
    :param reason: Why the environment cannot be brought back, or ``None``
    """

    attributes: bytes
    outer_attributes: bytes
    logs: list[bytes | None]
    random_state: dict[str, Any] | None
    replay: bytes | None
    reason: str | None


class EnvDescription(NamedTuple):
    """What an environment is, in words: its wrappers and its class, its id in Gymnasium, and the arguments beside the id."""

    layers: str
    id: str
    kwargs: str


class Episode(NamedTuple):
    """An episode so far: the arguments of its reset, its actions and the last observation."""

    reset_kwargs: dict[str, Any]
    actions: list[Any]
    last_observation: Any


class EpisodeRecorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """
    Passes everything on, and remembers what it takes to bring the environment back.

    It is put below the outermost wrapper (SB3's ``Monitor``, as a rule) by :func:`insert_recorder`.

    :param env: The environment
    :param outer: The wrapper around this one, if any
    """

    def __init__(self, env: gymnasium.Env[Any, Any], outer: gymnasium.Env[Any, Any] | None = None) -> None:
        super().__init__(env)
        self._outer = outer
        self._needs_replay: bool | None = None  # known after the first reset
        self._cannot_pickle: list[Any] = []
        self._before_reset: bytes | None = None
        self._reset_kwargs: dict[str, Any] = {}
        self._actions: list[Any] = []
        self._last_observation: Any = None

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """The specification of the environment, which this wrapper does not change."""
        return self.env.spec

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """
        Start an episode, and its record.

        :param kwargs: As the environment takes them
        :return: As the environment gives them
        """
        if self._needs_replay is not False:
            self._before_reset, _ = self._attributes()
            self._reset_kwargs, self._actions = kwargs, []
        observation, info = self.env.reset(**kwargs)
        if self._needs_replay is None:
            self._needs_replay = bool(self._attributes()[1])
        self._last_observation = observation
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        Step, and record the action.

        :param action: As the environment takes it
        :return: As the environment gives it
        """
        result = self.env.step(action)
        if self._needs_replay:
            self._actions.append(action)
            self._last_observation = result[0]
        return result

    def describe_for_checkpoint(self) -> EnvDescription:
        """
        What the environment is.

        :return: In words that are the same in every process
        """
        outer = [] if self._outer is None else [self._outer]
        return EnvDescription(describe_layers([*outer, *self._layers()]), *describe_spec(self.unwrapped.spec))

    def take_checkpoint_state(self) -> EnvState | OSError:
        """
        The state of the environment.

        :return: Something that can be pickled. If the file of a ``Monitor`` cannot be read, the error: raised here, it would
            end the process of a ``SubprocVecEnv``
        """
        try:
            return self._take_state()
        except OSError as error:
            return error

    def _take_state(self) -> EnvState:
        attributes, left_out = self._attributes()
        reason, replay = None, None
        if left_out:
            if self._needs_replay and self._before_reset is not None:
                attributes = self._before_reset
                replay, reason = self._take_episode()
            elif self._needs_replay is False:
                reason = f"{', '.join(left_out)} can no longer be pickled"
                self._needs_replay, self._before_reset = True, None  # from the next reset on
            elif any(getattr(layer, "_has_reset", False) for layer in self._layers()):  # Gymnasium's OrderEnforcing knows
                reason = "its episode began before it was recorded"
        outer = {} if self._outer is None else _state_of(self._outer)
        outer_attributes, outer_left_out = self._live_objects().dumps_attributes(outer)
        if outer_left_out:
            reason = f"{', '.join(outer_left_out)} of {type(self._outer).__name__} cannot be pickled"
        logs = [read_log(layer) for layer in (self._outer, *self._layers())]
        own_random_state = random_state() if multiprocessing.parent_process() is not None else None
        return EnvState(attributes, outer_attributes, logs, own_random_state, replay, reason)

    def restore_checkpoint_state(self, state: EnvState) -> str | None:
        """
        Bring the environment back.

        :param state: What :meth:`take_checkpoint_state` gave, but for an error
        :return: ``None``, or why the environment is not where it was and has to be reset
        """
        live = self._live_objects()
        reason = state.reason
        self._set_attributes(live.loads(state.attributes))
        if state.replay is not None:
            self._needs_replay, self._before_reset = True, state.attributes
            reason = state.reason or self._replay(Episode(**live.loads(state.replay)))
        if self._outer is not None:
            vars(self._outer).update(live.loads(state.outer_attributes))
        for layer, content in zip((self._outer, *self._layers()), state.logs, strict=True):
            write_log(layer, content)
        if state.random_state is not None and multiprocessing.parent_process() is not None:
            restore_random_state(state.random_state)
        return reason

    def _take_episode(self) -> tuple[bytes, str | None]:
        """The pickled episode; and why it cannot be replayed, or ``None``."""
        episode = Episode(self._reset_kwargs, self._actions, self._last_observation)
        data, left_out = self._live_objects().dumps_attributes(episode._asdict())
        return data, f"{', '.join(left_out)} of its episode cannot be pickled" if left_out else None

    def _replay(self, episode: Episode) -> str | None:
        self._reset_kwargs, self._actions = episode.reset_kwargs, list(episode.actions)
        try:
            observation, _ = self.env.reset(**episode.reset_kwargs)
            for action in episode.actions:
                observation = self.env.step(action)[0]
        except Exception as error:  # the environment's own: it is not reproducible, whatever it is
            return f"replaying its episode failed with {type(error).__name__}: {error}"
        self._last_observation = observation
        if not _same(observation, episode.last_observation):
            return f"the same {len(episode.actions)} actions led to another observation"
        return None

    # What the environment remembers

    def _layers(self) -> Iterator[gymnasium.Env[Any, Any]]:
        return env_layers(self.env)

    def _live_objects(self) -> LiveObjects:
        live = LiveObjects()
        live.add("recorder", self)
        if self._outer is not None:
            live.add("outer", self._outer)
            live.add_spaces("outer", self._outer)
        for index, layer in enumerate(self._layers()):
            live.add(f"layer_{index}", layer)
            live.add_spaces(f"layer_{index}", layer)
        return live

    def _attributes(self) -> tuple[bytes, list[str]]:
        """The pickled attributes, and the names of those that cannot be pickled."""
        live = self._live_objects()
        attributes: dict[Any, Any] = {("space", name): vars(space) for name, space in live.named_spaces()}
        for index, layer in enumerate(self._layers()):
            attributes.update({(index, name): value for name, value in _state_of(layer).items()})
            if layer is layer.unwrapped and _has_emulator_state(layer):
                attributes[index, "emulator"] = layer.clone_state(include_rng=True)  # type: ignore[attr-defined]
                attributes.pop((index, "ale"))
        for key in self._cannot_pickle:  # finding out takes longer than pickling the rest
            attributes.pop(key, None)
        data, left_out = live.dumps_attributes(attributes)
        self._cannot_pickle += left_out
        return data, [str(key[1]) for key in self._cannot_pickle]

    def _set_attributes(self, attributes: dict[Any, Any]) -> None:
        live = self._live_objects()
        spaces = dict(live.named_spaces())
        layers = list(self._layers())
        for (owner, name), value in attributes.items():
            if owner == "space":
                vars(spaces[name]).update(value)
            elif name == "emulator":
                layers[owner].restore_state(value)
            else:
                vars(layers[owner])[name] = value


def insert_recorder(env: Any) -> bool:
    """
    Put an :class:`EpisodeRecorder` below the outermost wrapper of an environment.

    :param env: The environment; doing it twice changes nothing
    :return: Whether there is one now; an environment in no wrapper has no place for it
    """
    if isinstance(env, EpisodeRecorder):
        return True
    if not isinstance(env, gymnasium.Wrapper):
        return False
    if not isinstance(env.env, EpisodeRecorder):
        env.env = EpisodeRecorder(env.env, env)
    return True


class InsertRecorder:
    """
    Calls :func:`insert_recorder` for the sub-environments of a ``VecEnv``, in whatever process they are.

    It stands for a class in ``VecEnv.env_is_wrapped``: there SB3 asks ``isinstance(env, wrapper_class)`` beside the
    environment, also in ``SubprocVecEnv``'s workers, and Python passes that question on to ``__instancecheck__``.
    """

    def __instancecheck__(self, env: Any) -> bool:
        return insert_recorder(env)


def env_layers(env: gymnasium.Env[Any, Any]) -> Iterator[gymnasium.Env[Any, Any]]:
    """
    The wrappers of an environment, the outermost first, and the environment in them.

    :param env: The environment
    :return: All of them
    """
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def describe_layers(layers: Sequence[Any], innermost: str = "") -> str:
    """
    The types of wrappers and of what they wrap.

    :param layers: The outermost first
    :param innermost: What the last one holds, if it holds anything
    :return: For instance ``Monitor(TimeLimit(CartPoleEnv))``
    """
    names = [type(layer).__name__ for layer in layers] + ([innermost] if innermost else [])
    return "(".join(names) + ")" * (len(names) - 1)


def describe_spec(spec: EnvSpec | None) -> tuple[str, str]:
    """
    The id and the arguments that an environment was made with, but for how it is rendered.

    :param spec: Its specification; ``None`` if it was made without an id
    :return: Both in words
    """
    if spec is None:
        return "none", "none"
    kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    return spec.id, in_few_words(kwargs)


def read_log(owner: Any) -> bytes | None:
    """
    The content of the file that a ``Monitor`` or a ``VecMonitor`` writes.

    :param owner: Any object
    :return: The content, or ``None`` for anything else, or one without a file
    """
    writer = getattr(owner, "results_writer", None)
    return None if writer is None else Path(writer.file_handler.name).read_bytes()


def write_log(owner: Any, content: bytes | None) -> None:
    """
    Make the file of a ``Monitor`` or a ``VecMonitor`` hold what it held.

    :param owner: The object
    :param content: What :func:`read_log` gave
    """
    writer = getattr(owner, "results_writer", None)
    if writer is not None and content is not None:
        rewrite(writer.file_handler, content)


def rewrite(file: TextIO, content: bytes) -> None:
    """
    Put another content into an open file.

    :param file: The file, which stays open
    :param content: What it is to hold
    """
    file.seek(0)
    file.truncate()
    file.write(content.decode())
    file.flush()


def _state_of(layer: Any) -> dict[str, Any]:
    """Its attributes, without those of the process and without pygame's windows."""
    return {
        name: value
        for name, value in vars(layer).items()
        if name not in _NOT_STATE and not type(value).__module__.startswith("pygame")
    }


def _has_emulator_state(env: gymnasium.Env[Any, Any]) -> bool:
    """Whether it is an Atari game, whose emulator gives its state in a way of its own."""
    return all(hasattr(env.unwrapped, name) for name in ("ale", "clone_state", "restore_state"))


def _same(a: Any, b: Any) -> bool:
    """Whether two observations have the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
