"""Models in a format that cannot run code."""

import builtins
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import save_file
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_lecture_dqn import LectureDQN, load_safetensors, safetensors_files, save_safetensors
from sb3_lecture_dqn.policies import LectureDQNPolicy

IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
SPACES: list[tuple[str, spaces.Space[Any]]] = [
    ("MlpPolicy", spaces.Box(-np.inf, np.inf, (3,), np.float32)),
    ("MlpPolicy", spaces.Box(np.array([0, -2]), np.array([1, 5]), dtype=np.int64)),
    ("MlpPolicy", spaces.Discrete(5)),
    ("MlpPolicy", spaces.MultiDiscrete([3, 4])),
    ("MlpPolicy", spaces.MultiBinary(4)),
    ("CnnPolicy", IMAGE),
    ("MultiInputPolicy", spaces.Dict({"image": IMAGE, "vector": spaces.Box(0, 1, (2,), np.float64)})),
    # in an order that Gymnasium would sort
    ("MultiInputPolicy", spaces.Dict([("b", spaces.Box(0, 1, (3,), np.float32)), ("a", spaces.Box(-5, 0, (2,), np.float32))])),
]


class SpaceEnv(gymnasium.Env[Any, int]):
    """Gives samples of a space."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.observation_space = space
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(("policy", "space"), SPACES, ids=[str(space)[:12] for _, space in SPACES])
def test_a_model_comes_back_with_its_networks_and_spaces(policy: str, space: spaces.Space[Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"gamma": 0.9, "learning_rate": LinearSchedule(1e-3, 1e-5, 0.5), "train_freq": (2, "episode")}
    model = LectureDQN(policy, SpaceEnv(space), policy_kwargs={"net_arch": [8], "activation_fn": nn.Tanh}, **settings)
    save_safetensors(model, tmp_path / "model.safetensors")
    loaded = load_safetensors(tmp_path / "model.safetensors")
    assert (loaded.observation_space, loaded.action_space) == (model.observation_space, model.action_space)
    state, loaded_state = model.policy.state_dict(), loaded.policy.state_dict()
    assert all(th.equal(state[name].cpu(), loaded_state[name].cpu()) for name in state)
    assert (loaded.gamma, loaded.train_freq) == (0.9, model.train_freq)
    assert loaded.lr_schedule(0.75) == model.lr_schedule(0.75)
    for _ in range(5):
        tensor, _ = model.policy.obs_to_tensor(space.sample())
        assert th.equal(loaded.q_net(tensor), model.q_net(tensor))


def test_the_agents_that_the_zoo_trained_can_be_saved(tmp_path: Path) -> None:
    agents = sorted((Path(__file__).parents[1] / "rl-trained-agents" / "lecture_dqn").glob("*_1/*.zip"))
    assert len(agents) == 5
    for agent in agents:
        model = LectureDQN.load(agent)
        save_safetensors(model, tmp_path / "agent.safetensors")
        loaded = load_safetensors(tmp_path / "agent.safetensors")
        assert loaded.lr_schedule(0.25) == pytest.approx(model.lr_schedule(0.25))
        assert (
            loaded.replay_buffer_kwargs["handle_timeout_termination"]
            == model.replay_buffer_kwargs["handle_timeout_termination"]
        )


def test_numpy_numbers_and_other_optimizers_come_back(tmp_path: Path) -> None:
    policy_kwargs: dict[str, Any] = {
        "net_arch": [np.int64(8)],
        "optimizer_class": th.optim.AdamW,
        "optimizer_kwargs": {"betas": (0.8, 0.9), "weight_decay": np.float64(0.1)},
    }
    settings: dict[str, Any] = {"gamma": np.float32(0.5), "learning_starts": np.int64(9), "max_grad_norm": np.float32(2)}
    model = LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, **settings)
    save_safetensors(model, tmp_path / "model.safetensors")
    loaded = load_safetensors(tmp_path / "model.safetensors")
    assert (loaded.gamma, loaded.learning_starts, loaded.max_grad_norm) == (0.5, 9, 2.0)
    optimizer = loaded.policy.optimizer
    assert type(optimizer) is th.optim.AdamW
    assert (tuple(optimizer.param_groups[0]["betas"]), optimizer.param_groups[0]["weight_decay"]) == ((0.8, 0.9), 0.1)


def test_what_the_networks_were_made_with_comes_back(tmp_path: Path) -> None:
    policy_kwargs: dict[str, Any] = {
        "features_extractor_kwargs": {"features_dim": 9},
        "normalize_images": False,
        "layer_norm": False,
        "final_layer_std": 0.5,
    }
    settings: dict[str, Any] = {"optimize_memory_usage": True, "buffer_size": 20}
    model = LectureDQN("CnnPolicy", SpaceEnv(IMAGE), policy_kwargs=policy_kwargs, **settings)
    save_safetensors(model, tmp_path / "model.safetensors")
    loaded = load_safetensors(tmp_path / "model.safetensors")
    assert {name: getattr(loaded.policy, name) for name in policy_kwargs} == policy_kwargs
    assert {name: getattr(loaded, name) for name in settings} == settings


def test_it_goes_on_learning_in_an_environment(tmp_path: Path) -> None:
    LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=10).learn(50)
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=10, seed=0).learn(50)
    save_safetensors(model, tmp_path / "model.safetensors")
    loaded = load_safetensors(tmp_path / "model.safetensors", gymnasium.make("CartPole-v1"))
    assert (loaded.num_timesteps, loaded._n_updates) == (model.num_timesteps, model._n_updates)
    loaded.learn(50)


def test_it_goes_on_in_several_normalised_environments(tmp_path: Path) -> None:
    save_safetensors(LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20), tmp_path / "model.safetensors")
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2))
    model = load_safetensors(tmp_path / "model.safetensors", env).learn(80)
    assert model._n_updates > 0
    assert model.get_vec_normalize_env() is env
    assert model.replay_buffer is not None
    assert model.replay_buffer.n_envs == 2


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_safetensors(LectureDQN("MlpPolicy", "CartPole-v1"), tmp_path / "model.safetensors")

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this runs code")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, forbidden)
    assert load_safetensors(tmp_path / "model.safetensors").gamma == 0.99


def test_what_cannot_be_named_is_refused(tmp_path: Path) -> None:
    class OwnPolicy(LectureDQNPolicy):
        pass

    with pytest.raises(ValueError, match=r"policy must be one of .* to be saved without code, got OwnPolicy"):
        save_safetensors(LectureDQN(OwnPolicy, "CartPole-v1"), tmp_path / "model.safetensors")
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_rate=lambda progress: progress)
    with pytest.raises(ValueError, match="learning_rate must be a number or a LinearSchedule"):
        save_safetensors(model, tmp_path / "model.safetensors")
    policy_kwargs = {"activation_fn": functools.partial(nn.LeakyReLU, 0.2)}
    with pytest.raises(ValueError, match=r"activation_fn must be one of .* to be saved without code, got functools\.partial"):
        save_safetensors(LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_environment_is_refused(tmp_path: Path) -> None:
    save_safetensors(LectureDQN("MlpPolicy", "CartPole-v1"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^env must have the spaces"):
        load_safetensors(tmp_path / "model.safetensors", gymnasium.make("MountainCar-v0"))


def test_files_that_are_not_ours_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "missing.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="must be a whole file of save_safetensors"):
        load_safetensors(tmp_path / "other.safetensors")


def test_a_description_that_lacks_something_is_named(tmp_path: Path) -> None:
    save_safetensors(LectureDQN("MlpPolicy", "CartPole-v1"), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    description = json.loads(header["sb3_lecture_dqn"])
    del description["num_timesteps"]
    header["sb3_lecture_dqn"] = json.dumps(description)
    header["sha256"] = safetensors_files._sha256(tensors, header["sb3_lecture_dqn"])
    save_file(tensors, tmp_path / "other.safetensors", metadata=header)
    with pytest.raises(ValueError, match=r"must be a whole file of save_safetensors, got .*num_timesteps"):
        load_safetensors(tmp_path / "other.safetensors")
