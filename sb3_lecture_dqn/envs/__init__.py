"""Environments, and their registration with Gymnasium."""

import gymnasium

from sb3_lecture_dqn.envs.lunar_lander import LunarLanderV2

__all__ = ["LunarLanderV2", "register_envs"]


def register_envs() -> None:
    """Register the environments of this package that Gymnasium does not know yet."""
    _register("LunarLander-v2")
    _register("LunarLanderContinuous-v2", continuous=True)


def _register(env_id: str, **kwargs: object) -> None:
    # An older Gymnasium has the real v2.
    if env_id not in gymnasium.registry:
        gymnasium.register(
            id=env_id,
            entry_point="sb3_lecture_dqn.envs.lunar_lander:LunarLanderV2",
            max_episode_steps=1000,
            reward_threshold=200,
            kwargs=kwargs,
        )
