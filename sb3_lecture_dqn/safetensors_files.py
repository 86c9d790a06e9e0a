"""
Models in a format that cannot run code.

SB3's zip files hold pickles, and a pickle can run any code when it is loaded. A file of this module holds tensors in the
format `safetensors <https://github.com/huggingface/safetensors>`_ and, in its header, JSON: numbers, words and shapes, from
which the model is built anew. It holds what a user needs to play, to evaluate and to start another training: θ, ψ, the spaces,
the hyperparameters that are numbers, and what d is (L2); not the optimizer's state, and not the replay buffer.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch as th
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_lecture_dqn.lecture_dqn import LectureDQN
from sb3_lecture_dqn.model_files import replace_when_written
from sb3_lecture_dqn.policies import CnnPolicy, LectureDQNPolicy, MultiInputPolicy
from sb3_lecture_dqn.validation import NUMERIC_ARGUMENTS, as_plain_number, in_one_line

FORMAT_VERSION = 1
#: What a file may name: a name is looked up here and nowhere else.
POLICIES: dict[str, type[LectureDQNPolicy]] = {cls.__name__: cls for cls in (LectureDQNPolicy, CnnPolicy, MultiInputPolicy)}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (nn.LeakyReLU, nn.ReLU, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid)
}
EXTRACTORS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (FlattenExtractor, NatureCNN, CombinedExtractor)}
#: Arguments of the constructor that JSON can write as they are.
PLAIN_ARGUMENTS = (*NUMERIC_ARGUMENTS, "optimize_memory_usage")
OPTIMIZERS: dict[str, type[th.optim.Optimizer]] = {
    cls.__name__: cls for cls in (th.optim.Adam, th.optim.AdamW, th.optim.SGD, th.optim.RMSprop)
}
#: What ``lin_0.001`` in a hyperparameter file becomes: a line from its ``initial_value`` to 0.
ZOOS_SCHEDULE = "rl_zoo3.utils.SimpleLinearSchedule"
_HEADER = "sb3_lecture_dqn"


def save_safetensors(model: LectureDQN, path: str | Path) -> None:
    """
    Save a model in a file that cannot run code; a failure leaves a file that was there before as it was.

    :param model: The model
    :param path: The file, whose name should end in ``.safetensors``
    :raises ValueError: if the model has a part that such a file cannot name: a policy, a features extractor or an activation
        function of a user's own, another optimizer or schedule, or a space other than Box, Discrete, MultiDiscrete,
        MultiBinary and Dict of these
    :raises OSError: if the file cannot be written
    """
    policy = model.policy
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in policy.state_dict().items()}
    description = {
        "format": FORMAT_VERSION,
        "policy": _name_of(type(policy), POLICIES, "policy"),
        "policy_kwargs": _describe_policy(policy),
        "observation_space": _describe_space(model.observation_space),
        "action_space": _describe_space(model.action_space),
        "learning_rate": _describe_schedule(model.learning_rate),
        "train_freq": [model.train_freq.frequency, model.train_freq.unit.value],  # type: ignore[union-attr]
        "numbers": {name: getattr(model, name) for name in PLAIN_ARGUMENTS},
        "handle_timeout_termination": model.replay_buffer_kwargs.get("handle_timeout_termination", False),
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
    }
    header = {_HEADER: json.dumps(description), "sha256": _sha256(tensors, json.dumps(description))}
    try:
        with replace_when_written(Path(path)) as unfinished:
            save_file(tensors, unfinished, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def load_safetensors(path: str | Path, env: GymEnv | None = None, device: th.device | str = "auto") -> LectureDQN:
    """
    Load a model from a file of :func:`save_safetensors`, without running any code of the file's.

    :param path: The file
    :param env: The environment to go on with; ``None`` is enough to predict
    :param device: PyTorch device
    :return: The model
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if the file is damaged, or not one of these; or the environment has other spaces
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        if header["sha256"] != _sha256(tensors, header[_HEADER]):
            raise ValueError("its checksum is another")
        description = json.loads(header[_HEADER])
        model = _build(description, device)
        model.policy.load_state_dict(tensors)
        model.num_timesteps, model._n_updates = int(description["num_timesteps"]), int(description["n_updates"])
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ValueError(f"path must be a whole file of save_safetensors, got {path}: {error}") from error
    model.env = None
    if env is not None:
        _set_env(model, model._wrap_env(env, model.verbose))
    return model


def _set_env(model: LectureDQN, vec_env: VecEnv) -> None:
    if (vec_env.observation_space, vec_env.action_space) != (model.observation_space, model.action_space):
        spaces_of_env = in_one_line(f"{vec_env.observation_space} and {vec_env.action_space}")
        spaces_of_model = in_one_line(f"{model.observation_space} and {model.action_space}")
        raise ValueError(f"env must have the spaces {spaces_of_model}, got {spaces_of_env}")
    model.n_envs = vec_env.num_envs
    model.set_env(vec_env)


