"""
L9: uniform exploration against ε-greedy exploration on a long chain: states visited, and the time to the first reward.

::

    python examples/exploration.py

Left or right in twenty states, from the left end; the goal is behind the right end, and an episode ends there. In one task it
gives the only reward. In the other each step to the right gives a little one (and each step back takes it away), so that Q can
know a promising direction before the goal was ever seen.
"""

from typing import Any

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
from _plots import BLUE, ORANGE, parse_folder, save_picture
from gymnasium import spaces

from sb3_lecture_dqn import LectureDQN

SEEDS = range(8)
LENGTH, STEPS = 20, 2_000
POLICIES = {"uniform (ε = 1)": (1.0, ORANGE), "ε-greedy (ε from 1 to 0.1)": (0.1, BLUE)}


class Chain(gymnasium.Env[int, int]):
    """Records where it has been, and when the goal was reached first."""

    observation_space = spaces.Discrete(LENGTH)
    action_space = spaces.Discrete(2)

    def __init__(self, has_small_rewards: bool) -> None:
        self.has_small_rewards = has_small_rewards
        self.visits: list[int] = []
        self.first_goal: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Back to the first state."""
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """One step along."""
        next_state = max(self.state + (1 if action == 1 else -1), 0)
        at_goal = next_state == LENGTH
        reward = 1.0 if at_goal else 0.1 * (next_state - self.state) * self.has_small_rewards
        self.state = min(next_state, LENGTH - 1)
        self.visits.append(self.state)
        if at_goal and self.first_goal is None:
            self.first_goal = len(self.visits)
        return self.state, reward, at_goal, False, {}


def explore(has_small_rewards: bool, final_epsilon: float, seed: int) -> Chain:
    """One run; a policy that is uniform to the end need not learn."""
    chain = Chain(has_small_rewards)
    model = LectureDQN(
        "MlpPolicy",
        chain,
        learning_rate=5e-4,
        learning_starts=STEPS if final_epsilon == 1 else 100,
        batch_size=64,
        gradient_steps=1,
        target_update_interval=50,
        exploration_fraction=0.25,
        exploration_final_eps=final_epsilon,
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    )
    model.learn(STEPS)
    return chain


def main() -> None:
    """Explore both chains by both policies, print when the goal was found, draw where they went."""
    folder = parse_folder(__doc__)
    figure, panels = plt.subplots(2, 2, figsize=(10, 6), sharex="col")
    for row, (task, has_small_rewards) in enumerate(
        (("a reward at the goal alone", False), ("small rewards on the way", True))
    ):
        visited, first = panels[row]
        for position, (name, (final_epsilon, color)) in enumerate(POLICIES.items()):
            chains = [explore(has_small_rewards, final_epsilon, seed) for seed in SEEDS]
            shares = np.array([np.bincount(chain.visits, minlength=LENGTH) / STEPS for chain in chains])
            visited.plot(range(LENGTH), shares.mean(axis=0), color=color, label=name)
            visited.fill_between(range(LENGTH), shares.min(axis=0), shares.max(axis=0), color=color, alpha=0.2, linewidth=0)
            times = [chain.first_goal or STEPS for chain in chains]
            found = sum(chain.first_goal is not None for chain in chains)
            first.plot(times, np.full(len(times), position), "o", color=color, alpha=0.6)
            first.plot(np.median(times), position, "|", color=color, markersize=30, markeredgewidth=3)
            n_states = [len(set(chain.visits)) for chain in chains]
            far = shares[:, LENGTH // 2 :].sum(axis=1).mean()
            print(
                f"{task}, {name}: {found} of {len(SEEDS)} runs found the goal, first after {np.median(times):.0f} steps "
                f"(median; {STEPS} where not); {np.mean(n_states):.1f} of {LENGTH} states were visited; {far:.0%} of the "
                "steps ended in the right half.",
                flush=True,
            )
        visited.set(yscale="log", ylabel="share of the steps", title=f"Where the steps went: {task}")
        first.set_title(f"Steps to the first goal: {task}")
        first.set(yticks=range(2), yticklabels=["uniform", "ε-greedy"], ylim=(-0.6, 1.6), xlim=(0, STEPS * 1.03))
    panels[0, 0].legend()
    panels[1, 0].set(xlabel="state", xticks=range(0, LENGTH, 5))
    panels[1, 1].set_xlabel(f"environment steps ({STEPS}: never)")
    figure.suptitle(f"A chain of {LENGTH} states, {len(SEEDS)} seeds (left: mean and range; right: each seed, and the median)")
    save_picture(figure, folder / "exploration.png")


if __name__ == "__main__":
    main()
