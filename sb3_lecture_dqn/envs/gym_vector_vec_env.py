"""Gymnasium's vector environments, as Stable-Baselines3 wants them."""

import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import DictInfoToList, NormalizeObservation, NormalizeReward, RecordEpisodeStatistics
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_lecture_dqn.envs.robo_parking import RoboParkingVectorEnv

#: What resets some of its sub-environments, and leaves the others alone, although it would do it by itself in the next step.
RESETS_SOME = (SyncVectorEnv, AsyncVectorEnv, RoboParkingVectorEnv)


class GymVectorVecEnv(VecEnv):
    """
    One SB3 ``VecEnv`` made of one Gymnasium ``VectorEnv``.

    It behaves like SB3's ``VecMonitor(DummyVecEnv(...))`` of the same environments: a sub-environment is reset in the step
    that ends its episode; the info of that step has ``terminal_observation``, ``TimeLimit.truncated`` and ``episode`` (the
    return ``r``, the length ``l``, and the seconds ``t`` since this object was made).

    In the same-step mode the vector environment does that itself. In the disabled mode, and in the next-step mode of
    Gymnasium's ``SyncVectorEnv`` and ``AsyncVectorEnv`` (with shared memory) and of
    :class:`~sb3_lecture_dqn.envs.RoboParkingVectorEnv`, it is asked to, by ``reset(options={"reset_mask": ...})``.

    Any other vector environment in the next-step mode (Gymnasium's ``CartPoleVectorEnv``) resets an ended sub-environment one
    step later, takes no action for it in that step, and cannot do it sooner without stepping the others. The step that ends
    the episode then gives the last observation once more, and the next one is a pause: its reward is 0, and it is done, with
    that observation as its ``terminal_observation``, with ``is_pause``, and without ``episode``, so that ``Monitor``'s
    statistics and ``evaluate_policy`` do not count it. All transitions of the episode are what they would be. ``LectureDQN``
    does not learn from a pause: it stores the episode's last transition twice. Other algorithms learn from it that the last
    state of an episode is worth 0, which after a time limit is wrong; so does ``LectureDQN`` with ``optimize_memory_usage``.

    :param env: The vector environment
    :raises TypeError: if it is not a Gymnasium ``VectorEnv``
    :raises ValueError: if it does not declare its autoreset mode, or has a wrapper of Gymnasium's that does not fit
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env, VectorEnv):
            raise TypeError(f"env must be a gymnasium.vector.VectorEnv, got {type(env).__name__}")
        mode = env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ValueError(f"env must have an AutoresetMode in metadata['autoreset_mode'], got {mode!r}")
        self.env = env
        self._is_same_step = mode == AutoresetMode.SAME_STEP
        self._resets_some = not self._is_same_step and (mode == AutoresetMode.DISABLED or _resets_some_when_asked(env))
        self._check_wrappers()
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = env.metadata
        self._actions: np.ndarray = np.zeros(0)
        self._start_time = time.time()
        self._episode_returns = np.zeros(self.num_envs, dtype=np.float32)
        self._episode_lengths = np.zeros(self.num_envs, dtype=np.int32)
        self._paused: dict[int, Any] = {}  # the last observations of the sub-environments that pause

    def _check_wrappers(self) -> None:
        layer: Any = self.env
        while isinstance(layer, VectorWrapper):
            if isinstance(layer, DictInfoToList):
                raise ValueError("env must not be wrapped in DictInfoToList: SB3 gets a list of infos anyway")
            if isinstance(layer, (NormalizeObservation, NormalizeReward)) and self._resets_some:
                name = type(layer).__name__
                raise ValueError(f"env must not be wrapped in {name}, which cannot reset some: take VecNormalize")
            # What has sub-environments takes the mask out of the options before this wrapper looks for it.
            if isinstance(layer, RecordEpisodeStatistics) and self._resets_some and self._has_sub_environments:
                raise ValueError("env must not be wrapped in RecordEpisodeStatistics: the infos have 'episode' anyway")
            layer = layer.env

    def reset(self) -> Any:  # SB3's VecEnvObs
        """
        Start an episode of every sub-environment, with the seed and the options that were set since the last reset.

        :return: The first observations
        :raises ValueError: if :meth:`set_options` was given options that differ between the sub-environments
        """
        if not all(_are_equal(options, self._options[0]) for options in self._options):
            raise ValueError("options must be the same for all sub-environments of a vector environment")
        # SB3's seeds are seed, seed + 1, ...: what Gymnasium makes of the first one.
        observations, infos = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = split_infos(infos, self.num_envs)
        self._episode_returns[:] = 0
        self._episode_lengths[:] = 0
        self._paused = {}
        return copy_observations(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """
        Take the actions for the next :meth:`step_wait`.

        :param actions: One for each sub-environment
        """
        self._actions = np.asarray(actions, dtype=self.env.action_space.dtype)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Step, and reset the sub-environments whose episode ended.

        :return: Observations, rewards, dones and infos as SB3 has them
        :raises ValueError: if a vector environment in the disabled mode resets more sub-environments than it was asked to
        """
        observations, rewards, terminations, truncations, infos = self.env.step(self._actions)
        rewards = np.array(rewards, dtype=np.float32)  # a copy: SB3's PPO adds to the rewards that it was given
        dones = np.logical_or(terminations, truncations)
        info_of_each = split_infos(infos, self.num_envs)
        for info, timed_out in zip(info_of_each, (truncations & ~terminations).tolist(), strict=True):
            info["TimeLimit.truncated"] = timed_out

        self._episode_returns += rewards
        self._episode_lengths += 1
        paused, self._paused = self._paused, {}
        if dones.any():
            ended = np.flatnonzero(dones).tolist()
            if self._is_same_step:
                self._move_final_infos(info_of_each, ended)
            elif self._resets_some:
                observations = self._reset_ended(observations, dones, info_of_each)
            else:
                self._pause_ended(observations, info_of_each, ended)
            for i in ended:
                info_of_each[i]["episode"] = self._end_episode(i)
        for i, final_observation in paused.items():
            self._end_pause(i, final_observation, info_of_each)
            dones[i] = True
        return copy_observations(observations), rewards, dones, info_of_each

    def _move_final_infos(self, info_of_each: list[dict[str, Any]], ended: list[int]) -> None:
        """The info beside the first observation of an episode is that of its reset; the end's is under ``final_info``."""
        for i in ended:
            reset_info = info_of_each[i]
            info_of_each[i] = {
                **reset_info.pop("final_info", {}),
                "TimeLimit.truncated": reset_info.pop("TimeLimit.truncated"),
                "terminal_observation": reset_info.pop("final_obs"),
            }
            self.reset_infos[i] = reset_info

    def _reset_ended(self, observations: Any, dones: np.ndarray, info_of_each: list[dict[str, Any]]) -> Any:
        """Reset the sub-environments whose episode ended, now and not in the next step."""
        observations = copy_observations(observations)
        next_observations, infos = self.env.reset(options={"reset_mask": dones.copy()})
        if not _are_equal(_rows(observations, ~dones), _rows(next_observations, ~dones)):
            raise ValueError(
                f"env must be able to reset some of its sub-environments alone (options['reset_mask']) in the disabled "
                f"autoreset mode, got {self.env}, which resets all"
            )
        reset_infos = split_infos(infos, self.num_envs)
        for i in np.flatnonzero(dones).tolist():
            info_of_each[i]["terminal_observation"] = copy_observations(_rows(observations, i))
            self.reset_infos[i] = reset_infos[i]
        return next_observations

    def _pause_ended(self, observations: Any, info_of_each: list[dict[str, Any]], ended: list[int]) -> None:
        """Remember how the episodes ended that the vector environment resets in the next step."""
        for i in ended:
            self._paused[i] = info_of_each[i]["terminal_observation"] = copy_observations(_rows(observations, i))

    def _end_pause(self, i: int, final_observation: Any, info_of_each: list[dict[str, Any]]) -> None:
        """The info of the step that reset a sub-environment is that of its reset; the pause itself has next to none."""
        self._end_episode(i)  # the next one counts from 0
        self.reset_infos[i] = {key: value for key, value in info_of_each[i].items() if key != "TimeLimit.truncated"}
        info_of_each[i] = {"TimeLimit.truncated": False, "terminal_observation": final_observation, "is_pause": True}

    def _end_episode(self, i: int) -> dict[str, Any]:
        seconds = round(time.time() - self._start_time, 6)
        episode = {"r": self._episode_returns[i], "l": self._episode_lengths[i], "t": seconds}
        self._episode_returns[i] = 0
        self._episode_lengths[i] = 0
        return episode

    def close(self) -> None:
        """Close the vector environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        Render every sub-environment.

        :return: Their images
        """
        images: Any = self.env.render()
        return [None] * self.num_envs if images is None else list(images)

    # Attributes: those of the sub-environments where there are some, else those of the vector environment.

    @property
    def _has_sub_environments(self) -> bool:
        return hasattr(self.env.unwrapped, "get_attr")

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Read an attribute.

        :param attr_name: Its name
        :param indices: The sub-environments to ask, by default all
        :return: Its value in each of them; a vector environment without sub-environments has one value for all
        :raises AttributeError: if there is none
        """
        env: Any = self.env.unwrapped
        if isinstance(env, SyncVectorEnv):  # its own get_attr calls what can be called
            return [env.envs[i].get_wrapper_attr(attr_name) for i in self._get_indices(indices)]
        values = env.get_attr(attr_name) if self._has_sub_environments else [getattr(env, attr_name)] * self.num_envs
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Set an attribute to the same value in all sub-environments, or in the vector environment if it has none.

        :param attr_name: Its name
        :param value: Its value
        :param indices: The sub-environments; unless it is a ``SyncVectorEnv``, all of them
        :raises ValueError: if ``indices`` leaves out a sub-environment that cannot be left out
        """
        env: Any = self.env.unwrapped
        if isinstance(env, SyncVectorEnv):
            for i in self._get_indices(indices):
                env.envs[i].set_wrapper_attr(attr_name, value)
            return
        self._check_all(indices)
        if self._has_sub_environments:
            env.set_attr(attr_name, [value] * self.num_envs)
        else:
            setattr(env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of the sub-environments.

        :param method_name: Its name
        :param method_args: Its arguments
        :param indices: The sub-environments; unless it is a ``SyncVectorEnv``, all of them
        :param method_kwargs: Its keyword arguments
        :return: What each call returned
        :raises AttributeError: if the vector environment has no sub-environments
        :raises ValueError: if ``indices`` leaves out a sub-environment that cannot be left out
        """
        if not self._has_sub_environments:
            raise AttributeError(f"{self.env} has no sub-environments that could be called for {method_name}()")
        env: Any = self.env.unwrapped
        if isinstance(env, SyncVectorEnv):
            return [method(*method_args, **method_kwargs) for method in self.get_attr(method_name, indices)]
        self._check_all(indices)
        return list(env.call(method_name, *method_args, **method_kwargs))

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """
        Whether the sub-environments are wrapped.

        :param wrapper_class: The wrapper to look for
        :param indices: The sub-environments to ask, by default all
        :return: ``True`` for SB3's ``Monitor``, whose statistics this class gives, ``False`` for any other
        """
        return [issubclass(Monitor, wrapper_class)] * len(list(self._get_indices(indices)))

    def _check_all(self, indices: VecEnvIndices) -> None:
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(f"indices must be None or all of 0..{self.num_envs - 1}, got {indices!r}")


def _resets_some_when_asked(env: VectorEnv[Any, Any, Any]) -> bool:
    if isinstance(env.unwrapped, AsyncVectorEnv) and not env.unwrapped.shared_memory:
        return False  # its processes do not notice the reset that they are asked for, and reset once more in the next step
    return isinstance(env.unwrapped, RESETS_SOME)


def split_infos(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """
    The info of each sub-environment, from Gymnasium's dictionary of arrays.

    :param infos: For each key an array over the sub-environments (or a dictionary of such arrays), and under ``_key`` the mask
        of those that have it; without a mask all have it
    :param num_envs: Number of sub-environments
    :return: One dictionary for each
    """
    info_of_each: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for key, values in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        if isinstance(values, dict):
            values = split_infos(values, num_envs)
        elif isinstance(values, np.ndarray) and values.ndim == 1:
            values = values.tolist()  # Python's own numbers, as a single environment gives them
        elif not isinstance(values, np.ndarray):
            values = [values] * num_envs  # one value for all
        mask = infos.get(f"_{key}")
        has_key = range(num_envs) if mask is None else np.flatnonzero(mask).tolist()
        for i in has_key:
            info_of_each[i][key] = values[i]
    return info_of_each


def copy_observations(observations: Any) -> Any:
    """
    Copy observations: vector environments may write the next ones into the same arrays.

    :param observations: An array, or a dictionary or a tuple of them
    :return: The same, of new arrays
    """
    if isinstance(observations, dict):
        return {key: copy_observations(value) for key, value in observations.items()}
    if isinstance(observations, tuple):
        return tuple(copy_observations(value) for value in observations)
    return np.array(observations)


def _rows(observations: Any, indices: Any) -> Any:
    if isinstance(observations, dict):
        return {key: _rows(value, indices) for key, value in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_rows(value, indices) for value in observations)
    return observations[indices]


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_are_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_are_equal, a, b))
    return np.array_equal(a, b, equal_nan=np.issubdtype(np.asarray(a).dtype, np.floating))
