"""Fast acting is the policy's acting: the same actions while training, and silently absent where they would not be."""

import copy
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast.acting import FastActing
from sb3_lecture_dqn.policies import MlpPolicy, QNetwork

# a final layer that is not small, so that Q values differ between the actions
WIDE = {"final_layer_std": 0.5}


IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)  # the smallest that the Nature CNN takes
VECTOR = spaces.Box(-3, 3, (5,), np.float64)
SPACES = {
    "image": IMAGE,
    "dictionary": spaces.Dict({"image": IMAGE, "vector": VECTOR, "number": spaces.Discrete(3)}),
    "number": spaces.Discrete(4),
    "float64 vector": VECTOR,
    "float32 vector": spaces.Box(-3, 3, (5,), np.float32),
}


class Noise(gymnasium.Env[Any, int]):
    """Observations of any space, drawn by chance."""

    def __init__(self, kind: str) -> None:
        self.observation_space, self.action_space = SPACES[kind], spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation = self.observation_space.sample()
        return observation, float(action), bool(self.np_random.random() < 0.1), False, {}


class SmallEncoder(BaseFeaturesExtractor):
    """For any observation: flat, overwritten in place, thinned out in training mode."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, spaces.flatdim(observation_space))
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations: Any) -> th.Tensor:
        tensors = observations.values() if isinstance(observations, dict) else [observations]
        flat = [tensor.mul_(2).flatten(1) for tensor in tensors]
        features: th.Tensor = self.dropout(th.cat(flat, dim=1))
        return features


def encoding_model_of(kind: str, n_envs: int, encoder: type[BaseFeaturesExtractor] | None = SmallEncoder) -> LectureDQN:
    """With an encoder, or with the one that the policy takes by itself."""
    policy = {"image": "CnnPolicy", "dictionary": "MultiInputPolicy"}.get(kind, "MlpPolicy")
    env = DummyVecEnv([lambda: Noise(kind)] * n_envs)
    kwargs = {**WIDE, "net_arch": [16], **({"features_extractor_class": encoder} if encoder else {})}
    model = LectureDQN(policy, env, policy_kwargs=kwargs, buffer_size=1_000, learning_starts=0, batch_size=8, seed=1)
    let_every_action_be_the_best_somewhere(model)
    return model


@th.no_grad()
def let_every_action_be_the_best_somewhere(model: LectureDQN) -> None:
    """Q(s, a) is 0 on average over s, so that the greedy action depends on s; to an encoder, noise looks much the same."""
    assert model.env is not None
    observations = (model.policy.obs_to_tensor(model.env.reset())[0] for _ in range(20))  # type: ignore[arg-type]
    model.policy.set_training_mode(False)
    q_values = th.cat([model.q_net(batch) for batch in observations])
    model.q_net.q_net[-1].bias -= q_values.mean(dim=0)  # type: ignore[operator]


def model_of(env: Any = "CartPole-v1", **policy_kwargs: Any) -> LectureDQN:
    return LectureDQN("MlpPolicy", env, policy_kwargs={**WIDE, **policy_kwargs}, learning_starts=0, train_freq=4, seed=0)


@pytest.mark.usefixtures("is_compiled")
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


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize("encoder", [SmallEncoder, None])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kind", SPACES)
def test_its_actions_are_the_policys_behind_an_encoder(kind: str, n_envs: int, encoder: Any) -> None:
    model = encoding_model_of(kind, n_envs, encoder)
    fast_acting = FastActing.for_policy(model.policy)
    assert fast_acting is not None
    actions = []
    for _ in range(100):
        observations = model.env.reset()  # type: ignore[union-attr]
        assert fast_acting.accepts(observations)
        expected, _ = model.policy.predict(observations, deterministic=True)
        model.policy.set_training_mode(True)
        actions.append(fast_acting.greedy_actions(observations))
        np.testing.assert_array_equal(actions[-1], expected)
        assert actions[-1].dtype == expected.dtype
    assert len(np.unique(actions)) > 1


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kind", SPACES)
def test_a_run_with_it_is_the_run_without_it_behind_an_encoder(
    monkeypatch: pytest.MonkeyPatch, kind: str, n_envs: int
) -> None:
    def transitions(is_fast: bool) -> Any:
        model = encoding_model_of(kind, n_envs).learn(120)
        assert (model._fast_acting is not None) == is_fast
        assert model.replay_buffer is not None
        return model.replay_buffer.observations, model.replay_buffer.actions

    fast_observations, fast_actions = transitions(is_fast=True)
    monkeypatch.setattr(FastActing, "for_policy", classmethod(lambda cls, policy: None))
    observations, actions = transitions(is_fast=False)
    np.testing.assert_array_equal(fast_actions, actions)
    for key in observations if isinstance(observations, dict) else [...]:
        np.testing.assert_array_equal(fast_observations[key], observations[key])


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("encoder", [SmallEncoder, None])
def test_a_mirrored_view_of_the_observations_is_acted_on(encoder: Any, n_envs: int) -> None:
    model = encoding_model_of("float32 vector", n_envs, encoder)
    fast_acting = FastActing.for_policy(model.policy)
    assert fast_acting is not None
    for _ in range(20):
        observations: Any = model.env.reset()  # type: ignore[union-attr]
        mirrored = observations[:, ::-1]
        assert fast_acting.accepts(mirrored)
        expected, _ = model.policy.predict(mirrored, deterministic=True)
        np.testing.assert_array_equal(fast_acting.greedy_actions(mirrored), expected)


@pytest.mark.usefixtures("is_compiled")
def test_one_observation_has_the_q_values_of_the_network() -> None:
    model = model_of("LunarLander-v3")
    fast_acting = FastActing.for_policy(model.policy)
    assert fast_acting is not None
    for observation in np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32):
        q_values = model.q_net(th.as_tensor(observation[None])).detach().numpy()
        ours = fast_acting._q_values_of_one(observation[None])
        np.testing.assert_allclose(ours.reshape(1, -1), q_values, rtol=1e-4, atol=1e-5)


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


def exchange_the_network(model: LectureDQN) -> None:
    model.policy.q_net = model.policy.make_q_net()


def exchange_the_final_layer(model: LectureDQN) -> None:
    model.policy.q_net.q_net[-1] = nn.Linear(16, 3)


def exchange_a_weight(model: LectureDQN) -> None:
    model.policy.q_net.q_net[-1].weight = nn.Parameter(th.randn(3, 16))


class Negative(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return -super().forward(observations)


def exchange_the_encoder(model: LectureDQN) -> None:
    model.policy.q_net.features_extractor = Negative(model.observation_space)


def turn_the_slope_of_an_activation_round(model: LectureDQN) -> None:
    model.policy.q_net.q_net[2].negative_slope = 0.9


@pytest.mark.parametrize(
    "exchange",
    [
        exchange_the_network,
        exchange_the_final_layer,
        exchange_a_weight,
        exchange_the_encoder,
        turn_the_slope_of_an_activation_round,
    ],
)
def test_what_is_exchanged_in_the_policy_acts(exchange: Any) -> None:
    model = encoding_model_of("float32 vector", n_envs=1, encoder=None).learn(8)
    exchange(model)
    model.learn(8, reset_num_timesteps=False)
    model._is_collecting = True
    for _ in range(50):
        model._last_obs = model.env.reset()  # type: ignore[union-attr, assignment]
        assert model._fast_acting is not None
        assert model._fast_acting.accepts(model._last_obs)  # type: ignore[arg-type]
        expected, _ = model.policy.predict(model._last_obs, deterministic=True)  # type: ignore[arg-type]
        assert model._greedy_actions(model._last_obs) == expected  # type: ignore[arg-type]


class OwnTensors(MlpPolicy):
    def obs_to_tensor(self, observation: Any) -> Any:
        return super().obs_to_tensor(-observation)


@pytest.mark.parametrize(
    "model",
    [
        lambda: model_of(activation_fn=nn.Tanh),
        lambda: model_of(activation_fn=lambda: nn.LeakyReLU(2.0)),
        lambda: LectureDQN(OwnTensors, "CartPole-v1"),
    ],
    ids=["tanh", "steep", "own tensors"],
)
def test_the_policy_acts_itself_where_fast_acting_does_not_fit(model: Any) -> None:
    model = model()
    assert FastActing.for_policy(model.policy) is None
    model.learn(20)
    assert model.num_timesteps == 20


class OwnPrediction(MlpPolicy):
    def _predict(self, observation: Any, deterministic: bool = True) -> th.Tensor:
        return th.ones(len(observation), dtype=th.long)


class OwnPredict(MlpPolicy):
    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        return np.ones(len(observation), dtype=np.int64), None


class QNetworkWithAPrediction(QNetwork):
    def _predict(self, observation: Any, deterministic: bool = True) -> th.Tensor:
        return th.ones(len(observation), dtype=th.long)


class PolicyOfSuchANetwork(MlpPolicy):
    def make_q_net(self) -> QNetwork:
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        return QNetworkWithAPrediction(**net_args).to(self.device)


@pytest.mark.parametrize("policy", [OwnPrediction, OwnPredict, PolicyOfSuchANetwork])
def test_a_prediction_of_a_users_own_acts(policy: type[MlpPolicy]) -> None:
    settings: dict[str, Any] = {"learning_starts": 0, "gradient_steps": 0, "exploration_initial_eps": 0.0}
    model = LectureDQN(policy, "CartPole-v1", exploration_final_eps=0.0, seed=0, **settings)
    with th.no_grad():
        model.q_net.q_net[-1].bias.copy_(th.tensor([1e3, 0.0]))  # argmax Q is the other action
    model.learn(20)
    assert model._fast_acting is None
    assert model.replay_buffer is not None
    assert (model.replay_buffer.actions[:20] == 1).all()


@pytest.mark.parametrize("trained_before", [0, 20])
@pytest.mark.parametrize("place", ["predict", "_predict", "q_net._predict", "q_net.forward", "q_net.q_net.forward"])
def test_a_method_put_into_the_policy_is_asked(place: str, trained_before: int) -> None:
    model = model_of()
    model.exploration_initial_eps = model.exploration_final_eps = 0.0
    model.exploration_schedule = model._make_exploration_schedule()
    model.learn(trained_before)
    model.gradient_steps = 0
    *path, name = place.split(".")
    owner: Any = model.policy
    for part in path:
        owner = getattr(owner, part)
    calls: list[int] = []
    method = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: (calls.append(1), method(*args, **kwargs))[1])
    model.learn(8, reset_num_timesteps=False)
    assert len(calls) == 8


def test_prediction_is_in_evaluation_mode_whatever_mode_a_layer_was_put_in() -> None:
    model = encoding_model_of("float32 vector", n_envs=1)
    observation = np.ones(5, np.float32)
    model.predict(observation, deterministic=True)
    model.q_net.features_extractor.train()
    model.predict(observation, deterministic=True)
    assert not any(module.training for module in model.q_net.modules())


def test_a_rollout_in_which_the_policy_was_copied_goes_on_by_the_current_parameters() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", train_freq=20, learning_starts=0, seed=0, exploration_initial_eps=0.0)
    model.exploration_final_eps, model.exploration_schedule = 0.0, lambda _: 0.0
    model.learn(20)
    actions: list[int] = []

    def copy_and_change(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        actions.append(int(locals_["actions"][0]))
        if len(actions) in (2, 6):
            copy.deepcopy(model.policy)
            with th.no_grad():
                model.q_net.q_net[-1].bias.copy_(th.tensor([1e3, 0.0] if len(actions) == 2 else [0.0, 1e3]))
        return True

    model.learn(10, callback=copy_and_change, reset_num_timesteps=False)
    assert actions[2:6] == [0] * 4
    assert actions[6:10] == [1] * 4


def test_a_copy_of_a_model_acts_by_its_own_parameters() -> None:
    model = model_of().learn(8)
    twin = copy.deepcopy(model)
    for action in (0, 1):
        with th.no_grad():
            twin.q_net.q_net[-1].bias.copy_(th.tensor([1e3, 0.0] if action == 0 else [0.0, 1e3]))
        assert twin.predict(twin._last_obs, deterministic=True)[0] == [action]  # type: ignore[arg-type]


def test_a_single_observation_is_the_policys() -> None:
    model = model_of().learn(20)
    assert model._fast_acting is not None
    assert not model._fast_acting.accepts(np.zeros(4, np.float32))
    action, _ = model.predict(np.zeros(4, np.float32))
    assert action.shape == ()


@pytest.mark.parametrize("kind", SPACES)
def test_observations_of_other_shapes_or_types_are_the_policys(kind: str) -> None:
    model = encoding_model_of(kind, n_envs=1)
    fast_acting = FastActing.for_policy(model.policy)
    assert fast_acting is not None
    observations: Any = model.env.reset()  # type: ignore[union-attr]
    if isinstance(observations, dict):
        others = [
            {**observations, "vector": observations["vector"].astype(np.float32)},
            {key: value for key, value in observations.items() if key != "number"},
            observations["vector"],
        ]
    else:
        others = [observations.astype(np.float16), observations[..., None], observations[0, ...], {"": observations}]
    assert fast_acting.accepts(observations)
    assert not any(fast_acting.accepts(other) for other in others)
