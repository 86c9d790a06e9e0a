"""``LunarLander-v2``, which the lecture's slides make and Gymnasium removed in its version 1.0 (L3)."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.box2d.lunar_lander import LunarLander


class LunarLanderV2(LunarLander):
    """
    Gymnasium's ``LunarLander-v3`` within the observation bounds of version 2.

    Physics, rewards and determinism are version 3's. The bounds are those that models saved on version 2 carry, so that they
    load: (x, y) in ±1.5, velocities in ±5, the angle in ±π, the angular velocity in ±5, leg contacts in [0, 1].

    :param args: The arguments of Gymnasium's ``LunarLander``
    :param kwargs: The same, by name
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # a copy is made with all arguments by position
        super().__init__(*args, **kwargs)
        high = np.array([1.5, 1.5, 5.0, 5.0, math.pi, 5.0, 1.0, 1.0], dtype=np.float32)
        low = np.array([-1.5, -1.5, -5.0, -5.0, -math.pi, -5.0, -0.0, -0.0], dtype=np.float32)
        self.observation_space = spaces.Box(low, high)
