"""π and π_E (L9): ε-greedy, one draw for each environment, from the algorithm's own generator."""

import copy
import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from scripted_envs import CountingEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.lecture_dqn import epsilon_greedy
from sb3_lecture_dqn.seeding import make_generator, numpy_draws_from

N_ENVS = 20_000


def make_model(exploration_rate: float, seed: int | None = 0, **kwargs: Any) -> LectureDQN:
    model = LectureDQN("MlpPolicy", CountingEnv(), seed=seed, policy_kwargs={"net_arch": [8]}, **kwargs)
    model.exploration_rate = exploration_rate
    return model


def test_u_at_most_epsilon_explores_and_above_it_is_greedy() -> None:
    actions = epsilon_greedy(np.array([0, 0, 0]), np.array([2, 2, 2]), u=np.array([0.29, 0.3, 0.31]), exploration_rate=0.3)
    assert actions.tolist() == [2, 2, 0]


@pytest.mark.parametrize("exploration_rate", [0.1, 0.5, 1.0])
def test_action_frequencies_are_those_of_epsilon_greedy(exploration_rate: float) -> None:
    model = make_model(exploration_rate)
    observations = np.zeros((N_ENVS, 2), dtype=np.float32)
    greedy = model.predict(observations[:1], deterministic=True)[0][0]
    actions = model.predict(observations, deterministic=False)[0]
    for action in range(3):
        probability = exploration_rate / 3 + (1 - exploration_rate) * (action == greedy)
        # five standard deviations of a binomial: wrong once in two million times
        tolerance = 5 * math.sqrt(N_ENVS * probability * (1 - probability)) + 1e-9
        assert abs((actions == action).sum() - N_ENVS * probability) <= tolerance


def test_each_environment_draws_its_own_coin() -> None:
    """With one coin for all, a batch would be all greedy or all random: never a few of each every time."""
    model = make_model(0.5)
    observations = np.zeros((64, 2), dtype=np.float32)
    greedy = model.predict(observations[:1], deterministic=True)[0][0]
    for _ in range(50):
        share = (model.predict(observations)[0] == greedy).mean()
        # P(greedy) = 1/2 + 1/2 · 1/3; six standard deviations are 0.35
        assert 0.31 < share < 1.0


def test_deterministic_prediction_is_greedy_whatever_epsilon_is() -> None:
    model = make_model(1.0)
    observations = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    expected = model.q_net(th.as_tensor(observations)).argmax(dim=1).numpy()
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], expected)


def test_exploration_ignores_numpys_global_generator_and_leaves_it_alone() -> None:
    observations = np.zeros((100, 2), dtype=np.float32)
    actions = []
    for global_seed in (1, 2):
        model = make_model(0.5)
        np.random.seed(global_seed)
        actions.append(model.predict(observations)[0])
        assert np.random.random_sample() == np.random.RandomState(global_seed).random_sample()
    np.testing.assert_array_equal(actions[0], actions[1])


def test_the_draws_for_one_environment_are_those_of_an_array_of_one() -> None:
    model = make_model(1.0)
    rng = copy.deepcopy(model.random_generator)
    expected = [(rng.random(1), rng.integers(model.action_space.n, size=1))[1] for _ in range(200)]
    assert [model.predict(np.zeros((1, 2), dtype=np.float32))[0] for _ in range(200)] == expected
    assert model.random_generator.bit_generator.state == rng.bit_generator.state


def test_no_forward_pass_when_all_environments_explore() -> None:
    model = make_model(1.0)
    passes: list[int] = []
    model.q_net.register_forward_hook(lambda *_: passes.append(1))
    model.predict(np.zeros((4, 2), dtype=np.float32))
    assert passes == []
    model.exploration_rate = 0.0
    model.predict(np.zeros((4, 2), dtype=np.float32))
    assert passes == [1]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("exploration_rate", [0.0, 0.5, 1.0])
def test_one_observation_gives_one_action(deterministic: bool, exploration_rate: float) -> None:
    model = make_model(exploration_rate)
    action, state = model.predict(np.zeros(2, dtype=np.float32), deterministic=deterministic)
    assert action.shape == ()
    assert state is None
    assert model.action_space.contains(action)


