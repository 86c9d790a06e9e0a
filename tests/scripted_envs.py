"""Environments whose every observation is known, so that an off-by-one error shows."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class CountingEnv(gymnasium.Env[np.ndarray, int]):
    """
    The k-th observation of the e-th episode is (e, k), and the reward of reaching it 100 e + k.

    Episodes have the given length; the even ones are terminated, the odd ones truncated.

    :param length: Number of steps in an episode
    :param first_episode: Number of the first episode
    """

    def __init__(self, length: int = 3, first_episode: int = 0) -> None:
        self.observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
        self.action_space = spaces.Discrete(3)
        self.length = length
        self.episode = first_episode - 1
        self.step_count = 0

    def _observation(self) -> np.ndarray:
        return np.array([self.episode, self.step_count], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.step_count = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.step_count += 1
        is_over = self.step_count == self.length
        is_even = self.episode % 2 == 0
        reward = 100.0 * self.episode + self.step_count
        return self._observation(), reward, is_over and is_even, is_over and not is_even, {}
