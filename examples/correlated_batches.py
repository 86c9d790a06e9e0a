"""
L11: batches drawn uniformly from D against the latest transitions in their order, on CartPole.

::

    python examples/correlated_batches.py
"""

from typing import Any

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
from _plots import BLUE, RED, parse_folder, plot_band, save_picture
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn import LectureDQN

SEEDS = range(4)
STEPS, EVALUATE_EVERY, BATCH_SIZE = 5_000, 500, 64


class LatestTransitions(ReplayBuffer):
    """Gives what was stored last, in its order, in the place of a uniform draw."""

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """The same newest transitions for each batch asked for; D does not fill in this run, so it never goes round."""
        newest = np.resize(np.arange(self.pos - BATCH_SIZE, self.pos), batch_size)
        return self._get_samples(newest, env)


class WatchReturn(BaseCallback):
    """Plays three episodes with π now and then."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.env = gymnasium.make("CartPole-v1")
        self.env.reset(seed=1000 + seed)
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % EVALUATE_EVERY == 0:
            self.returns.append(float(evaluate_policy(self.model, self.env, 3, warn=False)[0]))
        return True


def train(replay_buffer_class: type[ReplayBuffer], seed: int) -> list[float]:
    """The mean return of π over time; all but the replay buffer is the same."""
    model = LectureDQN(
        "MlpPolicy",
        gymnasium.make("CartPole-v1"),
        learning_rate=1e-3,
        learning_starts=500,
        batch_size=BATCH_SIZE,
        gradient_steps=2,  # for four steps of the environment
        target_update_interval=100,
        replay_buffer_class=replay_buffer_class,
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    )
    watch = WatchReturn(seed)
    model.learn(STEPS, callback=watch)
    return watch.returns


def main() -> None:
    """Train both for several seeds, print what π returns, draw."""
    folder = parse_folder(__doc__)
    figure, axes = plt.subplots(figsize=(6.5, 4))
    steps = range(EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY)
    for name, replay_buffer_class, color in (
        ("uniform draws from D (the lecture's)", ReplayBuffer, BLUE),
        (f"the latest {BATCH_SIZE} transitions, in order", LatestTransitions, RED),
    ):
        curves = np.array([train(replay_buffer_class, seed) for seed in SEEDS])
        plot_band(axes, steps, curves, name, color)
        second_half = curves[:, len(steps) // 2 :].mean(axis=1)
        print(
            f"{name}: over the second half of {STEPS} steps π returns {second_half.mean():.0f} on average (by seed "
            f"{', '.join(f'{value:.0f}' for value in second_half)}); the most is 500.",
            flush=True,
        )
    axes.set(xlabel="environment steps", ylabel="return of π, mean of 3 episodes", ylim=(0, 510))
    axes.set_title(f"CartPole, {BATCH_SIZE} transitions in a batch (median and range of {len(SEEDS)} seeds)")
    axes.legend(loc="upper left")
    save_picture(figure, folder / "correlated_batches.png")


if __name__ == "__main__":
    main()
