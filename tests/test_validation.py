"""Bad input: one line that names the argument, what it was and what it may be, before any training."""

import re
from fractions import Fraction
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_lecture_dqn import LectureDQN


class EnvWithActions(gymnasium.Env[np.ndarray, Any]):
    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = action_space


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(-1, 1, (2,), np.float32),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiDiscrete([2] * 80),  # numpy shows it in several lines
        spaces.MultiBinary(3),
        spaces.Discrete(3, start=1),
    ],
)
def test_only_discrete_actions_from_zero_are_taken(action_space: spaces.Space[Any]) -> None:
    message = f"env must have an action space Discrete(n) that starts at 0, got {' '.join(str(action_space).split())}"
    with pytest.raises(AssertionError, match=re.escape(message)):
        LectureDQN("MlpPolicy", EnvWithActions(action_space))


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("gamma", -0.1, "in [0, 1]"),
        ("gamma", 1.1, "in [0, 1]"),
        ("gamma", float("nan"), "in [0, 1]"),
        ("gamma", "0.9", "in [0, 1]"),
        ("tau", 1.5, "in [0, 1]"),
        ("exploration_initial_eps", 1.5, "in [0, 1]"),
        ("exploration_final_eps", -0.5, "in [0, 1]"),
        ("exploration_fraction", 2, "in [0, 1]"),
        ("batch_size", 0, "an integer of at least 1"),
        ("batch_size", 2.5, "an integer of at least 1"),
        ("buffer_size", 0, "an integer of at least 1"),
        ("buffer_size", True, "an integer of at least 1"),
        ("target_update_interval", 0, "an integer of at least 1"),
        ("n_steps", 0, "an integer of at least 1"),
        ("learning_starts", -1, "a number of at least 0"),
        ("learning_rate", -1e-3, "a number of at least 0"),
        ("learning_rate", float("inf"), "a number of at least 0"),
        ("max_grad_norm", -1.0, "a number above 0"),
        ("max_grad_norm", 0.0, "a number above 0"),
        ("gradient_steps", -2, "an integer of at least -1"),
    ],
)
def test_values_out_of_range_are_named(argument: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .*{re.escape(allowed)}, got {re.escape(repr(value))}$"):
        LectureDQN("MlpPolicy", "CartPole-v1", **{argument: value})


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    numbers: dict[str, Any] = {"learning_rate": Fraction(1, 8), "gamma": np.float32(0.5), "batch_size": np.int64(4)}
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=np.int32(8), **numbers).learn(16)
    assert (model.learning_rate, model.gamma, model.batch_size, model.learning_starts) == (0.125, 0.5, 4, 8)
    assert [type(getattr(model, name)) for name in (*numbers, "learning_starts")] == [float, float, int, int]


@pytest.mark.parametrize("train_freq", [0, 2.5, "4", True, (0, "step"), (4,), (4, "second"), [4, "step"], (-1, "episode")])
def test_a_training_frequency_out_of_range_is_named(train_freq: Any) -> None:
    message = f"train_freq must be an integer of at least 1, or a tuple of it and .*, got {re.escape(repr(train_freq))}$"
    with pytest.raises(ValueError, match=message):
        LectureDQN("MlpPolicy", "CartPole-v1", train_freq=train_freq)


@pytest.mark.parametrize("net_arch", [[256, 0], [-1], [2.5], "256", 256, {"pi": [64]}])
def test_layer_sizes_below_one_are_named(net_arch: Any) -> None:
    with pytest.raises(ValueError, match=r"^net_arch must be a list of integers of at least 1, got "):
        LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": net_arch})


def test_an_activation_that_is_no_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"^activation_fn must be a class of layers like torch\.nn\.LeakyReLU, got 'relu'$"):
        LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"activation_fn": "relu"})


@pytest.mark.parametrize("replay_buffer_class", [dict, "ReplayBuffer"])
def test_what_is_no_replay_buffer_is_named(replay_buffer_class: Any) -> None:
    with pytest.raises(ValueError, match=r"^replay_buffer_class must be a subclass of SB3's ReplayBuffer, got "):
        LectureDQN("MlpPolicy", "CartPole-v1", replay_buffer_class=replay_buffer_class)


class Misspelt(FlattenExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.n = observation_space.shapes  # type: ignore[attr-defined]


def test_a_mistake_in_an_encoder_of_a_users_own_is_shown_as_it_is() -> None:
    with pytest.raises(AttributeError, match="shapes"):
        LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"features_extractor_class": Misspelt})


def test_an_empty_net_arch_makes_q_linear() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": []})
    assert len(model.q_net.q_net) == 1


def test_a_negative_scale_of_the_final_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"^final_layer_std must be a number of at least 0, got -1$"):
        LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"final_layer_std": -1})


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match=r"^policy must be one of MlpPolicy, CnnPolicy, MultiInputPolicy or a subclass"):
        LectureDQN("MlpLstmPolicy", "CartPole-v1")


def test_an_unknown_environment_is_named() -> None:
    with pytest.raises(gymnasium.error.NameNotFound, match="NoSuchEnv"):
        LectureDQN("MlpPolicy", "NoSuchEnv-v0")


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        LectureDQN("MlpPolicy", "CartPole-v1", learning_rat=1e-3)  # type: ignore[call-arg]


def test_a_dictionary_observation_needs_the_policy_for_it() -> None:
    env = EnvWithActions(spaces.Discrete(2))
    env.observation_space = spaces.Dict({"vector": spaces.Box(-1, 1, (2,), np.float32)})  # type: ignore[assignment]
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        LectureDQN("MlpPolicy", env)


def test_image_policy_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"^env must have observations that NatureCNN can take, got Box.*images.*$") as error:
        LectureDQN("CnnPolicy", "CartPole-v1")
    assert "\n" not in str(error.value)
    assert LectureDQN("CnnPolicy", FakeImageEnv(discrete=True), buffer_size=10).q_net is not None
