"""
L8: a final layer whose weights have a standard deviation of 1e-3, and bias 0, makes Q start near 0; PyTorch's own does not.

::

    python examples/small_final_layer.py

Overestimation is what max Q says beyond what its own greedy policy π really collects. On FrozenLake that is known: the value
of π solves the linear system V = r + γ T V.
"""

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from _plots import BLUE, GREY, RED, parse_folder, plot_band, save_picture
from stable_baselines3.common.callbacks import BaseCallback

from sb3_lecture_dqn import LectureDQN

SEEDS = range(5)
STEPS, MEASURE_EVERY, GAMMA = 3_000, 50, 0.99
VARIANTS = {
    "standard deviation 1e-3, bias 0 (the lecture's)": (1e-3, BLUE),
    "PyTorch's own initialisation": (None, RED),
}


def tables() -> tuple[np.ndarray, np.ndarray]:
    """T(s' | s, a) up to the end of an episode, shape (|S|, |A|, |S|), and the expected reward, shape (|S|, |A|)."""
    going_on, rewards = np.zeros((16, 4, 16)), np.zeros((16, 4))
    for s, actions in gymnasium.make("FrozenLake-v1").unwrapped.P.items():  # type: ignore[attr-defined]
        for a, outcomes in actions.items():
            for probability, next_s, reward, done in outcomes:
                going_on[s, a, next_s] += probability * (not done)
                rewards[s, a] += probability * reward
    return going_on, rewards


GOING_ON, REWARDS = tables()


class WatchOverestimation(BaseCallback):
    """Records max_a Q(s, a, θ) of every state, and the exact value of π there."""

    def __init__(self) -> None:
        super().__init__()
        self.claimed: list[np.ndarray] = []
        self.collected: list[np.ndarray] = []

    def _on_training_start(self) -> None:
        self._measure()

    def _on_step(self) -> bool:
        if self.num_timesteps % MEASURE_EVERY == 0:
            self._measure()
        return True

    def _measure(self) -> None:
        states = np.arange(16)
        with th.no_grad():
            q_values = self.model.q_net(th.as_tensor(states)[:, None]).numpy()
        actions = q_values.argmax(axis=1)
        self.claimed.append(q_values.max(axis=1))
        self.collected.append(np.linalg.solve(np.eye(16) - GAMMA * GOING_ON[states, actions], REWARDS[states, actions]))


def train(final_layer_std: float | None, seed: int) -> np.ndarray:
    """max_a Q and the value of π over time, from before the first step on, shape (2, n_measurements, 16)."""
    model = LectureDQN(
        "MlpPolicy",
        gymnasium.make("FrozenLake-v1"),
        learning_rate=5e-4,
        learning_starts=100,
        batch_size=128,
        gamma=GAMMA,
        gradient_steps=1,  # for four steps of the environment
        target_update_interval=250,
        policy_kwargs={"final_layer_std": final_layer_std},
        seed=seed,
        device="cpu",
    )
    watch = WatchOverestimation()
    model.learn(STEPS, callback=watch)
    return np.array([watch.claimed, watch.collected])


def main() -> None:
    """Train both for several seeds, print and draw how far Q is above what π collects."""
    folder = parse_folder(__doc__)
    is_played = GOING_ON.sum(axis=(1, 2)) > 0  # neither a hole nor the goal
    steps = np.arange(0, STEPS + 1, MEASURE_EVERY)
    figure, (at_the_start, over_time) = plt.subplots(1, 2, figsize=(10, 4))
    for name, (final_layer_std, color) in VARIANTS.items():
        runs = np.array([train(final_layer_std, seed) for seed in SEEDS])[..., is_played]
        claimed, collected = runs[:, 0], runs[:, 1]
        at_the_start.hist(claimed[:, 0].ravel(), bins=np.arange(-0.6, 1.2, 0.05), color=color, alpha=0.6, label=name)
        overestimation = (claimed - collected).mean(axis=2)
        plot_band(over_time, steps, overestimation, name, color)
        early = steps <= 1_000
        print(
            f"{name}: before training max Q is between {claimed[:, 0].min():.2f} and {claimed[:, 0].max():.2f}; "
            f"max Q - V of π, mean over states and seeds, is {overestimation[:, 0].mean():+.2f} at first, "
            f"{overestimation[:, early].mean():+.2f} over the first 1000 steps and "
            f"{overestimation[:, -1].mean():+.2f} after {STEPS}; single seeds lie between {overestimation.min():+.2f} and "
            f"{overestimation.max():+.2f}.",
            flush=True,
        )
    at_the_start.set(xlabel="max Q(s, a) before training", ylabel=f"states of {len(SEEDS)} seeds", title="At the start")
    over_time.axhline(0, color=GREY, linestyle="--", linewidth=1, label="what π collects")
    over_time.set(xlabel="environment steps", ylabel="max Q(s, a) - V of π, mean over s", title="During training")
    over_time.set_ylim(top=1.1)  # room for the legend
    over_time.legend()
    figure.suptitle(f"FrozenLake (median and range of {len(SEEDS)} seeds)")
    save_picture(figure, folder / "small_final_layer.png")


if __name__ == "__main__":
    main()