def test_epsilon_falls_linearly_over_its_fraction_and_starts_at_its_initial_value() -> None:
    rates: list[float] = []

    class RecordingEnv(CountingEnv):
        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            rates.append(model.exploration_rate)
            return super().step(action)

    model = LectureDQN(
        "MlpPolicy",
        RecordingEnv(),
        learning_starts=1_000,
        exploration_initial_eps=0.9,
        exploration_final_eps=0.1,
        exploration_fraction=0.5,
    )
    model.learn(100)
    assert rates[0] == pytest.approx(0.9)
    assert rates[25] == pytest.approx(0.5)
    assert rates[51:] == pytest.approx([0.1] * 49)
    # a second training starts its schedule again, from its first step on
    model.learn(100)
    assert rates[100] == pytest.approx(0.9)
    # one that goes on has its place in a schedule of 400 steps, from its first step on too
    model.learn(300, reset_num_timesteps=False)
    assert rates[200] == pytest.approx(0.5)


def trained_parameters(disturb: bool, **kwargs: Any) -> list[np.ndarray]:
    class DisturbingEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            if disturb:
                np.random.random_sample(3)
            return super().step(action)

    env = DisturbingEnv(gymnasium.make("CartPole-v1"))
    model = LectureDQN("MlpPolicy", env, learning_starts=50, policy_kwargs={"net_arch": [16]}, seed=3, **kwargs)
    model.learn(300)
    return [parameter.detach().numpy() for parameter in model.q_net.parameters()]


def test_a_seeded_run_is_reproducible_whatever_else_draws_from_numpy() -> None:
    for first, second in zip(trained_parameters(disturb=False), trained_parameters(disturb=True), strict=True):
        np.testing.assert_array_equal(first, second)


def test_several_environments_are_reproducible_too() -> None:
    runs = []
    for _ in range(2):
        env = make_vec_env("CartPole-v1", n_envs=3, seed=0)
        model = LectureDQN("MlpPolicy", env, learning_starts=30, policy_kwargs={"net_arch": [16]}, seed=1).learn(300)
        runs.append([parameter.detach().numpy() for parameter in model.q_net.parameters()])
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_global_seed_decides_a_run_without_a_seed_of_its_own() -> None:
    observations = np.zeros((100, 2), dtype=np.float32)
    actions = []
    for _ in range(2):
        np.random.seed(5)
        actions.append(make_model(1.0, seed=None).predict(observations)[0])
    np.testing.assert_array_equal(actions[0], actions[1])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_of_its_own_decides_a_generator_whatever_the_global_one_would_draw(seed: int) -> None:
    draws = []
    for global_seed in (5, 6):
        np.random.seed(global_seed)
        draws.append(make_generator(seed).random())
    assert draws[0] == draws[1]


def test_two_seeds_explore_differently() -> None:
    observations = np.zeros((100, 2), dtype=np.float32)
    first, second = (make_model(1.0, seed=seed).predict(observations)[0] for seed in (0, 1))
    assert (first != second).any()


def test_a_fraction_of_zero_explores_at_the_final_rate_from_the_first_step() -> None:
    model = LectureDQN("MlpPolicy", CountingEnv(), exploration_fraction=0.0, exploration_final_eps=0.2)
    model._setup_learn(10)
    assert model.exploration_rate == 0.2


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_list_is_an_observation_too(deterministic: bool) -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", seed=0)
    model.exploration_rate = 0.5
    action, _ = model.predict([0.0, 0.1, 0.0, 0.1], deterministic=deterministic)  # type: ignore[arg-type]
    assert action.shape == ()
    assert action in (0, 1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_lists_in_a_dictionary_are_an_observation_too(deterministic: bool) -> None:
    env = SimpleMultiObsEnv()
    model = LectureDQN("MultiInputPolicy", env, buffer_size=10, seed=0)
    model.exploration_rate = 0.5
    observation: Any = {name: part.tolist() for name, part in env.reset(seed=0)[0].items()}
    action, _ = model.predict(observation, deterministic=deterministic)
    assert action.shape == ()
    assert model.action_space.contains(action)


def test_an_interruption_at_any_moment_leaves_numpys_global_generator_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    set_bit_generator = np.random.set_bit_generator  # type: ignore[attr-defined]

    def interrupted(bit_generator: Any) -> None:
        set_bit_generator(bit_generator)
        if bit_generator is not before:
            raise KeyboardInterrupt

    monkeypatch.setattr(np.random, "set_bit_generator", interrupted)
    with pytest.raises(KeyboardInterrupt), numpy_draws_from(np.random.default_rng(0)):
        pass
    assert np.random.get_bit_generator() is before  # type: ignore[attr-defined]
