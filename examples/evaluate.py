"""
Play greedy episodes of the latest trained model, in the environment that it was trained in, and print their mean return.

    python examples/evaluate.py --env LunarLander-v2 --episodes 20
"""

import argparse

import numpy as np
import yaml
from _arguments import find_training, integer_at_least
from rl_zoo3.utils import create_test_env, get_saved_hyperparams
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_lecture_dqn import LectureDQN


def main() -> None:
    """Load, play, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="LunarLander-v2", help="environment id")
    parser.add_argument("--episodes", type=integer_at_least(1), default=20, help="number of episodes")
    parser.add_argument("--folder", default="logs", help="the zoo's log folder")
    parser.add_argument("--seed", type=integer_at_least(0), default=1_000_000, help="seed of the first episode")
    arguments = parser.parse_args()

    model_path, settings = find_training(parser, arguments.env, arguments.folder)
    model = LectureDQN.load(model_path)
    # as the zoo's enjoy makes it: with its arguments, wrappers and normalisation
    hyperparams, stats_path = get_saved_hyperparams(str(settings), test_mode=True)
    env_kwargs = yaml.unsafe_load((settings / "args.yml").read_text())["env_kwargs"]
    env = create_test_env(
        arguments.env,
        stats_path=stats_path,
        seed=arguments.seed,
        should_render=False,
        hyperparams=hyperparams,
        env_kwargs=env_kwargs,
    )
    returns, _ = evaluate_policy(model, env, n_eval_episodes=arguments.episodes, return_episode_rewards=True)
    print(
        f"{model_path}: mean return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {arguments.episodes} greedy episodes"
    )


if __name__ == "__main__":
    main()
