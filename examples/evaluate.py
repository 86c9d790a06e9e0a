"""
Play greedy episodes of the latest trained model, and print their mean return.

    python examples/evaluate.py --env LunarLander-v2 --episodes 20
"""

import argparse

import gymnasium
import numpy as np
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import get_model_path
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_lecture_dqn import LectureDQN


def main() -> None:
    """Load, play, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="LunarLander-v2", help="environment id")
    parser.add_argument("--episodes", type=int, default=20, help="number of episodes")
    parser.add_argument("--folder", default="logs", help="the zoo's log folder")
    parser.add_argument("--seed", type=int, default=1_000_000, help="seed of the first episode")
    arguments = parser.parse_args()

    _, model_path, _ = get_model_path(0, arguments.folder, "lecture_dqn", EnvironmentName(arguments.env))
    model = LectureDQN.load(model_path)
    env = Monitor(gymnasium.make(arguments.env))
    env.reset(seed=arguments.seed)
    returns, _ = evaluate_policy(model, env, n_eval_episodes=arguments.episodes, return_episode_rewards=True)
    print(
        f"{model_path}: mean return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {arguments.episodes} greedy episodes"
    )


if __name__ == "__main__":
    main()
