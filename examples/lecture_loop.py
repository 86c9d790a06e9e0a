"""
L15: the lecture's train loop in its names, on this package's pieces, until π first returns 475 or more on average over ten
episodes, or the updates are over. It is the slides' line for line, with 64 gradient steps in an update. Their last loop never
sets psi = theta again, though a slide before says to; the line is added.

::

    python examples/lecture_loop.py
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from _plots import BLUE, ORANGE, parse_folder, save_picture
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.optim import Adam

from sb3_lecture_dqn import QNetwork
from sb3_lecture_dqn.lecture_dqn import epsilon_greedy, squared_td_error, td_target

SEEDS = {0: BLUE, 1: ORANGE}
NUM_UPDATES, SOLVED = 300, 475.0  # CartPole counts as solved at a mean return of 475
BUFFER_SIZE, NUM_BATCHES, BATCH_SIZE, GAMMA, EPSILON, LEARNING_RATE = 10_000, 64, 128, 0.98, 0.1, 1e-3

Parameters, Batches = dict[str, th.Tensor], list[ReplayBufferSamples]
Policy = Callable[[np.ndarray], int]
Transition = tuple[np.ndarray, np.ndarray, int, float, bool]


class DeepQ:
    """The package's network as the slides write it: a function Q(s, θ) of its parameters too."""

    def __init__(self, state_space: spaces.Box, action_space: spaces.Discrete) -> None:
        self.make_network = lambda: QNetwork(state_space, action_space, FlattenExtractor(state_space), state_space.shape[0])
        self.network = self.make_network()

    def init(self, seed: int) -> Parameters:
        """Parameters that depend on the seed alone."""
        th.manual_seed(seed)
        return {name: parameter.detach().requires_grad_() for name, parameter in self.make_network().named_parameters()}

    def __call__(self, s: th.Tensor, theta: Parameters) -> th.Tensor:
        """Q(s, ·, θ): one forward pass for all actions."""
        return th.func.functional_call(self.network, theta, (s,), tie_weights=False)  # looking for tied ones takes longer


class Dataset(ReplayBuffer):
    """D with the slides' `+=`."""

    def __iadd__(self, transitions: list[Transition]) -> "Dataset":
        for s, next_s, a, r, d in transitions:
            self.add(s, next_s, np.array([a]), np.array([r]), np.array([d]), [{}])
        return self


def max_q(Q: DeepQ, theta: Parameters) -> Policy:  # noqa: N803
    """π(s) = argmax_a Q(s, a, θ)."""
    return th.inference_mode()(lambda s: int(Q(th.as_tensor(s[None]), theta).argmax()))


def e_greedy(Q: DeepQ, theta: Parameters, generator: np.random.Generator) -> Policy:  # noqa: N803
    """π_E(s): U(A) if u ≤ ε, else π(s)."""
    pi = max_q(Q, theta)
    return lambda s: int(epsilon_greedy(np.array(pi(s)), generator.integers(2), generator.random(), EPSILON))


def collect_training_data(env: gymnasium.Env[Any, Any], pi: Policy) -> list[Transition]:
    """One episode: n + 1 states, n transitions (s, s', a, r, d)."""
    episode, d = [], False
    s, _ = env.reset()
    while not d:
        a = pi(s)
        next_s, r, term, trunc, _ = env.step(a)  # the slide unpacks trunc, term; Gymnasium's order is this one
        d = term or trunc
        episode.append((s, next_s, a, float(r), d))
        s = next_s
    return episode


def train(Q: DeepQ, theta: Parameters, psi: Parameters, train_data: Batches, adam: Adam) -> Parameters:  # noqa: N803
    """min_θ (Q(s, a, θ) − (r + ¬d γ max_a' Q(s', a', ψ)))², a gradient step for each batch."""
    for s, a, next_s, d, r, *_ in train_data:
        with th.no_grad():
            target = td_target(r, d, Q(next_s, psi), GAMMA)
        loss = squared_td_error(Q(s, theta).gather(1, a), target)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return theta


def evaluate(env: gymnasium.Env[Any, Any], pi: Policy, n_episodes: int = 10) -> float:
    """The same as collecting, but with π: its mean return."""
    return float(np.mean([sum(r for _, _, _, r, _ in collect_training_data(env, pi)) for _ in range(n_episodes)]))


def run(seed: int) -> list[float]:
    """The loop of the slides, until an evaluation counts as solved; what π returned after each update."""
    np.random.seed(seed)  # SB3's buffer draws from it
    returns = []
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=seed)
    Q = DeepQ(env.observation_space, env.action_space)  # noqa: N806
    theta, psi = Q.init(seed), Q.init(seed)
    adam = Adam(theta.values(), lr=LEARNING_RATE)
    pi, pi_e = max_q(Q, theta), e_greedy(Q, theta, np.random.default_rng(seed))
    dataset = Dataset(BUFFER_SIZE, env.observation_space, env.action_space, "cpu", handle_timeout_termination=False)

    for _ in range(NUM_UPDATES):
        collected_data = collect_training_data(env, pi_e)
        dataset += collected_data
        train_data = [dataset.sample(BATCH_SIZE) for _ in range(NUM_BATCHES)]
        theta = train(Q, theta, psi, train_data, adam)
        psi = {name: parameter.detach().clone() for name, parameter in theta.items()}
        metrics = evaluate(env, pi)
        returns.append(metrics)
        if metrics >= SOLVED:
            break
    return returns


def main() -> None:
    """Run the loop for every seed, print whether it solved the task, draw."""
    folder = parse_folder(__doc__)
    figure, axes = plt.subplots(figsize=(6.5, 4))
    with ProcessPoolExecutor() as pool:  # a seed on each core
        returns_of_seeds = [*pool.map(run, SEEDS)]
    for (seed, color), returns in zip(SEEDS.items(), returns_of_seeds, strict=True):
        updates = np.arange(1, len(returns) + 1)
        verdict = "solved" if returns[-1] >= SOLVED else "not solved"
        print(f"Seed {seed}: {verdict} after {updates[-1]} updates; π then returns {returns[-1]:.0f}.", flush=True)
        axes.plot(updates, returns, marker=".", color=color, label=f"seed {seed}")
    axes.axhline(SOLVED, color="black", linestyle="--", linewidth=1, label="solved")
    axes.set(xlabel="update (an episode and 64 gradient steps)", ylabel="return of π, mean of ten episodes")
    axes.set_title("The lecture's loop on CartPole")
    axes.legend()
    save_picture(figure, folder / "lecture_loop.png")


if __name__ == "__main__":
    main()
