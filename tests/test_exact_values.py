"""
Markov decision processes whose optimal Q is known: LectureDQN finds it, and the greedy policy on it is optimal.

Tolerance. After k target updates the values are still γᵏ |Q*| away from Q*, whatever the network does, and Adam with a falling
learning rate fits the targets of one update to about 1e-3. Each run below has a k for which the sum is well under its stated
tolerance. The states are numbered, and SB3 feeds a number to the network as a one-hot vector.
"""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.logger import configure

from sb3_lecture_dqn import LectureDQN

TOLERANCE = 0.01
# The 2 x 256 network of L6 finds the same values; this one does it in less time.
SMALL_NETWORK: dict[str, Any] = {"net_arch": [64, 64]}


class TabularMDP(gymnasium.Env[int, int]):
    """
    A Markov decision process given by its tables.

    :param transition_probabilities: T(s' | s, a), shape (|S|, |A|, |S|)
    :param rewards: Reward of (s, a, s'), the same shape
    :param terminal: Whether (s, a, s') ends the episode, the same shape
    """

    def __init__(self, transition_probabilities: np.ndarray, rewards: np.ndarray, terminal: np.ndarray) -> None:
        self.transition_probabilities = transition_probabilities
        self.rewards = rewards
        self.terminal = terminal
        n_states, n_actions, _ = transition_probabilities.shape
        self.observation_space = spaces.Discrete(n_states)
        self.action_space = spaces.Discrete(n_actions)
        self.state = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        probabilities = self.transition_probabilities[self.state, action]
        next_state = int(self.np_random.choice(len(probabilities), p=probabilities))
        transition = (self.state, action, next_state)
        self.state = next_state
        return next_state, float(self.rewards[transition]), bool(self.terminal[transition]), False, {}


def empty_mdp(n_states: int, n_actions: int) -> TabularMDP:
    shape = (n_states, n_actions, n_states)
    return TabularMDP(np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool))


def add_transition(mdp: TabularMDP, state: int, action: int, next_state: int, reward: float, terminal: bool = False) -> None:
    transition = (state, action, next_state)
    mdp.transition_probabilities[transition] = 1.0
    mdp.rewards[transition] = reward
    mdp.terminal[transition] = terminal


def chain(n_states: int) -> TabularMDP:
    """Left and right; beyond the right end lies the goal, with the only reward."""
    mdp = empty_mdp(n_states, 2)
    for state in range(n_states):
        add_transition(mdp, state, 0, max(state - 1, 0), 0.0)
        at_the_end = state == n_states - 1
        add_transition(mdp, state, 1, min(state + 1, n_states - 1), float(at_the_end), at_the_end)
    return mdp


def ring(n_states: int) -> TabularMDP:
    """Whatever the action, on to the next state with r = 1, for ever."""
    mdp = empty_mdp(n_states, 2)
    for state in range(n_states):
        for action in range(2):
            add_transition(mdp, state, action, (state + 1) % n_states, 1.0)
    return mdp


def frozen_lake() -> TabularMDP:
    """Gymnasium's slippery 4 x 4 lake."""
    table = gymnasium.make("FrozenLake-v1").unwrapped.P  # type: ignore[attr-defined]
    mdp = empty_mdp(16, 4)
    for state, actions in table.items():
        for action, outcomes in actions.items():
            for probability, next_state, reward, terminal in outcomes:
                transition = (state, action, next_state)
                mdp.transition_probabilities[transition] += probability
                mdp.rewards[transition] = reward
                mdp.terminal[transition] = terminal
    return mdp


def random_mdp(n_states: int, n_actions: int, seed: int) -> TabularMDP:
    """
    The first draw in which the best action of each state is ahead of the second by more than two tolerances.

    Probabilities are multiples of 1/8, a tenth of the transitions is terminal, rewards are N(0, 1).
    """
    generator = np.random.default_rng(seed)
    while True:
        probabilities = generator.multinomial(8, np.full(n_states, 1 / n_states), size=(n_states, n_actions)) / 8
        rewards = generator.normal(size=probabilities.shape)
        terminal = generator.random(probabilities.shape) < 0.1
        mdp = TabularMDP(probabilities, rewards, terminal)
        best = np.sort(optimal_q_values(mdp, gamma=0.9), axis=1)
        if np.min(best[:, -1] - best[:, -2]) > 2 * TOLERANCE:
            return mdp


