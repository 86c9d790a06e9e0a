"""The objective (L12) and its gradient, against computations that share no code with the package."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.lecture_dqn import squared_td_error, td_target

GAMMA = 0.9


def random_batch(size: int, seed: int = 0) -> ReplayBufferSamples:
    """Random CartPole-shaped transitions; every other one is terminal."""
    rng = np.random.default_rng(seed)
    return ReplayBufferSamples(
        observations=th.as_tensor(rng.normal(size=(size, 4)), dtype=th.float32),
        actions=th.as_tensor(rng.integers(2, size=(size, 1))),
        next_observations=th.as_tensor(rng.normal(size=(size, 4)), dtype=th.float32),
        dones=th.as_tensor(np.arange(size)[:, None] % 2, dtype=th.float32),
        rewards=th.as_tensor(rng.normal(size=(size, 1)), dtype=th.float32),
    )


def sgd_model(**kwargs: Any) -> LectureDQN:
    """With plain SGD of learning rate 1, a gradient step subtracts exactly the gradient."""
    return LectureDQN(
        "MlpPolicy",
        "CartPole-v1",
        learning_rate=1.0,
        gamma=GAMMA,
        policy_kwargs={"net_arch": [6, 5], "final_layer_std": 1.0, "optimizer_class": th.optim.SGD},
        seed=0,
        **kwargs,
    )


def train_on(model: LectureDQN, batch: ReplayBufferSamples) -> None:
    model._setup_learn(1)
    model._sample_batch = lambda _: batch  # type: ignore[method-assign]
    model.train(gradient_steps=1, batch_size=len(batch.rewards))


def numpy_q_values(parameters: list[np.ndarray], observations: np.ndarray) -> np.ndarray:
    """Linear → LayerNorm → LeakyReLU, twice, then Linear, in float64."""
    values = observations
    for layer in range(2):
        weight, bias, scale, shift = parameters[4 * layer : 4 * layer + 4]
        values = values @ weight.T + bias
        values = (values - values.mean(1, keepdims=True)) / np.sqrt(values.var(1, keepdims=True) + 1e-5)
        values = values * scale + shift
        values = np.where(values > 0, values, 0.01 * values)
    return values @ parameters[8].T + parameters[9]


def numpy_loss(theta: list[np.ndarray], psi: list[np.ndarray], batch: ReplayBufferSamples) -> float:
    """The slide, one transition at a time."""
    losses = []
    q_values = numpy_q_values(theta, batch.observations.double().numpy())
    next_q_values = numpy_q_values(psi, batch.next_observations.double().numpy())
    for i in range(len(batch.rewards)):
        target = float(batch.rewards[i])
        if not bool(batch.dones[i]):
            target += GAMMA * next_q_values[i].max()
        losses.append((q_values[i, int(batch.actions[i])] - target) ** 2)
    return float(np.mean(losses))


def as_numpy(parameters: Any) -> list[np.ndarray]:
    return [parameter.detach().double().numpy().copy() for parameter in parameters]


def test_target_of_a_transition_that_goes_on_bootstraps_from_the_best_action() -> None:
    target = td_target(th.tensor([[2.0]]), th.tensor([[0.0]]), th.tensor([[1.0, 5.0, 3.0]]), GAMMA)
    assert target.item() == pytest.approx(2.0 + GAMMA * 5.0)


def test_target_of_a_terminal_transition_is_the_reward_exactly() -> None:
    target = td_target(th.tensor([[2.0]]), th.tensor([[1.0]]), th.tensor([[1.0, 5.0, 3.0]]), GAMMA)
    assert target.item() == 2.0


def test_each_transition_of_an_n_step_batch_has_its_own_discount() -> None:
    discounts = th.tensor([[0.9], [0.81]])
    target = td_target(th.zeros(2, 1), th.zeros(2, 1), th.ones(2, 3), discounts)
    assert target.flatten().tolist() == pytest.approx([0.9, 0.81])


def test_loss_is_the_mean_of_squares_even_for_large_errors() -> None:
    loss = squared_td_error(th.tensor([[0.0], [10.0]]), th.tensor([[0.5], [-90.0]]))
    assert loss.item() == pytest.approx((0.25 + 10_000) / 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_agrees_with_finite_differences_of_a_float64_loss(seed: int) -> None:
    model, batch = sgd_model(), random_batch(8, seed)
    with th.no_grad():  # ψ differs from θ, so that mixing them up shows
        for parameter in model.q_net_target.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    theta, psi = as_numpy(model.q_net.parameters()), as_numpy(model.q_net_target.parameters())
    train_on(model, batch)
    gradients = [before - after for before, after in zip(theta, as_numpy(model.q_net.parameters()), strict=True)]

    step = 1e-6
    for parameter, gradient in zip(theta, gradients, strict=True):
        for index in np.ndindex(parameter.shape):
            value = parameter[index]
            parameter[index] = value + step
            above = numpy_loss(theta, psi, batch)
            parameter[index] = value - step
            below = numpy_loss(theta, psi, batch)
            parameter[index] = value
            expected = (above - below) / (2 * step)
            # float32 subtraction of parameters of size 1 leaves about 1e-6; the gradients are of size 1
            assert gradient[index] == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_logged_loss_is_the_float64_loss() -> None:
    model, batch = sgd_model(), random_batch(16)
    expected = numpy_loss(as_numpy(model.q_net.parameters()), as_numpy(model.q_net_target.parameters()), batch)
    train_on(model, batch)
    model._record_training_metrics()
    assert model.logger.name_to_value["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_target_network_gets_no_gradient_step() -> None:
    model = sgd_model()
    psi = as_numpy(model.q_net_target.parameters())
    train_on(model, random_batch(8))
    for before, after in zip(psi, as_numpy(model.q_net_target.parameters()), strict=True):
        np.testing.assert_array_equal(before, after)


def test_gradient_is_clipped_only_when_asked_for() -> None:
    norms = {}
    for max_grad_norm in (None, math.inf, 0.5):
        model = sgd_model(max_grad_norm=max_grad_norm)
        theta = as_numpy(model.q_net.parameters())
        batch = random_batch(8)
        train_on(model, batch._replace(rewards=batch.rewards + 100))
        after = as_numpy(model.q_net.parameters())
        norms[max_grad_norm] = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(theta, after, strict=True)))
        model._record_training_metrics()
        # what is logged is the norm before clipping
        assert model.logger.name_to_value["train/gradient_norm"] > 10
    assert norms[None] == norms[math.inf] > 10
    assert norms[0.5] == pytest.approx(0.5, rel=1e-3)