def _build(description: dict[str, Any], device: th.device | str) -> LectureDQN:
    if description["format"] != FORMAT_VERSION:
        raise ValueError(f"it has the format {description['format']}, this version reads {FORMAT_VERSION}")
    observation_space = _build_space(description["observation_space"])
    action_space = _build_space(description["action_space"])
    policy_kwargs = dict(description["policy_kwargs"])
    policy_kwargs["activation_fn"] = ACTIVATIONS[policy_kwargs["activation_fn"]]
    policy_kwargs["features_extractor_class"] = EXTRACTORS[policy_kwargs["features_extractor_class"]]
    policy_kwargs["optimizer_class"] = OPTIMIZERS[policy_kwargs["optimizer_class"]]
    number, unit = description["train_freq"]
    return LectureDQN(
        POLICIES[description["policy"]],
        _OnlySpaces(observation_space, action_space),
        learning_rate=_build_schedule(description["learning_rate"]),
        train_freq=(int(number), unit),
        replay_buffer_kwargs={"handle_timeout_termination": description["handle_timeout_termination"]},
        policy_kwargs=policy_kwargs,
        device=device,
        **{name: description["numbers"][name] for name in PLAIN_ARGUMENTS},
    )


class _OnlySpaces(gymnasium.Env[Any, Any]):
    """Stands in for the environment, whose parts may be in another order than those that the networks were trained on."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space


def _describe_policy(policy: LectureDQNPolicy) -> dict[str, Any]:
    return {
        "net_arch": policy.net_arch,
        "activation_fn": _name_of(policy.activation_fn, ACTIVATIONS, "activation_fn"),
        "features_extractor_class": _name_of(policy.features_extractor_class, EXTRACTORS, "features_extractor_class"),
        "features_extractor_kwargs": _check_numbers(policy.features_extractor_kwargs, "features_extractor_kwargs"),
        "normalize_images": policy.normalize_images,
        "optimizer_class": _name_of(policy.optimizer_class, OPTIMIZERS, "optimizer_class"),
        "optimizer_kwargs": _check_numbers(policy.optimizer_kwargs, "optimizer_kwargs"),
        "layer_norm": policy.layer_norm,
        "final_layer_std": policy.final_layer_std,
    }


def _name_of(cls: Any, known: dict[str, type[Any]], argument: str) -> str:
    name = getattr(cls, "__name__", repr(cls))
    if known.get(name) is not cls:
        raise ValueError(f"{argument} must be one of {', '.join(known)} to be saved without code, got {name}")
    return name


def _check_numbers(values: dict[str, Any], argument: str) -> dict[str, Any]:
    plain = {name: as_plain_number(value) for name, value in values.items()}
    for name, value in plain.items():
        numbers = value if isinstance(value, (tuple, list)) else [value]
        if not all(isinstance(number, (int, float, bool, type(None))) for number in numbers):
            raise ValueError(f"{argument} must be numbers to be saved without code, got {name}={value!r}")
    return plain


def _describe_schedule(schedule: Any) -> list[float] | float:
    while isinstance(schedule, FloatSchedule):
        schedule = schedule.value_schedule
    if isinstance(schedule, LinearSchedule):
        return [schedule.start, schedule.end, schedule.end_fraction]
    if isinstance(schedule, ConstantSchedule):
        schedule = schedule.val
    if f"{type(schedule).__module__}.{type(schedule).__name__}" == ZOOS_SCHEDULE:
        return [schedule.initial_value, 0.0, 1.0]
    if not isinstance(schedule, (int, float)):
        raise ValueError(f"learning_rate must be a number or a LinearSchedule to be saved without code, got {schedule!r}")
    return float(schedule)


def _build_schedule(description: Any) -> Any:
    return LinearSchedule(*map(float, description)) if isinstance(description, list) else float(description)


def _describe_space(space: spaces.Space[Any]) -> dict[str, Any]:
    if isinstance(space, spaces.Box):
        bounds = {"low": _describe_array(space.low), "high": _describe_array(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, spaces.MultiBinary):
        n = space.n
        return {"type": "MultiBinary", "n": int(n) if isinstance(n, (int, np.integer)) else [int(size) for size in n]}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {name: _describe_space(item) for name, item in space.spaces.items()}}
    raise ValueError(f"a space must be a Box, Discrete, MultiDiscrete, MultiBinary or Dict to be saved, got {space}")


def _describe_array(array: np.ndarray) -> Any:
    """One number where all are the same (an image's bounds), in words that JSON's numbers lack for infinity."""
    numbers = [str(number) for number in array.reshape(-1).tolist()]
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _build_array(description: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    numbers = [description] * int(np.prod(shape)) if isinstance(description, str) else description
    parsed = [float(number) if dtype.kind == "f" else _as_int(number) for number in numbers]
    return np.array(parsed, dtype=dtype).reshape(shape)


def _as_int(number: str) -> int:
    return {"True": 1, "False": 0}[number] if number in ("True", "False") else int(number)


def _build_space(description: dict[str, Any]) -> spaces.Space[Any]:
    kind = description["type"]
    if kind == "Box":
        shape, dtype = tuple(map(int, description["shape"])), np.dtype(description["dtype"])
        low, high = (_build_array(description[name], shape, dtype) for name in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(int(description["n"]), start=int(description["start"]))
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(np.array(description["nvec"], dtype=np.int64))
    if kind == "MultiBinary":
        return spaces.MultiBinary(description["n"])
    if kind == "Dict":
        # pairs, because Gymnasium sorts a dictionary, and the encoder takes the parts in their order
        return spaces.Dict([(name, _build_space(item)) for name, item in description["spaces"].items()])
    raise ValueError(f"it names the unknown space {kind!r}")


def _sha256(tensors: dict[str, th.Tensor], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