def optimal_q_values(mdp: TabularMDP, gamma: float) -> np.ndarray:
    """Q* by value iteration in float64, to the last digit."""
    q_values = np.zeros(mdp.rewards.shape[:2])
    while True:
        targets = mdp.rewards + ~mdp.terminal * gamma * q_values.max(axis=1)
        new_q_values = (mdp.transition_probabilities * targets).sum(axis=2)
        if np.max(np.abs(new_q_values - q_values)) < 1e-14:
            return new_q_values
        q_values = new_q_values


def values_of_policy(mdp: TabularMDP, actions: np.ndarray, gamma: float) -> np.ndarray:
    """V of a deterministic policy, from the linear system V = r + γ P V."""
    states = np.arange(len(actions))
    probabilities = mdp.transition_probabilities[states, actions]
    rewards = (probabilities * mdp.rewards[states, actions]).sum(axis=1)
    continuing = probabilities * ~mdp.terminal[states, actions]
    return np.linalg.solve(np.eye(len(actions)) - gamma * continuing, rewards)


def learned_q_values(model: LectureDQN) -> np.ndarray:
    states = th.arange(model.observation_space.n).reshape(-1, 1)  # type: ignore[attr-defined]
    with th.no_grad():
        return model.q_net(states).double().numpy()


def falling_rate(progress_remaining: float) -> float:
    return 1e-2 * max(progress_remaining, 0.003)


def learn_from_experience(env: gymnasium.Env[Any, Any], gamma: float, timesteps: int = 5_000, **arguments: Any) -> LectureDQN:
    """The real loop: uniform exploration, uniform replay, ψ = θ every 50 steps and 10 gradient steps between."""
    model = LectureDQN(
        "MlpPolicy",
        env,
        learning_rate=falling_rate,
        learning_starts=50,
        gamma=gamma,
        train_freq=50,
        gradient_steps=10,
        target_update_interval=50,
        exploration_initial_eps=1.0,
        exploration_final_eps=1.0,
        policy_kwargs=SMALL_NETWORK,
        seed=0,
        device="cpu",
        **arguments,
    )
    return model.learn(timesteps)


def learn_from_all_transitions(mdp: TabularMDP, gamma: float, denominator: int, n_updates: int = 80) -> LectureDQN:
    """
    D holds each transition as often as its probability says, and B is all of D: what is left is the lecture's objective.

    :param denominator: Every probability of the process is a multiple of its inverse
    :param n_updates: Number of target updates, with 10 gradient steps before each
    """
    copies = np.rint(mdp.transition_probabilities * denominator).astype(int)
    model = LectureDQN(
        "MlpPolicy",
        mdp,
        learning_rate=falling_rate,
        buffer_size=int(copies.sum()),
        gamma=gamma,
        target_update_interval=1,
        policy_kwargs=SMALL_NETWORK,
        seed=0,
        device="cpu",
    )
    model.set_logger(configure(None, []))
    replay_buffer = model.replay_buffer
    assert replay_buffer is not None
    for state, action, next_state in np.argwhere(copies):
        transition = (state, action, next_state)
        for _ in range(copies[transition]):
            replay_buffer.add(
                np.array([state]),
                np.array([next_state]),
                np.array([action]),
                np.array([mdp.rewards[transition]]),
                np.array([mdp.terminal[transition]]),
                [{}],
            )
    everything = replay_buffer._get_samples(np.arange(replay_buffer.size()))
    model._sample_batch = lambda batch_size: everything  # type: ignore[method-assign]
    for update in range(n_updates):
        model._update_current_progress_remaining(update, n_updates)
        for _ in range(10):
            model.train(1, replay_buffer.size())
        model._on_step()
    return model


def assert_optimal(model: LectureDQN, mdp: TabularMDP, gamma: float, tolerance: float = TOLERANCE) -> None:
    optimal = optimal_q_values(mdp, gamma)
    np.testing.assert_allclose(learned_q_values(model), optimal, rtol=0, atol=tolerance)
    actions, _ = model.predict(np.arange(len(optimal)), deterministic=True)
    np.testing.assert_allclose(values_of_policy(mdp, actions, gamma), optimal.max(axis=1), rtol=0, atol=1e-12)


