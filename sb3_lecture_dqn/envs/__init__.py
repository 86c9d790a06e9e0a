"""Environments, and their registration with Gymnasium."""

import gymnasium

from sb3_lecture_dqn.envs import minatar_breakout
from sb3_lecture_dqn.envs.gym_vector_vec_env import GymVectorVecEnv
from sb3_lecture_dqn.envs.lunar_lander import LunarLanderV2
from sb3_lecture_dqn.envs.robo_parking import MAX_EPISODE_STEPS, RoboParkingEnv, RoboParkingVectorEnv

__all__ = ["GymVectorVecEnv", "LunarLanderV2", "RoboParkingEnv", "RoboParkingVectorEnv", "register_envs"]


def register_envs() -> None:
    """Register the environments of this package that Gymnasium does not know yet."""
    _register_lunar_lander("LunarLander-v2")
    _register_lunar_lander("LunarLanderContinuous-v2", continuous=True)
    if "RoboParking-v0" not in gymnasium.registry:
        gymnasium.register(
            id="RoboParking-v0",
            entry_point="sb3_lecture_dqn.envs.robo_parking:RoboParkingEnv",
            vector_entry_point="sb3_lecture_dqn.envs.robo_parking:RoboParkingVectorEnv",
            max_episode_steps=MAX_EPISODE_STEPS,
        )
    if minatar_breakout.ENV_ID not in gymnasium.registry:
        gymnasium.register(
            id=minatar_breakout.ENV_ID,
            entry_point="sb3_lecture_dqn.envs.minatar_breakout:make_breakout",
            max_episode_steps=minatar_breakout.MAX_EPISODE_STEPS,
        )


def _register_lunar_lander(env_id: str, **kwargs: object) -> None:
    if env_id not in gymnasium.registry:
        gymnasium.register(
            id=env_id,
            entry_point="sb3_lecture_dqn.envs.lunar_lander:LunarLanderV2",
            max_episode_steps=1000,
            reward_threshold=200,
            kwargs=kwargs,
        )
