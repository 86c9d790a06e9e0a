"""
The lecture's DQN once more, in numpy and float64, for the tests alone.

It shares no code with the package, PyTorch or Stable-Baselines3: forward and backward pass, Adam, ring buffer, ε-greedy,
target network and train loop are written out from the slides. Only what the two sides must have in common is common: the first
parameters, and the random draws (:class:`Draws`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np

LEAKY_SLOPE = 0.01
LAYER_NORM_EPSILON = 1e-5


class Draws:
    """
    One stream of random numbers for each purpose, so that it does not matter in which order the purposes take theirs.

    ``random`` and ``integers`` have the form of ``numpy.random.Generator``.
    """

    def __init__(self, seed: int) -> None:
        self._coins, self._actions, self._rows, self._columns = (np.random.default_rng([seed, i]) for i in range(4))

    def random(self, size: int) -> np.ndarray:
        return self._coins.random(size)

    def integers(self, high: int, size: int) -> np.ndarray:
        return self._actions.integers(high, size=size)

    def positions(self, n_rows: int, n_envs: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in D the transitions of a batch stand: B ~ U(D)."""
        return self._rows.integers(n_rows, size=batch_size), self._columns.integers(n_envs, size=batch_size)


class Batch(NamedTuple):
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    dones: np.ndarray


