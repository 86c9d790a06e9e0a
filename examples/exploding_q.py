"""
L14: what Q grows to with and without the target network ψ, and with and without LayerNorm, against what it can be.

::

    python examples/exploding_q.py

CartPole gives r = 1 a step, so no Q value can be above 1 / (1 - γ) = 100. Without ψ means ψ = θ at every gradient step; with
ψ, it is set 26 times, so that Q can come to 24 at most by honest means. The dots are what π really collects at the end, for
each seed.
"""

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from _plots import BLUE, GREEN, GREY, ORANGE, RED, parse_folder, plot_band, save_picture
from stable_baselines3.common.callbacks import BaseCallback

from sb3_lecture_dqn import LectureDQN

SEEDS = range(3)
STEPS = 1_500
TARGET_UPDATE_INTERVAL = 50
LEARNING_STARTS = 200
MEASURE_EVERY = 50
LEARNING_RATE = 5e-4
LARGEST_RETURN = 100.0
VARIANTS = {
    "ψ and LayerNorm (the lecture's)": (True, True, BLUE),
    "ψ, no LayerNorm": (True, False, GREEN),
    "no ψ, LayerNorm": (False, True, ORANGE),
    "no ψ, no LayerNorm": (False, False, RED),
}


class WatchQ(BaseCallback):
    """Records the largest Q(s, a, θ) over the latest 500 states of D."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[float] = []

    def _on_step(self) -> bool:
        if self.num_timesteps >= LEARNING_STARTS and self.num_timesteps % MEASURE_EVERY == 0:
            model = self.model
            assert isinstance(model, LectureDQN)
            assert model.replay_buffer is not None
            newest = self.num_timesteps - 1
            states = th.as_tensor(model.replay_buffer.observations[max(newest - 500, 0) : newest, 0])
            with th.no_grad():
                self.largest.append(float(model.q_net(states).max()))
        return True


def train(has_target: bool, has_layer_norm: bool, seed: int) -> tuple[list[float], float]:
    """The largest Q value over time of one run, and the mean discounted return of its greedy policy at the end."""
    model = LectureDQN(
        "MlpPolicy",
        gymnasium.make("CartPole-v1"),
        learning_rate=LEARNING_RATE,
        learning_starts=LEARNING_STARTS,
        batch_size=128,
        train_freq=1,
        gradient_steps=1,
        target_update_interval=TARGET_UPDATE_INTERVAL if has_target else 1,
        policy_kwargs={"layer_norm": has_layer_norm},
        seed=seed,
        device="cpu",
    )
    watch = WatchQ()
    model.learn(STEPS, callback=watch)
    return watch.largest, discounted_return(model)


def discounted_return(model: LectureDQN, n_episodes: int = 5) -> float:
    """What π collects from the first state on, mean over some episodes."""
    env = gymnasium.make("CartPole-v1")
    returns = []
    for episode in range(n_episodes):
        state, _ = env.reset(seed=1000 + episode)
        n_steps, done = 0, False
        while not done:
            action, _ = model.predict(state, deterministic=True)
            state, _, terminated, truncated, _ = env.step(int(action))
            n_steps, done = n_steps + 1, terminated or truncated
        returns.append((1 - model.gamma**n_steps) / (1 - model.gamma))
    return float(np.mean(returns))


def main() -> None:
    """Train every variant for several seeds, print what its Q grew to, draw."""
    folder = parse_folder(__doc__)
    figure, axes = plt.subplots(figsize=(7, 4.2))
    steps = np.arange(LEARNING_STARTS, STEPS + 1, MEASURE_EVERY)
    for position, (name, (has_target, has_layer_norm, color)) in enumerate(VARIANTS.items()):
        curves, returns = zip(*(train(has_target, has_layer_norm, seed) for seed in SEEDS), strict=True)
        line = plot_band(axes, steps, curves, name, color)
        if has_target and has_layer_norm:
            line.set(linestyle="--", zorder=3)  # else the line without LayerNorm would hide it
        axes.plot([STEPS + 30 * (position + 1)] * len(SEEDS), returns, ".", color=color)
        peaks = [max(curve) for curve in curves]
        n_exploded = sum(peak > LARGEST_RETURN for peak in peaks)
        print(
            f"{name}: the largest Q came to {', '.join(f'{peak:.3g}' for peak in peaks)} (one number for each seed), in "
            f"{n_exploded} of {len(SEEDS)} runs above 100; at the end π collects {', '.join(f'{r:.3g}' for r in returns)}.",
            flush=True,
        )
    axes.plot([], [], ".", color=GREY, label="discounted return of π at the end")
    axes.axhline(LARGEST_RETURN, color=GREY, linestyle=":", label="largest possible return, 1 / (1 - γ) = 100")
    axes.set(xlabel="environment steps = gradient steps", xticks=range(250, STEPS + 1, 250))
    axes.set(ylabel="largest Q of the newest 500 states", yscale="log", ylim=(1, None))
    axes.set_title(f"CartPole, learning rate {LEARNING_RATE:g} (median and range of {len(SEEDS)} seeds)")
    axes.legend()
    save_picture(figure, folder / "exploding_q.png")


if __name__ == "__main__":
    main()
