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
        return 0, {"options": options}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.info["seen"].append(int(action))
        return int(action), 1 / 3, action == 9, action >= 8, self.info


@pytest.mark.parametrize(
    ("make_env", "actions"),
    [(lambda: Monitor(CountingEnv(3)), [0, 1, 2, 0, 1, 2, 0, 0, 0]), (Numbers, [4, 8, 9, 0, 8]), (CountingEnv, [0] * 7)],
)
def test_its_steps_are_those_of_sb3(make_env: Any, actions: list[int]) -> None:
    ours, theirs = SingleVecEnv(make_env()), DummyVecEnv([make_env])
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    for action in actions:
        our_step, their_step = ours.step(np.array([action])), theirs.step(np.array([action]))
        for our_part, their_part in zip(our_step[:3], their_step[:3], strict=True):
            assert isinstance(our_part, np.ndarray)
            assert isinstance(their_part, np.ndarray)
            assert our_part.dtype == their_part.dtype
            np.testing.assert_array_equal(our_part, their_part)
        assert _without_times(our_step[3]) == _without_times(their_step[3])
        assert ours.reset_infos == theirs.reset_infos


def _without_times(infos: list[dict[str, Any]]) -> list[str]:
    return [repr({**info, "episode": {**info.get("episode", {}), "t": 0}}) for info in infos]


def test_what_a_step_gave_does_not_change_in_the_next() -> None:
    env = SingleVecEnv(Numbers())
    env.reset()
    observations, _, _, infos = env.step(np.array([3]))
    env.step(np.array([5]))
    assert observations.tolist() == [3]
    assert infos[0]["seen"] == [3]


def test_seeds_and_options_reach_the_environment() -> None:
    env = SingleVecEnv(Numbers())
    env.seed(3)
    env.set_options({"start": 1})
    env.reset()
    assert env.reset_infos == [{"options": {"start": 1}}]


def test_it_takes_no_observations_of_parts() -> None:
    env = gymnasium.Env[Any, Any]()
    env.observation_space = spaces.Dict({"a": spaces.Discrete(2)})
    env.action_space = spaces.Discrete(2)
    with pytest.raises(ValueError, match="env must have observations of one array, got Dict"):
        SingleVecEnv(env)


class Image(gymnasium.Env[np.ndarray, int]):
    """Pixels, the channels last."""

    observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    action_space = spaces.Discrete(2)


class Parts(gymnasium.Env[dict[str, int], int]):
    """A dictionary."""

    observation_space = spaces.Dict({"a": spaces.Discrete(2)})
    action_space = spaces.Discrete(2)


def test_a_model_puts_its_environment_into_it() -> None:
    model = LectureDQN("MlpPolicy", CountingEnv())
    assert type(model.get_env()) is SingleVecEnv
    model.set_env(CountingEnv())
    assert type(model.get_env()) is SingleVecEnv
    assert model.get_env().env_is_wrapped(Monitor) == [True]


def test_a_model_leaves_images_dictionaries_and_the_users_vector_environments_to_sb3() -> None:
    assert type(LectureDQN("CnnPolicy", Image(), buffer_size=10).get_env()) is VecTransposeImage
    assert type(LectureDQN("MultiInputPolicy", Parts()).get_env()) is DummyVecEnv
    users = DummyVecEnv([CountingEnv])
    assert LectureDQN("MlpPolicy", users).get_env() is users