def forward(parameters: list[np.ndarray], observations: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Q(s, ·), and what the backward pass needs: [Linear → LayerNorm → LeakyReLU] × 2 → Linear."""
    cache: list[Any] = []
    inputs = observations.astype(np.float64)
    for layer in range(2):
        weight, bias, scale, shift = parameters[4 * layer : 4 * layer + 4]
        linear = inputs @ weight.T + bias
        mean = linear.mean(axis=1, keepdims=True)
        deviation = np.sqrt(((linear - mean) ** 2).mean(axis=1, keepdims=True) + LAYER_NORM_EPSILON)
        normalized = (linear - mean) / deviation
        scaled = scale * normalized + shift
        cache.append((inputs, normalized, deviation, scaled))
        inputs = np.where(scaled > 0, scaled, LEAKY_SLOPE * scaled)
    cache.append(inputs)
    return inputs @ parameters[8].T + parameters[9], cache


def backward(parameters: list[np.ndarray], cache: list[Any], d_q_values: np.ndarray) -> list[np.ndarray]:
    """The gradient of a loss with respect to the parameters, from its gradient with respect to Q(s, ·)."""
    gradients = [d_q_values.T @ cache[2], d_q_values.sum(axis=0)]
    d_outputs = d_q_values @ parameters[8]
    for layer in (1, 0):
        weight, _, scale, _ = parameters[4 * layer : 4 * layer + 4]
        inputs, normalized, deviation, scaled = cache[layer]
        d_scaled = d_outputs * np.where(scaled > 0, 1.0, LEAKY_SLOPE)
        d_normalized = d_scaled * scale
        d_linear = d_normalized - d_normalized.mean(axis=1, keepdims=True)
        d_linear = (d_linear - normalized * (d_normalized * normalized).mean(axis=1, keepdims=True)) / deviation
        of_layer = [d_linear.T @ inputs, d_linear.sum(axis=0), (d_scaled * normalized).sum(axis=0), d_scaled.sum(axis=0)]
        gradients = of_layer + gradients
        d_outputs = d_linear @ weight
    return gradients


def squared_error_gradient(
    theta: list[np.ndarray], psi: list[np.ndarray], batch: Batch, gamma: float
) -> tuple[float, list[np.ndarray]]:
    """The loss (L12), mean over B of (Q(s, a, θ) − (r + ¬d γ max Q(s', a', ψ)))², and its gradient."""
    next_q_values, _ = forward(psi, batch.next_observations)
    targets = batch.rewards + np.where(batch.dones, 0.0, gamma * next_q_values.max(axis=1))
    q_values, cache = forward(theta, batch.observations)
    rows = np.arange(len(batch.actions))
    errors = q_values[rows, batch.actions] - targets
    d_q_values = np.zeros_like(q_values)
    d_q_values[rows, batch.actions] = 2 * errors / len(rows)
    return float(np.mean(errors**2)), backward(theta, cache, d_q_values)


class Adam:
    """Adam (Kingma and Ba, 2015, algorithm 1)."""

    def __init__(self, parameters: list[np.ndarray], learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.step_count = 0
        self.first_moments = [np.zeros_like(parameter) for parameter in parameters]
        self.second_moments = [np.zeros_like(parameter) for parameter in parameters]

    def step(self, parameters: list[np.ndarray], gradients: list[np.ndarray]) -> list[np.ndarray]:
        self.step_count += 1
        self.first_moments = [0.9 * m + 0.1 * g for m, g in zip(self.first_moments, gradients, strict=True)]
        self.second_moments = [0.999 * v + 0.001 * g**2 for v, g in zip(self.second_moments, gradients, strict=True)]
        first_correction = 1 - 0.9**self.step_count
        second_correction = 1 - 0.999**self.step_count
        return [
            parameter - self.learning_rate * (m / first_correction) / (np.sqrt(v / second_correction) + 1e-8)
            for parameter, m, v in zip(parameters, self.first_moments, self.second_moments, strict=True)
        ]


class RingBuffer:
    """D: rows of transitions, one column for each environment; the oldest row is written over first."""

    def __init__(self, n_rows: int, n_envs: int, observation_size: int) -> None:
        self.observations = np.zeros((n_rows, n_envs, observation_size), np.float32)
        self.next_observations = np.zeros_like(self.observations)
        self.actions = np.zeros((n_rows, n_envs), int)
        self.rewards = np.zeros((n_rows, n_envs))
        self.dones = np.zeros((n_rows, n_envs), bool)
        self.n_added = 0

    def __len__(self) -> int:
        return min(self.n_added, len(self.actions))

    def add(self, column: int, transition: tuple[np.ndarray, int, float, np.ndarray, bool]) -> None:
        position = self.n_added % len(self.actions), column
        arrays = (self.observations, self.actions, self.rewards, self.next_observations, self.dones)
        for array, value in zip(arrays, transition, strict=True):
            array[position] = value

    def batch(self, positions: tuple[np.ndarray, np.ndarray]) -> Batch:
        return Batch(
            self.observations[positions],
            self.actions[positions],
            self.rewards[positions],
            self.next_observations[positions],
            self.dones[positions],
        )


@dataclass
class Settings:
    """What both sides are told. Steps are those of all environments together where it says so."""

    gamma: float = 0.99
    learning_rate: float = 5e-4
    batch_size: int = 32
    train_freq: int = 4  # steps of each environment
    gradient_steps: int = 4
    target_update_interval: int = 30  # steps of all environments together
    buffer_size: int = 600  # transitions
    exploration_fraction: float = 0.5
    exploration_final_eps: float = 0.05


class NumpyDQN:
    """The lecture's train loop (L15)."""

    def __init__(self, theta: Iterable[np.ndarray], settings: Settings, draws: Draws) -> None:
        self.theta = [parameter.astype(np.float64) for parameter in theta]
        self.psi = self.theta
        self.settings = settings
        self.draws = draws
        self.optimizer = Adam(self.theta, settings.learning_rate)
        self.exploration_rate = 1.0

    def update(self, batch: Batch) -> float:
        """One gradient step on θ."""
        loss, gradients = squared_error_gradient(self.theta, self.psi, batch, self.settings.gamma)
        self.theta = self.optimizer.step(self.theta, gradients)
        return loss

    def sync(self) -> None:
        # No parameter is ever changed in place, so ψ may be θ itself.
        self.psi = self.theta

    def explore(self, observations: np.ndarray) -> np.ndarray:
        """π_E: each environment draws its own u."""
        q_values, _ = forward(self.theta, observations)
        u = self.draws.random(len(observations))
        actions = self.draws.integers(q_values.shape[1], size=len(observations))
        return np.array(
            [a if x <= self.exploration_rate else np.argmax(q) for x, a, q in zip(u, actions, q_values, strict=True)]
        )

    def learn(self, envs: list[gymnasium.Env[Any, Any]], total_timesteps: int, seed: int) -> None:
        settings, n_envs = self.settings, len(envs)
        states = [env.reset(seed=seed + column)[0] for column, env in enumerate(envs)]
        self.replay_buffer = RingBuffer(settings.buffer_size // n_envs, n_envs, len(states[0]))
        for step in range(1, total_timesteps // n_envs + 1):
            actions = self.explore(np.stack(states))
            for column, (env, action) in enumerate(zip(envs, actions, strict=True)):
                next_state, reward, terminated, truncated, _ = env.step(action)
                done = terminated or truncated
                self.replay_buffer.add(column, (states[column], action, float(reward), next_state, done))
                states[column] = env.reset()[0] if done else next_state
            self.replay_buffer.n_added += 1
            self.anneal(step * n_envs / total_timesteps)
            if step % (settings.target_update_interval // n_envs) == 0:
                self.sync()
            if step % settings.train_freq == 0:
                for _ in range(settings.gradient_steps):
                    positions = self.draws.positions(len(self.replay_buffer), n_envs, settings.batch_size)
                    self.update(self.replay_buffer.batch(positions))

    def anneal(self, progress: float) -> None:
        """ε falls in a straight line from 1 to its last value, and stays there."""
        share = min(progress / self.settings.exploration_fraction, 1.0)
        self.exploration_rate = 1.0 + share * (self.settings.exploration_final_eps - 1.0)
