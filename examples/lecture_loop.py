"""
L15: the lecture's train loop, line for line and in its names, on top of this package's pieces. It solves CartPole.

::

    python examples/lecture_loop.py
"""

from collections.abc import Callable
from typing import Any

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from _plots import BLUE, GREY, ORANGE, save_picture
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn import QNetwork
from sb3_lecture_dqn.lecture_dqn import epsilon_greedy, squared_td_error, td_target

SEEDS = range(3)
NUM_UPDATES, SOLVED = 300, 475.0  # CartPole counts as solved at a mean return of 475
BATCHES, BATCH_SIZE, GAMMA, LEARNING_RATE = 50, 64, 0.99, 1e-3

Parameters = dict[str, th.Tensor]
Policy = Callable[[np.ndarray], int]
Transition = tuple[np.ndarray, np.ndarray, int, float, bool]


class DeepQ:
    """The package's network as the slides write it: a function Q(s, θ) of its parameters too."""

    def __init__(self, state_space: spaces.Box, action_space: spaces.Discrete) -> None:
        self.make_network = lambda: QNetwork(state_space, action_space, FlattenExtractor(state_space), state_space.shape[0])
        self.network = self.make_network()
        self.n_actions = int(action_space.n)

    def init(self, seed: int) -> Parameters:
        th.manual_seed(seed)
        return {name: parameter.detach().requires_grad_() for name, parameter in self.make_network().named_parameters()}

    def __call__(self, s: th.Tensor, theta: Parameters) -> th.Tensor:
        q_values: th.Tensor = th.func.functional_call(self.network, theta, (s,))
        return q_values


class Dataset(ReplayBuffer):
    """D with the slides' `+=` and `sample()`, which draws several batches: an episode gives data for more than one."""

    def __iadd__(self, transitions: list[Transition]) -> "Dataset":
        for s, next_s, a, r, d in transitions:
            self.add(s, next_s, np.array([a]), np.array([r]), np.array([d]), [{}])
        return self

    def sample(self) -> list[ReplayBufferSamples]:  # type: ignore[override]
        return [super(Dataset, self).sample(BATCH_SIZE) for _ in range(BATCHES)]


def max_q(Q: DeepQ, theta: Parameters) -> Policy:  # noqa: N803
    """π(s) = argmax_a Q(s, a, θ)."""

    def pi(s: np.ndarray) -> int:
        with th.no_grad():
            return int(Q(th.as_tensor(s[None]), theta).argmax())

    return pi


def e_greedy(Q: DeepQ, theta: Parameters, epsilon: Callable[[], float], seed: int) -> Policy:  # noqa: N803
    """π_E(s): U(A) if u ≤ ε, else π(s)."""
    pi, generator = max_q(Q, theta), np.random.default_rng(seed)

    def pi_e(s: np.ndarray) -> int:
        greedy, random, u = np.array([pi(s)]), generator.integers(Q.n_actions, size=1), generator.random(1)
        return int(epsilon_greedy(greedy, random, u, epsilon())[0])

    return pi_e


def collect_training_data(env: gymnasium.Env[Any, Any], pi: Policy) -> list[Transition]:
    """One episode: n + 1 states, n transitions (s, s', a, r, d)."""
    episode = []
    s, _ = env.reset()
    d = False
    while not d:
        a = pi(s)
        next_s, r, term, trunc, _ = env.step(a)  # the slide unpacks trunc, term; Gymnasium's order is this one
        d = term or trunc
        episode.append((s, next_s, a, float(r), d))
        s = next_s
    return episode


def train(
    Q: DeepQ,
    theta: Parameters,
    psi: Parameters,
    train_data: list[ReplayBufferSamples],
    optimizer: th.optim.Optimizer,  # noqa: N803
) -> Parameters:
    """min_θ (Q(s, a, θ) − (r + ¬d γ max_a' Q(s', a', ψ)))², a gradient step for each batch."""
    for s, a, next_s, d, r, *_ in train_data:
        with th.no_grad():
            target = td_target(r, d, Q(next_s, psi), GAMMA)
        loss = squared_td_error(Q(s, theta).gather(1, a), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta


def evaluate(env: gymnasium.Env[Any, Any], pi: Policy) -> float:
    """The same as collecting, but with π."""
    return sum(r for _, _, _, r, _ in collect_training_data(env, pi))


def run(seed: int) -> list[float]:
    """The loop of the slides, until the last ten evaluations count as solved; the return of π after each update."""
    np.random.seed(seed)  # SB3's buffer draws from it
    metrics: list[float] = []

    env = gymnasium.make("CartPole-v1")
    env.reset(seed=seed)
    Q = DeepQ(env.observation_space, env.action_space)  # noqa: N806
    theta, psi = Q.init(seed), Q.init(seed)
    optimizer = th.optim.Adam(theta.values(), lr=LEARNING_RATE)
    pi, pi_e = max_q(Q, theta), e_greedy(Q, theta, lambda: max(0.05, 1 - len(metrics) / 50), seed)
    dataset = Dataset(50_000, env.observation_space, env.action_space, "cpu", handle_timeout_termination=False)

    for _update in range(NUM_UPDATES):
        collected_data = collect_training_data(env, pi_e)
        dataset += collected_data
        train_data = dataset.sample()
        theta = train(Q, theta, psi, train_data, optimizer)
        psi = {name: parameter.detach().clone() for name, parameter in theta.items()}
        metrics.append(evaluate(env, pi))
        if np.mean(metrics[-10:]) >= SOLVED:
            break
    return metrics


if __name__ == "__main__":
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for seed, color in zip(SEEDS, (BLUE, ORANGE, GREY), strict=True):
        metrics = run(seed)
        last = float(np.mean(metrics[-10:]))
        print(
            f"Seed {seed}: π returns {last:.0f} on average after {len(metrics)} updates: {'' if last >= SOLVED else 'not '}solved."
        )
        axes.plot(range(1, len(metrics) + 1), metrics, color=color, label=f"seed {seed}")
    axes.axhline(SOLVED, color="black", linestyle="--", linewidth=1, label="solved, in the mean of ten")
    axes.set(xlabel="update (one collected episode, 50 gradient steps)", ylabel="return of π, one episode")
    axes.set_title("The lecture's loop on CartPole")
    axes.legend()
    save_picture(figure, "lecture_loop")
