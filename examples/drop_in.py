"""
A script for Stable-Baselines3's DQN, with one import changed.

::

    python examples/drop_in.py
"""

import tempfile
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
from _plots import BLUE, GREY, parse_folder, save_picture
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

# from stable_baselines3 import DQN
from sb3_lecture_dqn import LectureDQN as DQN  # noqa: N814

STEPS = 50_000
images = parse_folder(__doc__)

env = Monitor(gymnasium.make("CartPole-v1"))
model = DQN("MlpPolicy", env, verbose=0, seed=0)
model.learn(total_timesteps=STEPS, log_interval=4)

with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "dqn_cartpole")
    del model  # remove to demonstrate saving and loading
    model = DQN.load(Path(folder) / "dqn_cartpole")

test_env = Monitor(gymnasium.make("CartPole-v1"))
test_env.reset(seed=1000)
mean, std = evaluate_policy(model, test_env, n_eval_episodes=20)
print(f"After {STEPS} steps with the defaults, saved and loaded: {mean:.0f} ± {std:.0f} over 20 greedy episodes (one seed).")

returns = np.array(env.get_episode_rewards())
steps = np.cumsum(env.get_episode_lengths())
figure, axes = plt.subplots(figsize=(6.5, 4))
axes.plot(steps, returns, ".", color=GREY, alpha=0.5, label="an episode")
window = np.ones(10) / 10
axes.plot(steps[9:], np.convolve(returns, window, mode="valid"), color=BLUE, label="mean of ten")
axes.set(xlabel="environment steps", ylabel="return of π_E while training", title="CartPole, LectureDQN's defaults, seed 0")
axes.legend()
save_picture(figure, images / "drop_in.png")
