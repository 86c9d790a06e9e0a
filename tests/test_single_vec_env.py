"""The vector environment of one environment, beside SB3's of the same."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from scripted_envs import CountingEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecTransposeImage

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.envs.single_vec_env import SingleVecEnv


class Numbers(gymnasium.Env[int, int]):
    """A number as the observation, a wide reward, and an info that is the same object in every step."""

    observation_space = spaces.Discrete(10)
    action_space = spaces.Discrete(10)

    def __init__(self) -> None:
        self.info: dict[str, Any] = {"seen": []}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {"options": options, "n_steps": len(self.info["seen"])}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        action = int(action)  # so that the rest is of Python's types
        self.info["seen"].append(action)
        return action, 1 / 3, action == 9, action >= 8, self.info


class Parts(Numbers):
    """The same, its observations dictionaries."""

    observation_space = spaces.Dict({"number": spaces.Discrete(10)})  # type: ignore[assignment]

    def reset(self, **kwargs: Any) -> Any:  # type: ignore[override]
        number, info = super().reset(**kwargs)
        return {"number": number}, info

    def step(self, action: int) -> Any:
        number, *others = super().step(action)
        return {"number": number}, *others


class OneArray(Numbers):
    """The same, its observations one array of another type than the space's."""

    observation_space = spaces.Box(0, 10, (2,), np.float32)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(2)

    def reset(self, **kwargs: Any) -> Any:  # type: ignore[override]
        number, info = super().reset(**kwargs)
        self.array[:] = number
        return self.array, info

    def step(self, action: int) -> Any:
        number, *others = super().step(action)
        self.array[:] = number, 1 / 3
        return self.array, *others


@pytest.mark.parametrize(
    ("make_env", "actions"),
    [
        (lambda: Monitor(CountingEnv(3)), [0, 1, 2, 0, 1, 2, 0, 0, 0]),
        (Numbers, [4, 8, 9, 0, 8]),
        (Parts, [4, 8, 9, 0, 8]),
        (OneArray, [4, 8, 9, 0, 8]),
    ],
)
def test_its_steps_are_those_of_sb3(make_env: Any, actions: list[int]) -> None:
    ours, theirs = SingleVecEnv(make_env()), DummyVecEnv([make_env])
    assert repr(ours.reset()) == repr(theirs.reset())
    for action in actions:
        our_step, their_step = ours.step(np.array([action])), theirs.step(np.array([action]))
        assert _numbers(our_step[:3]) == _numbers(their_step[:3])
        assert _without_times(our_step[3]) == _without_times(their_step[3])
        assert ours.reset_infos == theirs.reset_infos


def _numbers(parts: Any) -> list[tuple[np.dtype[Any], list[Any]]]:
    """The numbers of a step and their types, also of observations in a dictionary."""
    arrays = [part["number"] if isinstance(part, dict) else part for part in parts]
    return [(array.dtype, array.tolist()) for array in arrays]


def _without_times(infos: list[dict[str, Any]]) -> list[str]:
    return [repr({**info, "episode": {**info.get("episode", {}), "t": 0}}) for info in infos]


@pytest.mark.parametrize(("make_env", "expected"), [(Numbers, [3]), (OneArray, [[3, np.float32(1 / 3)]])])
def test_what_a_step_gave_does_not_change_in_the_next(make_env: Any, expected: list[Any]) -> None:
    env = SingleVecEnv(make_env())
    env.reset()
    observations, _, _, infos = env.step(np.array([3]))
    env.step(np.array([5]))
    assert observations.tolist() == expected
    assert infos[0]["seen"] == [3]


def test_an_info_of_numbers_alone_is_a_copy_too() -> None:
    numbers = Numbers()
    env = SingleVecEnv(numbers)
    env.reset()
    numbers.step = lambda action: (int(action), 0.0, False, False, numbers.info)  # type: ignore[method-assign]
    numbers.info = {"energy": 1.5, "name": "robot", "rest": None}
    (info,) = env.step(np.array([3]))[3]
    numbers.info["energy"] = 2.5
    assert info == {"energy": 1.5, "name": "robot", "rest": None, "TimeLimit.truncated": False}


