"""Checks of what users pass in: each error names the argument, what it was, and what it may be, in one line."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

#: Arguments of ``LectureDQN`` that are a number, or ``None``, and nothing else.
NUMERIC_ARGUMENTS = (
    "buffer_size",
    "learning_starts",
    "batch_size",
    "tau",
    "gamma",
    "gradient_steps",
    "n_steps",
    "target_update_interval",
    "exploration_fraction",
    "exploration_initial_eps",
    "exploration_final_eps",
    "max_grad_norm",
)


def check_at_least(name: str, value: Any, low: float) -> None:
    """
    Check that a number is at least ``low``.

    :param name: Name of the argument
    :param value: What the user passed
    :param low: Smallest allowed value
    :raises ValueError: if it is not a finite number of at least ``low``
    """
    if not _is_real(value) or not low <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {low}, got {value!r}")


def check_above_zero(name: str, value: Any, allow_infinity: bool = False) -> None:
    """
    Check that a number is above 0.

    :param name: Name of the argument
    :param value: What the user passed
    :param allow_infinity: Whether infinity will do
    :raises ValueError: if it is not a number above 0
    """
    if not _is_real(value) or not value > 0 or (value == math.inf and not allow_infinity):
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def check_int_at_least(name: str, value: Any, low: int) -> None:
    """
    Check that a value is a whole number of at least ``low``.

    :param name: Name of the argument
    :param value: What the user passed
    :param low: Smallest allowed value
    :raises ValueError: if it is not an integer, or below ``low``
    """
    if not _is_int(value) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def check_train_freq(train_freq: Any) -> tuple[int, Any]:
    """
    Check how often to train.

    :param train_freq: What the user passed, or SB3's ``TrainFreq`` of a loaded model
    :return: The number and the unit
    :raises ValueError: if it is neither an integer of at least 1, nor a tuple of such a number and a unit
    """
    is_pair = isinstance(train_freq, tuple) and len(train_freq) == 2
    frequency, unit = train_freq if is_pair else (train_freq, "step")
    if not _is_int(frequency) or frequency < 1 or getattr(unit, "value", unit) not in ("step", "episode"):
        raise ValueError(
            'train_freq must be an integer of at least 1, or a tuple of it and "step" or "episode", like (2, "episode"), got '
            f"{train_freq!r}"
        )
    return int(frequency), unit


def check_in_unit_interval(name: str, value: Any) -> None:
    """
    Check that a number lies in [0, 1].

    :param name: Name of the argument
    :param value: What the user passed
    :raises ValueError: if it is not a number in [0, 1]
    """
    if not _is_real(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


def check_net_arch(net_arch: Any) -> list[int]:
    """
    Check the sizes of the hidden layers.

    :param net_arch: What the user passed
    :return: The sizes as a list; an empty one makes Q linear in the features
    :raises ValueError: if it is not a sequence of integers of at least 1
    """
    is_sequence = isinstance(net_arch, Sequence) and not isinstance(net_arch, str)
    if not is_sequence or any(not _is_int(size) or size < 1 for size in net_arch):
        raise ValueError(f"net_arch must be a list of integers of at least 1, got {net_arch!r}")
    return [int(size) for size in net_arch]


def as_plain_number(value: Any) -> Any:
    """
    A number as Python's own, whichever library it is of.

    :param value: A number, or anything else
    :return: An ``int`` or a ``float``; anything else as it is
    """
    if _is_int(value):
        return int(value)
    return float(value) if _is_real(value) else value


def in_one_line(value: Any) -> str:
    """
    A value as an error shows it.

    :param value: For instance a space with long bounds, which numpy breaks into lines
    :return: Its text without line breaks
    """
    return " ".join(str(value).split())


def check_activation(activation_fn: Any) -> None:
    """
    Check what makes the activations of the hidden layers.

    :param activation_fn: What the user passed
    :raises ValueError: if it is no class, and nothing else that can be called to make a layer
    """
    if not callable(activation_fn):
        raise ValueError(f"activation_fn must be a class of layers like torch.nn.LeakyReLU, got {activation_fn!r}")


def check_action_space(action_space: spaces.Space[Any]) -> None:
    """
    Check that the actions are those of a DQN: a finite set, numbered from 0.

    :param action_space: The environment's action space
    :raises AssertionError: if it is anything else; SB3's DQN raises this type, and code written for it expects that
    """
    if not isinstance(action_space, spaces.Discrete) or action_space.start != 0:
        raise AssertionError(f"env must have an action space Discrete(n) that starts at 0, got {in_one_line(action_space)}")


def check_observation_space(observation_space: spaces.Space[Any]) -> None:
    """
    Check that the networks can take the observations: vectors, images, numbers from 0, or a dictionary of these.

    :param observation_space: The environment's observation space
    :raises ValueError: if it is anything else
    """
    parts = [observation_space]
    if isinstance(observation_space, spaces.Dict):
        parts = list(observation_space.spaces.values())
    for part in parts:
        if not _is_known_space(part):
            raise ValueError(
                "env must have an observation space that is a Box of at least one number, a Discrete or a one-dimensional "
                f"MultiDiscrete that starts at 0, a MultiBinary, or a Dict of these, got {in_one_line(observation_space)}"
            )
    if not parts:
        raise ValueError(f"env must have an observation space with something in it, got {observation_space}")


def _is_known_space(space: spaces.Space[Any]) -> bool:
    if isinstance(space, spaces.Box):
        return len(space.shape) > 0 and 0 not in space.shape
    if isinstance(space, spaces.Discrete):
        return int(space.start) == 0
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.ndim == 1 and not space.start.any()
    return isinstance(space, spaces.MultiBinary)


def check_policy_class(policy: Any, aliases: Mapping[str, type], policy_class: type) -> None:
    """
    Check that a policy is one that the algorithm can train.

    :param policy: What the user passed: a name or a class
    :param aliases: The names and their classes
    :param policy_class: The class that a policy must derive from
    :raises ValueError: if it is another name, or a class that does not derive from ``policy_class``
    """
    is_known = policy in aliases if isinstance(policy, str) else isinstance(policy, type) and issubclass(policy, policy_class)
    if not is_known:
        shown = policy.__name__ if isinstance(policy, type) else repr(policy)
        raise ValueError(f"policy must be one of {', '.join(aliases)} or a subclass of {policy_class.__name__}, got {shown}")


def check_replay_buffer_class(replay_buffer_class: Any) -> None:
    """
    Check that a class is one of replay buffers.

    :param replay_buffer_class: What the user passed; ``None`` for the default
    :raises ValueError: if it is not a subclass of SB3's ``ReplayBuffer``
    """
    is_class = isinstance(replay_buffer_class, type)
    if replay_buffer_class is not None and not (is_class and issubclass(replay_buffer_class, ReplayBuffer)):
        raise ValueError(f"replay_buffer_class must be a subclass of SB3's ReplayBuffer, got {replay_buffer_class!r}")


def check_state_dict(name: str, given: Any, own: Mapping[str, th.Tensor], exact_match: bool) -> None:
    """
    Check that a policy can take parameters, before it has taken the first of them.

    :param name: Name of the argument that they came by
    :param given: The parameters
    :param own: The policy's own
    :param exact_match: Whether there must be all of them, and no others
    :raises ValueError: if it is no dictionary, or a parameter is missing, too many or of another shape
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must hold a dictionary of the policy's parameters, got {type(given).__name__}")
    others = sorted(given.keys() ^ own.keys()) if exact_match else []
    if others:
        problem = "no" if others[0] in own else "a"
        raise ValueError(f"{name} must hold the parameters of this policy, got {problem} parameter {others[0]}")
    for key in given.keys() & own.keys():
        if given[key].shape != own[key].shape:
            expected, got = tuple(own[key].shape), tuple(given[key].shape)
            raise ValueError(f"{name} must hold the parameters of this policy, where {key} is {expected}, got {got}")


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
