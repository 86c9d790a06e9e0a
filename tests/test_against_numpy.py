"""
LectureDQN against the numpy re-implementation in numpy_dqn.py.

Tolerances. Float64 rounds by 1e-16, and 500 updates amplify that by far less than to the 1e-9 allowed. Float32 rounds a
parameter of size 1 by 6e-8, so one update from the same state has to agree to 1e-6; longer float32 runs drift apart by
themselves, whatever the code, and nothing follows from comparing them.
"""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from numpy_dqn import Adam, Batch, Draws, NumpyDQN, Settings, forward, squared_error_gradient
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.lecture_dqn import epsilon_greedy, squared_td_error, td_target

SEED = 7
N_ENVS = 3


class Float64Flatten(FlattenExtractor):
    """SB3 hands every observation over as float32; a float64 network takes it as float64."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations.double())


def make_short_cart_pole() -> gymnasium.Env[Any, Any]:
    """Episodes end both ways: by falling over, and by a time limit."""
    return TimeLimit(gymnasium.make("CartPole-v1"), 20)


def make_model(settings: Settings, dtype: th.dtype = th.float64) -> LectureDQN:
    model = LectureDQN(
        "MlpPolicy",
        DummyVecEnv([make_short_cart_pole] * N_ENVS),
        learning_rate=settings.learning_rate,
        buffer_size=settings.buffer_size,
        learning_starts=0,
        batch_size=settings.batch_size,
        gamma=settings.gamma,
        train_freq=settings.train_freq,
        gradient_steps=settings.gradient_steps,
        target_update_interval=settings.target_update_interval,
        exploration_fraction=settings.exploration_fraction,
        exploration_final_eps=settings.exploration_final_eps,
        policy_kwargs={"features_extractor_class": Float64Flatten} if dtype == th.float64 else None,
        seed=SEED,
        device="cpu",
    )
    if dtype == th.float64:
        model.policy.double()
        model.policy.optimizer = th.optim.Adam(model.q_net.parameters(), lr=settings.learning_rate)
    return model


def parameters_of(network: th.nn.Module) -> list[np.ndarray]:
    return [parameter.detach().double().numpy().copy() for parameter in network.parameters()]


def to_samples(batch: Batch, dtype: th.dtype = th.float64) -> ReplayBufferSamples:
    return ReplayBufferSamples(
        observations=th.as_tensor(batch.observations, dtype=dtype),
        actions=th.as_tensor(batch.actions).reshape(-1, 1),
        next_observations=th.as_tensor(batch.next_observations, dtype=dtype),
        dones=th.as_tensor(batch.dones, dtype=dtype).reshape(-1, 1),
        rewards=th.as_tensor(batch.rewards, dtype=dtype).reshape(-1, 1),
    )


def to_batch(samples: ReplayBufferSamples) -> Batch:
    return Batch(
        observations=samples.observations.double().numpy(),
        actions=samples.actions.numpy().ravel(),
        rewards=samples.rewards.double().numpy().ravel(),
        next_observations=samples.next_observations.double().numpy(),
        dones=samples.dones.numpy().ravel().astype(bool),
    )


def random_batch(generator: np.random.Generator, batch_size: int) -> Batch:
    return Batch(
        observations=generator.normal(size=(batch_size, 4)).astype(np.float32),
        actions=generator.integers(2, size=batch_size),
        rewards=generator.normal(size=batch_size),
        next_observations=generator.normal(size=(batch_size, 4)).astype(np.float32),
        dones=generator.random(batch_size) < 0.2,
    )


def assert_same(network: th.nn.Module, parameters: list[np.ndarray], tolerance: float) -> None:
    for ours, theirs in zip(parameters_of(network), parameters, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_the_pure_functions_are_the_formulas() -> None:
    generator = np.random.default_rng(0)
    rewards, next_q_values = generator.normal(size=(50, 1)), generator.normal(size=(50, 3))
    dones = (generator.random((50, 1)) < 0.3).astype(float)
    targets = td_target(*(th.as_tensor(x) for x in (rewards, dones, next_q_values)), discounts=0.9)
    expected = [r if d else r + 0.9 * max(q) for (r,), (d,), q in zip(rewards, dones, next_q_values, strict=True)]
    np.testing.assert_allclose(targets.numpy().ravel(), expected, rtol=0, atol=1e-14)

    loss = squared_td_error(th.as_tensor(rewards), targets)
    assert loss.item() == pytest.approx(sum((r - t) ** 2 for r, t in zip(rewards.ravel(), expected, strict=True)) / 50)

    greedy, random, u = generator.integers(4, size=50), generator.integers(4, size=50), generator.random(50)
    u[0] = 0.4  # u ≤ ε explores: the border belongs to U(A)
    expected_actions = [a if x <= 0.4 else g for g, a, x in zip(greedy, random, u, strict=True)]
    assert epsilon_greedy(greedy, random, u, 0.4).tolist() == expected_actions


def test_500_updates_on_the_same_data_give_the_same_parameters() -> None:
    settings = Settings()
    model = make_model(settings)
    model.set_logger(configure(None, []))
    theirs = NumpyDQN(parameters_of(model.q_net), settings, Draws(SEED))
    generator = np.random.default_rng(SEED)
    for step in range(1, 501):
        batch = random_batch(generator, settings.batch_size)
        model._sample_batch = lambda batch_size, batch=batch: to_samples(batch)  # type: ignore[misc]
        model.train(1, settings.batch_size)
        theirs.update(batch)
        model._on_step()
        if step % (settings.target_update_interval // N_ENVS) == 0:
            theirs.sync()
        if step % 50 == 0:
            assert_same(model.q_net, theirs.theta, 1e-9)
            assert_same(model.q_net_target, theirs.psi, 1e-9)


def test_the_whole_loop_collects_the_same_data_and_learns_the_same_parameters() -> None:
    # 1500 steps of 3 environments: 500 updates, 50 target updates, a ring buffer that goes round, ends of both kinds.
    settings = Settings()
    model = make_model(settings)
    theirs = NumpyDQN(parameters_of(model.q_net), settings, Draws(SEED))
    theirs.learn([make_short_cart_pole() for _ in range(N_ENVS)], total_timesteps=1500, seed=SEED)

    draws = Draws(SEED)
    model.random_generator = draws  # type: ignore[assignment]
    replay_buffer = model.replay_buffer
    assert replay_buffer is not None

    def sample_where_the_other_does(batch_size: int) -> ReplayBufferSamples:
        positions = draws.positions(replay_buffer.size(), N_ENVS, batch_size)
        actions = replay_buffer.actions[..., 0][positions]
        fields = (replay_buffer.rewards, replay_buffer.next_observations, replay_buffer.dones)
        return to_samples(Batch(replay_buffer.observations[positions], actions, *(field[positions] for field in fields)))

    model._sample_batch = sample_where_the_other_does  # type: ignore[method-assign]
    model.learn(1500)

    assert theirs.replay_buffer.n_added > len(theirs.replay_buffer)
    for name in ("observations", "next_observations", "rewards", "dones"):
        np.testing.assert_array_equal(getattr(replay_buffer, name), getattr(theirs.replay_buffer, name), err_msg=name)
    np.testing.assert_array_equal(replay_buffer.actions[..., 0], theirs.replay_buffer.actions)
    assert model.exploration_rate == pytest.approx(theirs.exploration_rate)
    assert model._n_updates == theirs.optimizer.step_count == 500
    assert_same(model.q_net, theirs.theta, 1e-9)
    assert_same(model.q_net_target, theirs.psi, 1e-9)


def test_at_100_points_of_a_float32_run_one_update_is_the_same() -> None:
    settings = Settings(batch_size=128, target_update_interval=60)
    model = make_model(settings, th.float32)
    train, sample_batch = model.train, model._sample_batch
    n_points = 0

    def train_and_compare(gradient_steps: int, batch_size: int = 100) -> None:
        nonlocal n_points
        samples = sample_batch(batch_size)
        expected = one_update_in_numpy(model, to_batch(samples), settings)
        comparable = is_well_conditioned(model, to_batch(samples))
        model._sample_batch = lambda batch_size: samples  # type: ignore[method-assign]
        train(1, batch_size)
        model._sample_batch = sample_batch  # type: ignore[method-assign]
        if comparable and n_points < 100:
            assert_same(model.q_net, expected, 1e-6)
            n_points += 1
        train(gradient_steps - 1, batch_size)

    model.train = train_and_compare  # type: ignore[method-assign]
    model.learn(120 * settings.train_freq * N_ENVS)
    assert n_points == 100


def is_well_conditioned(model: LectureDQN, batch: Batch) -> bool:
    """
    Whether rounding a float32 changes an update by no more than rounding does.

    It does not hold for Adam's first update, which is the mere sign of gradients that may be nearly 0; nor where the input
    of a LeakyReLU is so near 0 that rounding decides on which side of its kink it falls.
    """
    _, cache = forward(parameters_of(model.q_net), batch.observations)
    nearest_to_the_kink = min(np.min(np.abs(scaled)) for _, _, _, scaled in cache[:2])
    return model._n_updates > 0 and bool(nearest_to_the_kink > 1e-6)


def one_update_in_numpy(model: LectureDQN, batch: Batch, settings: Settings) -> list[np.ndarray]:
    """θ after one update from the state that the model is in now, its optimizer's included."""
    theta = parameters_of(model.q_net)
    optimizer = Adam(theta, settings.learning_rate)
    state = model.policy.optimizer.state_dict()["state"]
    if state:
        optimizer.first_moments = [state[i]["exp_avg"].double().numpy().copy() for i in range(len(theta))]
        optimizer.second_moments = [state[i]["exp_avg_sq"].double().numpy().copy() for i in range(len(theta))]
        optimizer.step_count = int(state[0]["step"])
    _, gradients = squared_error_gradient(theta, parameters_of(model.q_net_target), batch, settings.gamma)
    return optimizer.step(theta, gradients)