class EndsInAnArray(Numbers):
    def step(self, action: int) -> Any:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, np.array([terminated]), False, info


def test_an_end_that_is_an_array_of_one_is_an_end() -> None:
    env = SingleVecEnv(EndsInAnArray())
    env.reset()
    assert [env.step(np.array([action]))[2].tolist() for action in (3, 9, 3)] == [[False], [True], [False]]


class WrongSize(gymnasium.Env[Any, int]):
    """
    Its observations have more or fewer numbers than its space says from a step on.

    :param first: Number of the first step with such an observation; 0 is the reset
    :param wrong: That observation
    :param name: Where it stands, if observations are dictionaries
    """

    action_space = spaces.Discrete(2)

    def __init__(self, first: int, wrong: Any, name: str | None = None) -> None:
        box = spaces.Box(-1, 1, (4,))
        self.observation_space = box if name is None else spaces.Dict({name: box})
        self.first, self.wrong, self.name, self.n_steps = first, wrong, name, 0

    def observe(self) -> Any:
        observation = self.wrong if self.n_steps >= self.first else np.zeros(4, np.float32)
        return observation if self.name is None else {self.name: observation}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        return self.observe(), 0.0, self.n_steps == 3, False, {}


@pytest.mark.parametrize(("wrong", "shape"), [(0.3, ""), (np.ones(1), "1,"), (np.ones(5), "5,"), ([0.1], "1,")])
@pytest.mark.parametrize("first", [0, 2, 3])
def test_observations_that_are_not_as_large_as_the_space_are_refused(first: int, wrong: Any, shape: str) -> None:
    with pytest.raises(ValueError, match=rf"^env must give observations of shape \(4,\), got one of shape \({shape}\)$"):
        LectureDQN("MlpPolicy", WrongSize(first, wrong)).learn(10)
    with pytest.raises(ValueError, match=rf"of shape \(4,\) in 'speeds', got one of shape \({shape}\)$"):
        LectureDQN("MultiInputPolicy", WrongSize(first, wrong, "speeds")).learn(10)


@pytest.mark.parametrize("observation", [[0.1, 0.2, 0.3, 0.4], np.array([[0.1, 0.2, 0.3, 0.4]])])
def test_observations_of_the_right_size_in_another_form_are_stored_as_they_are(observation: Any) -> None:
    buffer = LectureDQN("MlpPolicy", WrongSize(0, observation)).learn(10).replay_buffer
    assert buffer is not None
    for stored in (buffer.observations[:10, 0], buffer.next_observations[:10, 0]):
        np.testing.assert_array_equal(stored, np.tile(np.float32([0.1, 0.2, 0.3, 0.4]), (10, 1)))


def test_seeds_and_options_reach_the_environment() -> None:
    env = SingleVecEnv(Numbers())
    env.seed(3)
    env.set_options({"start": 1})
    env.reset()
    assert env.reset_infos == [{"options": {"start": 1}, "n_steps": 0}]


class Image(gymnasium.Env[np.ndarray, int]):
    """Pixels, the channels last."""

    observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    action_space = spaces.Discrete(2)


@pytest.mark.parametrize(("policy", "make_env"), [("MlpPolicy", CountingEnv), ("MultiInputPolicy", Parts)])
def test_a_model_puts_its_environment_into_it(policy: str, make_env: Any) -> None:
    model = LectureDQN(policy, make_env())
    assert type(model.get_env()) is SingleVecEnv
    model.set_env(make_env())
    assert type(model.get_env()) is SingleVecEnv
    assert model.get_env().env_is_wrapped(Monitor) == [True]


def test_a_model_leaves_images_and_the_users_vector_environments_to_sb3() -> None:
    assert type(LectureDQN("CnnPolicy", Image(), buffer_size=10).get_env()) is VecTransposeImage
    users = DummyVecEnv([CountingEnv])
    assert LectureDQN("MlpPolicy", users).get_env() is users
