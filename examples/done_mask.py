"""
L2 and L12: the same task with and without ¬d in the target, against the true value.

::

    python examples/done_mask.py

The task is a corridor of ten states. Every action leads to the next one with r = 1, and behind the tenth the episode ends:
with k states left, Q is 1 + γ + ... + γᵏ⁻¹.
"""

from typing import Any

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from _plots import BLUE, GREY, RED, parse_folder, plot_band, save_picture
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn import LectureDQN

SEEDS = range(5)
LENGTH, STEPS, MEASURE_EVERY, GAMMA = 10, 6_000, 100, 0.95
TRUE_VALUES = (1 - GAMMA ** np.arange(LENGTH, 0, -1)) / (1 - GAMMA)


class Corridor(gymnasium.Env[int, int]):
    """State s leads to s + 1; the state behind the last one is terminal."""

    observation_space = spaces.Discrete(LENGTH + 1)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Back to the first state."""
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """One step along."""
        self.state += 1
        return self.state, 1.0, self.state == LENGTH, False, {}


class WithoutDoneMask(LectureDQN):
    """The break: every d in a batch reads 0, so a target goes on behind the end of the episode."""

    def _sample_batch(self, batch_size: int) -> ReplayBufferSamples:
        batch = super()._sample_batch(batch_size)
        return batch._replace(dones=th.zeros_like(batch.dones))


class WatchValues(BaseCallback):
    """Records max_a Q(s, a, θ) of the ten states."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[np.ndarray] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % MEASURE_EVERY == 0:
            with th.no_grad():
                q_values = self.model.q_net(th.arange(LENGTH)[:, None])
            self.values.append(q_values.max(dim=1).values.numpy())
        return True


def train(algorithm: type[LectureDQN], seed: int) -> np.ndarray:
    """The values over time, shape (n_measurements, LENGTH)."""
    model = algorithm(
        "MlpPolicy",
        Corridor(),
        learning_rate=5e-4,
        learning_starts=100,
        batch_size=64,
        gamma=GAMMA,
        train_freq=20,
        gradient_steps=5,
        target_update_interval=100,
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    )
    watch = WatchValues()
    model.learn(STEPS, callback=watch)
    return np.array(watch.values)


def main() -> None:
    """Train both for several seeds, print how far they end from the truth, draw."""
    folder = parse_folder(__doc__)
    figure, (over_time, at_the_end) = plt.subplots(1, 2, figsize=(10, 4))
    steps = range(MEASURE_EVERY, STEPS + 1, MEASURE_EVERY)
    states = np.arange(LENGTH)
    for name, algorithm, color in (("with ¬d", LectureDQN, BLUE), ("without ¬d", WithoutDoneMask, RED)):
        runs = np.array([train(algorithm, seed) for seed in SEEDS])
        errors = np.abs(runs - TRUE_VALUES).mean(axis=2)
        plot_band(over_time, steps, errors, name, color)
        plot_band(at_the_end, states, runs[:, -1], name, color)
        print(
            f"{name}: after {STEPS} steps Q is {errors[:, -1].mean():.3f} from the true value on average over the states; the "
            f"last state, worth 1, is said to be worth {runs[:, -1, -1].min():.2f} to {runs[:, -1, -1].max():.2f}."
        )
    over_time.set(yscale="log", xlabel="environment steps", ylabel="mean |Q - true value|", title="Error over time")
    at_the_end.plot(states, TRUE_VALUES, "o", color=GREY, label="true value")
    at_the_end.axhline(1 / (1 - GAMMA), color=GREY, linestyle="--", linewidth=1, label="worth of r = 1 for ever")
    at_the_end.set(xlabel="state", ylabel="max Q(s, a)", title=f"Values after {STEPS} steps", ylim=(0, None))
    over_time.legend()
    at_the_end.legend()
    figure.suptitle(f"A corridor of ten states, r = 1 a step, γ = {GAMMA} (median and range of {len(SEEDS)} seeds)")
    save_picture(figure, folder / "done_mask.png")


if __name__ == "__main__":
    main()
