"""
MinAtar's Breakout (https://github.com/kenjyoung/MinAtar), its observations as an image, and the encoder of its paper.

MinAtar comes with the extra ``extra``.
"""

import gymnasium
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

ENV_ID = "MinAtar/Breakout-v1"
# MinAtar has no limit, and a policy that never misses would be evaluated forever.
MAX_EPISODE_STEPS = 5_000


def make_breakout(render_mode: str | None = None) -> gymnasium.Env[np.ndarray, int]:
    """
    Breakout with its three actions, as MinAtar registers it, without two faults: there a reset with a seed does not forget the
    last action of the episode before, and a film is black.

    :param render_mode: One of MinAtar's
    :return: The environment, with MinAtar's planes of bools as observations
    :raises DependencyNotInstalled: if MinAtar is not installed
    """
    try:
        from sb3_lecture_dqn.envs.minatar_game import Breakout
    except ImportError:
        raise DependencyNotInstalled(f"{ENV_ID} needs MinAtar: pip install MinAtar") from None
    return Breakout(render_mode)


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
        """
        The planes as an image.

        :param observation: Bools, shape (10, 10, 4)
        :return: 0 or 255, shape (4, 10, 10)
        """
        return np.ascontiguousarray(observation.transpose(2, 0, 1)).astype(np.uint8) * 255


class Encoder(BaseFeaturesExtractor):
    """
    The encoder of MinAtar's paper (https://arxiv.org/abs/1903.03176): one 3 × 3 convolution of 16 channels.

    :param observation_space: Images, channels first
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        channels, height, width = observation_space.shape
        super().__init__(observation_space, features_dim=16 * (height - 2) * (width - 2))
        self.layers = nn.Sequential(nn.Conv2d(channels, 16, kernel_size=3), nn.ReLU(), nn.Flatten())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        The features of images.

        :param observations: Images in [0, 1], shape (B, channels, height, width)
        :return: Features, shape (B, features_dim)
        """
        features: th.Tensor = self.layers(observations)
        return features
