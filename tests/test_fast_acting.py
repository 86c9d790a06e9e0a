"""Fast acting is the policy's acting: the same actions while training, and silently absent where they would not be."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast_acting import FastActing
from sb3_lecture_dqn.policies import MlpPolicy

# a final layer that is not small, so that Q values differ between the actions
WIDE = {"final_layer_std": 0.5}


def model_of(env: Any = "CartPole-v1", **policy_kwargs: Any) -> LectureDQN:
    return LectureDQN("MlpPolicy", env, policy_kwargs={**WIDE, **policy_kwargs}, learning_starts=0, train_freq=4, seed=0)


@pytest.mark.parametrize("n_envs", [1, 5])
@pytest.mark.parametrize(
    "layers",
    [{}, {"layer_norm": False}, {"activation_fn": nn.ReLU}, {"net_arch": []}, {"net_arch": [7, 5, 3]}],
)
def test_its_actions_are_the_policys(layers: dict[str, Any], n_envs: int) -> None:
    model = model_of("LunarLander-v3", **layers)
    fast_acting = FastActing.for_policy(model.policy)
    assert fast_acting is not None
    rng = np.random.default_rng(0)
    actions = []
    for _ in range(200):
        observations = rng.normal(size=(n_envs, 8)).astype(np.float32)
        assert fast_acting.accepts(observations)
        actions.append(fast_acting.greedy_actions(observations))
        expected, _ = model.policy.predict(observations, deterministic=True)
        np.testing.assert_array_equal(actions[-1], expected)
        assert actions[-1].dtype == expected.dtype
    assert len(np.unique(actions)) > 1


def test_one_observation_has_the_q_values_of_the_network() -> None:
    model = model_of("LunarLander-v3")
    fast_acting = FastActing.for_policy(model.policy)
    assert fast_acting is not None
    for observation in np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32):
        q_values = model.q_net(th.as_tensor(observation[None])).detach().numpy()[0]
        np.testing.assert_allclose(fast_acting._q_values_of_one(observation), q_values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_run_with_it_is_the_run_without_it(monkeypatch: pytest.MonkeyPatch, normalise: bool) -> None:
    def run() -> LectureDQN:
        env: Any = make_vec_env("CartPole-v1", n_envs=2, seed=0)
        return model_of(VecNormalize(env) if normalise else env).learn(400)

    fast = run()
    assert fast._fast_acting is not None
    monkeypatch.setattr(FastActing, "for_policy", classmethod(lambda cls, policy: None))
    plain = run()
    assert plain._fast_acting is None
    assert fast.replay_buffer is not None
    assert plain.replay_buffer is not None
    np.testing.assert_array_equal(fast.replay_buffer.actions, plain.replay_buffer.actions)
    np.testing.assert_array_equal(fast.replay_buffer.observations, plain.replay_buffer.observations)


def test_it_acts_by_the_current_parameters() -> None:
    model = model_of().learn(20)
    fast_acting = model._fast_acting
    assert fast_acting is not None
    assert fast_acting.is_current(model.policy)
    observation = np.zeros((1, 4), np.float32)
    for action in (0, 1):
        with th.no_grad():
            model.q_net.q_net[-1].bias.copy_(th.tensor([1e3, 0.0] if action == 0 else [0.0, 1e3]))
        assert fast_acting.greedy_actions(observation) == [action]


def test_a_hook_that_appears_in_the_middle_of_a_run_sees_the_acting() -> None:
    model = model_of()
    model.exploration_initial_eps = model.exploration_final_eps = 0.0
    model.exploration_schedule = model._make_exploration_schedule()
    model.learn(8)
    shapes: list[tuple[int, ...]] = []
    model.q_net.q_net[0].register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    model.learn(8, reset_num_timesteps=False)
    assert shapes.count((1, 4)) == 8


class OwnPrediction(MlpPolicy):
    def _predict(self, observation: Any, deterministic: bool = True) -> th.Tensor:
        return th.ones(len(observation), dtype=th.long)


class Float64Env(gymnasium.wrappers.TransformObservation):  # type: ignore[type-arg]
    def __init__(self) -> None:
        space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        super().__init__(gymnasium.make("CartPole-v1"), lambda observation: observation.astype(np.float64), space)


@pytest.mark.parametrize(
    "model",
    [
        lambda: model_of(activation_fn=nn.Tanh),
        lambda: model_of(activation_fn=lambda: nn.LeakyReLU(2.0)),
        lambda: LectureDQN(OwnPrediction, "CartPole-v1"),
        lambda: model_of(Float64Env()),
    ],
    ids=["tanh", "steep", "own prediction", "float64"],
)
def test_the_policy_acts_itself_where_fast_acting_does_not_fit(model: Any) -> None:
    model = model()
    assert FastActing.for_policy(model.policy) is None
    model.learn(20)
    assert model.num_timesteps == 20


def test_a_single_observation_is_the_policys() -> None:
    model = model_of().learn(20)
    assert model._fast_acting is not None
    assert not model._fast_acting.accepts(np.zeros(4, np.float32))
    action, _ = model.predict(np.zeros(4, np.float32))
    assert action.shape == ()
