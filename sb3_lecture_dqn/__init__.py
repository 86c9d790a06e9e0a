"""
The Deep Q Network of a Cambridge lecture, as an algorithm of Stable-Baselines3.

``from sb3_lecture_dqn import LectureDQN`` stands where ``from stable_baselines3 import DQN`` did.
"""

from importlib.metadata import PackageNotFoundError, version

from sb3_lecture_dqn.divergence import DivergenceError
from sb3_lecture_dqn.envs import register_envs
from sb3_lecture_dqn.lecture_dqn import LectureDQN
from sb3_lecture_dqn.policies import CnnPolicy, LectureDQNPolicy, MlpPolicy, MultiInputPolicy, QNetwork
from sb3_lecture_dqn.resume.checkpoints import ResumableCheckpointCallback
from sb3_lecture_dqn.safetensors_files import load_safetensors, save_safetensors

__all__ = [
    "CnnPolicy",
    "DivergenceError",
    "LectureDQN",
    "LectureDQNPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "QNetwork",
    "ResumableCheckpointCallback",
    "load_safetensors",
    "save_safetensors",
]

try:
    __version__ = version("sb3-lecture-dqn")
except PackageNotFoundError:  # run from a source folder that is not installed
    __version__ = "0"

register_envs()
