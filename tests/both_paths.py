"""Models with small networks, made twice: for the update that is compared, and for the one that it is compared with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast.graph import map_tensors

VECTOR = spaces.Box(-3, 3, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 12, 12), np.uint8)
SPACES = {
    "vector": VECTOR,
    "image": IMAGE,
    "dict": spaces.Dict({"vector": VECTOR, "image": IMAGE, "number": spaces.Discrete(3)}),
}
BATCH_SIZE = 16
#: Where what is made for a GPU is tried.
DEVICES = ["cpu", "cuda"] if th.cuda.is_available() else ["cpu"]


class SmallCnn(FlattenExtractor):
    """A trained encoder for images that are too small for the Nature CNN."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self._features_dim = 32
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 32))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layers(observations.to(next(self.parameters()).dtype))
        return features


class DoubleFlatten(FlattenExtractor):
    """SB3 turns observations into float32; this turns them back."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).double()


class DictEncoder(BaseFeaturesExtractor):
    """A trained encoder of the image beside the vector and the number."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, features_dim=5 + 3 + 8)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(144, 8))

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        dtype = self.image[1].weight.dtype
        image = self.image(observations["image"].to(dtype))
        return th.cat([image, observations["vector"].to(dtype), observations["number"].flatten(1).to(dtype)], dim=1)


EXTRACTORS = {"vector": DoubleFlatten, "image": SmallCnn, "dict": DictEncoder}
POLICIES = {"vector": "MlpPolicy", "image": "CnnPolicy", "dict": "MultiInputPolicy"}


class SpaceEnv:
    """Only the spaces of an environment, as SB3 needs them to set a model up."""

    def __new__(cls, kind: str) -> Any:
        import gymnasium

        env: Any = gymnasium.Env()
        env.observation_space, env.action_space = SPACES[kind], spaces.Discrete(3)
        env.reset = lambda **_: (env.observation_space.sample(), {})
        return env


def make_model(kind: str, fast: bool, dtype: th.dtype = th.float64, **kwargs: Any) -> LectureDQN:
    policy_kwargs = {"net_arch": [16, 16], "final_layer_std": 0.3, **kwargs.pop("policy_kwargs", {})}
    if dtype == th.float64 or kind != "vector":
        policy_kwargs.setdefault("features_extractor_class", EXTRACTORS[kind])
    model = LectureDQN(POLICIES[kind], SpaceEnv(kind), buffer_size=10, policy_kwargs=policy_kwargs, seed=0, **kwargs)
    model.policy.to(dtype)
    model._setup_learn(10_000)
    if not fast:
        model._current_fast_update = lambda: None  # type: ignore[method-assign]
    return model


def random_batch(kind: str, rng: np.random.Generator, dtype: th.dtype = th.float64) -> ReplayBufferSamples:
    def observations() -> Any:
        samples: dict[str, Any] = {
            "vector": th.as_tensor(rng.normal(size=(BATCH_SIZE, 5)).astype(np.float32)),
            "image": th.as_tensor(rng.integers(255, size=(BATCH_SIZE, 1, 12, 12)), dtype=th.uint8),
            "number": th.as_tensor(rng.integers(3, size=(BATCH_SIZE, 1))),
        }
        return samples if kind == "dict" else samples[kind]

    return ReplayBufferSamples(
        observations=observations(),
        actions=th.as_tensor(rng.integers(3, size=(BATCH_SIZE, 1))),
        next_observations=observations(),
        dones=th.as_tensor(rng.integers(2, size=(BATCH_SIZE, 1))).to(dtype),
        rewards=th.as_tensor(rng.normal(size=(BATCH_SIZE, 1))).to(dtype),
    )


def train_on(model: LectureDQN, batch: ReplayBufferSamples) -> None:
    batch = moved(batch, model.device)
    model._sample_batch = lambda _: batch  # type: ignore[method-assign]
    model.train(gradient_steps=1, batch_size=BATCH_SIZE)
    model._on_step()


def train_both(kind: str, models: Sequence[LectureDQN], n_updates: int) -> None:
    """The same random batches for each model."""
    rng = np.random.default_rng(0)
    for _ in range(n_updates):
        batch = random_batch(kind, rng)
        for model in models:
            train_on(model, batch)


def trained_in_float64(fast: bool, normalised: bool, **kwargs: Any) -> LectureDQN:
    """
    A whole run with 501 gradient steps, one at a time, so that both paths draw the same batches; the learning rate falls.
    """
    env = make_vec_env("CartPole-v1", n_envs=1, seed=0)
    settings = {"learning_starts": 50, "batch_size": 16, "train_freq": 1, "target_update_interval": 50, "seed": 0}
    policy_kwargs = {"net_arch": [16, 16], "features_extractor_class": DoubleFlatten}
    model = LectureDQN(
        "MlpPolicy", VecNormalize(env) if normalised else env, policy_kwargs=policy_kwargs, **settings, **kwargs
    )
    model.policy.double()
    if not fast:
        model._current_fast_update = lambda: None  # type: ignore[method-assign]
    return model.learn(551)


def largest_difference(first: LectureDQN, second: LectureDQN) -> float:
    pairs = zip(first.policy.parameters(), second.policy.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def moved(value: Any, device: th.device) -> Any:
    return map_tensors(lambda tensor: tensor.to(device), value)


def copied(value: Any) -> Any:
    if isinstance(value, th.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value
