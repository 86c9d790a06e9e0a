"""
MinAtar's Breakout (https://github.com/kenjyoung/MinAtar) as an environment of pixels, and the encoder for it.

MinAtar is not among this project's dependencies: ``pip install --no-deps MinAtar``.
"""

import gymnasium
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

ENV_ID = "MinAtar/Breakout-v1"
# MinAtar has no limit, and a policy that never misses would be evaluated forever.
MAX_EPISODE_STEPS = 5_000


def register() -> None:
    """
    Register Breakout with its minimal set of actions.

    :raises SystemExit: if MinAtar is not installed
    """
    try:
        import minatar  # noqa: F401
    except ImportError:
        raise SystemExit("the row MinAtar-Breakout needs MinAtar: pip install --no-deps MinAtar") from None
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            id=ENV_ID,
            entry_point="minatar.gym:BaseEnv",
            max_episode_steps=MAX_EPISODE_STEPS,
            kwargs={"game": "breakout", "use_minimal_action_set": True},
        )


class Pixels(gymnasium.ObservationWrapper[np.ndarray, int, np.ndarray]):
    """
    MinAtar's planes of bools as an image: channels first, 0 or 255.

    :param env: An environment of MinAtar
    """

    def __init__(self, env: gymnasium.Env[np.ndarray, int]) -> None:
        super().__init__(env)
        height, width, channels = env.observation_space.shape  # type: ignore[misc]
        self.observation_space = spaces.Box(0, 255, (channels, height, width), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Shape (10, 10, 4) to (4, 10, 10)."""
        return np.ascontiguousarray(observation.transpose(2, 0, 1)).astype(np.uint8) * 255


class Encoder(BaseFeaturesExtractor):
    """
    The encoder of MinAtar's paper: one 3 × 3 convolution of 16 channels.

    :param observation_space: Images, channels first
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        channels, height, width = observation_space.shape
        super().__init__(observation_space, features_dim=16 * (height - 2) * (width - 2))
        self.layers = nn.Sequential(nn.Conv2d(channels, 16, kernel_size=3), nn.ReLU(), nn.Flatten())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Shape (B, channels, height, width), in [0, 1], to (B, features)."""
        features: th.Tensor = self.layers(observations)
        return features
