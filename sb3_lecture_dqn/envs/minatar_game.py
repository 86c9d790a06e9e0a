"""MinAtar's own environment of Breakout, repaired. Importing this module imports MinAtar."""

from typing import Any, ClassVar

import gymnasium
import numpy as np
from minatar.gym import BaseEnv


class Breakout(BaseEnv):  # type: ignore[misc]  # MinAtar has no types
    """
    Breakout with its three actions; a seed decides all of an episode, and pictures are what Gymnasium's films are made of.

    :param render_mode: One of MinAtar's
    """

    metadata: ClassVar[dict[str, Any]] = {**BaseEnv.metadata, "render_fps": 20}

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__("breakout", render_mode=render_mode, use_minimal_action_set=True)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Start an episode.

        :param seed: What decides it, and the ones after it
        :param options: None are known
        :return: The planes, and an empty dictionary
        """
        gymnasium.Env.reset(self, seed=seed)
        if seed is not None:
            self.game.last_action = 0  # which a sticky action would repeat
        observation: np.ndarray
        observation, info = super().reset(seed, options)
        return observation, info

    def render(self) -> np.ndarray | None:
        """
        The picture.

        :return: For ``"rgb_array"`` uint8 of shape (10, 10, 3)
        """
        picture: np.ndarray | None = super().render()
        return picture if picture is None or self.render_mode != "rgb_array" else (255 * picture).astype(np.uint8)
