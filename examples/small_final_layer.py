"""
L8: a final layer with weights ~ N(0, 1e-3) and bias 0 makes Q start near 0; PyTorch's own initialisation does not.

::

    python examples/small_final_layer.py

On FrozenLake the optimal values V* are known, by value iteration. No policy gets more than V*, so what max Q says beyond it is
overestimation.
"""

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from _plots import BLUE, GREY, RED, plot_band, save_picture
from stable_baselines3.common.callbacks import BaseCallback

from sb3_lecture_dqn import LectureDQN

SEEDS = range(5)
STEPS, MEASURE_EVERY, GAMMA = 3_000, 50, 0.99
VARIANTS = {"final layer ~ N(0, 1e-3), bias 0 (the lecture's)": (1e-3, BLUE), "PyTorch's own initialisation": (None, RED)}


def optimal_values(env: gymnasium.Env[int, int]) -> np.ndarray:
    """V* of each state of FrozenLake, by value iteration."""
    table = env.unwrapped.P  # type: ignore[attr-defined]
    values = np.zeros(len(table))
    for _ in range(3_000):
        values = np.array(
            [
                max(
                    sum(p * (r + (not d) * GAMMA * values[next_s]) for p, next_s, r, d in outcomes)
                    for outcomes in actions.values()
                )
                for actions in table.values()
            ]
        )
    return values


class WatchOverestimation(BaseCallback):
    """Records max_a Q(s, a, θ) of every state."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[np.ndarray] = []

    def _on_training_start(self) -> None:
        self._measure()

    def _on_step(self) -> bool:
        if self.num_timesteps % MEASURE_EVERY == 0:
            self._measure()
        return True

    def _measure(self) -> None:
        with th.no_grad():
            q_values = self.model.q_net(th.arange(16)[:, None])
        self.values.append(q_values.max(dim=1).values.numpy())


def train(final_layer_std: float | None, seed: int) -> np.ndarray:
    """max_a Q of the 16 states over time, from before the first step on."""
    model = LectureDQN(
        "MlpPolicy",
        gymnasium.make("FrozenLake-v1"),
        learning_starts=100,
        gamma=GAMMA,
        gradient_steps=1,  # for four steps of the environment
        policy_kwargs={"final_layer_std": final_layer_std},
        seed=seed,
        device="cpu",
    )
    watch = WatchOverestimation()
    model.learn(STEPS, callback=watch)
    return np.array(watch.values)


def main() -> None:
    """Train both for several seeds, print and draw how far Q is above the optimal values."""
    env = gymnasium.make("FrozenLake-v1")
    optimal = optimal_values(env)
    is_played = np.array([letter in b"SF" for letter in env.unwrapped.desc.ravel()])  # type: ignore[attr-defined]
    steps = np.arange(0, STEPS + 1, MEASURE_EVERY)
    figure, (at_the_start, over_time) = plt.subplots(1, 2, figsize=(10, 4))
    for name, (final_layer_std, color) in VARIANTS.items():
        values = np.array([train(final_layer_std, seed) for seed in SEEDS])[:, :, is_played]
        at_the_start.hist(values[:, 0].ravel(), bins=np.arange(-0.6, 1.2, 0.05), color=color, alpha=0.6, label=name)
        overestimation = (values - optimal[is_played]).mean(axis=2)
        plot_band(over_time, steps, overestimation, name, color)
        early = steps <= 1_000
        print(
            f"{name}: before training max Q is between {values[:, 0].min():.2f} and {values[:, 0].max():.2f}; "
            f"max Q - V*, mean over states and seeds, is {overestimation[:, 0].mean():+.2f} at first, "
            f"{overestimation[:, early].mean():+.2f} over the first 1000 steps and "
            f"{overestimation[:, -1].mean():+.2f} after {STEPS}.",
            flush=True,
        )
    at_the_start.set(xlabel="max Q(s, a) before training", ylabel=f"states of {len(SEEDS)} seeds", title="At the start")
    over_time.axhline(0, color=GREY, linestyle="--", linewidth=1, label="the optimal values")
    over_time.set(xlabel="environment steps", ylabel="max Q(s, a) - V*(s), mean over s", title="During training")
    over_time.legend()
    figure.suptitle(f"FrozenLake (median and range of {len(SEEDS)} seeds)")
    save_picture(figure, "small_final_layer")


if __name__ == "__main__":
    main()