def test_an_endless_reward_of_one_is_worth_ten() -> None:
    # L1: 1 + 0.9 + 0.81 + ... = 1 / (1 - 0.9)
    model = learn_from_experience(ring(1), gamma=0.9)
    np.testing.assert_allclose(learned_q_values(model), [[10.0, 10.0]], rtol=0, atol=TOLERANCE)


def test_a_chain_has_the_values_of_the_discounted_reward_at_its_end() -> None:
    mdp = chain(6)
    model = learn_from_experience(mdp, gamma=0.9)
    right = 0.9 ** np.array([5, 4, 3, 2, 1, 0])
    left = 0.9 ** np.array([6, 6, 5, 4, 3, 2])
    np.testing.assert_allclose(learned_q_values(model), np.stack([left, right], axis=1), rtol=0, atol=TOLERANCE)
    assert_optimal(model, mdp, gamma=0.9)


@pytest.mark.parametrize(("n_states", "n_actions", "seed"), [(5, 2, 0), (12, 3, 1), (20, 4, 2)])
def test_random_processes_are_solved(n_states: int, n_actions: int, seed: int) -> None:
    mdp = random_mdp(n_states, n_actions, seed)
    model = learn_from_all_transitions(mdp, gamma=0.9, denominator=8)
    assert_optimal(model, mdp, gamma=0.9)


def test_frozen_lake_is_solved() -> None:
    # Two actions that are not equally good differ by 0.0066 or more here, so the tolerance is below half of that.
    mdp = frozen_lake()
    model = learn_from_all_transitions(mdp, gamma=0.95, denominator=3)
    assert_optimal(model, mdp, gamma=0.95, tolerance=0.002)


def test_a_terminal_transition_is_worth_its_reward_and_nothing_else() -> None:
    # L12. It ends in a state that is worth 10 to whoever is there without d.
    mdp = empty_mdp(2, 2)
    add_transition(mdp, 0, 0, 1, reward=-3.0, terminal=True)
    add_transition(mdp, 0, 1, 1, reward=0.0)
    add_transition(mdp, 1, 0, 1, reward=1.0)
    add_transition(mdp, 1, 1, 1, reward=1.0)
    model = learn_from_all_transitions(mdp, gamma=0.9, denominator=1)
    np.testing.assert_allclose(learned_q_values(model), [[-3.0, 9.0], [10.0, 10.0]], rtol=0, atol=TOLERANCE)


def test_truncation_as_d_ends_the_sum() -> None:
    # L2: with d = terminated or truncated, five, four, ... rewards are left in an episode that is cut after five.
    model = learn_from_experience(TimeLimit(ring(5), 5), gamma=0.9)
    rewards_left = np.array([5, 4, 3, 2, 1])
    expected = (1 - 0.9**rewards_left) / (1 - 0.9)
    np.testing.assert_allclose(learned_q_values(model), np.stack([expected, expected], axis=1), rtol=0, atol=TOLERANCE)


def test_truncation_that_is_handled_does_not_end_the_sum() -> None:
    # With d = terminated alone the same process is the endless one.
    model = learn_from_experience(TimeLimit(ring(5), 5), gamma=0.9, replay_buffer_kwargs={"handle_timeout_termination": True})
    np.testing.assert_allclose(learned_q_values(model), np.full((5, 2), 10.0), rtol=0, atol=TOLERANCE)


def test_without_the_final_layers_weights_every_value_starts_at_exactly_zero() -> None:
    # L8: the final bias is 0, so nothing but its N(0, 1e-3) weights moves Q away from 0.
    mdp = frozen_lake()
    exactly_zero = LectureDQN("MlpPolicy", mdp, policy_kwargs={"final_layer_std": 0.0}, seed=0, device="cpu")
    near_zero = LectureDQN("MlpPolicy", mdp, seed=0, device="cpu")
    assert np.all(learned_q_values(exactly_zero) == 0)
    assert 0 < np.max(np.abs(learned_q_values(near_zero))) < 0.1
