"""The network of the lecture, layer by layer (L5 to L8)."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from torch import nn

from sb3_lecture_dqn import CnnPolicy, LectureDQNPolicy, MultiInputPolicy

VECTOR_SPACE = spaces.Box(-1, 1, (5,), np.float32)
IMAGE_SPACE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
ACTIONS = spaces.Discrete(3)


def make_policy(**kwargs: Any) -> LectureDQNPolicy:
    th.manual_seed(0)
    return LectureDQNPolicy(VECTOR_SPACE, ACTIONS, lambda _: 1e-3, **kwargs)


def test_default_network_is_the_slide_layer_by_layer() -> None:
    layers = list(make_policy().q_net.q_net)
    assert [type(layer) for layer in layers] == [
        *(nn.Linear, nn.LayerNorm, nn.LeakyReLU),
        *(nn.Linear, nn.LayerNorm, nn.LeakyReLU),
        nn.Linear,
    ]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(5, 256), (256, 256), (256, 3)]


def test_forward_is_linear_then_layer_norm_then_leaky_relu() -> None:
    q_net = make_policy(final_layer_std=1.0).q_net
    layers = [layer for layer in q_net.q_net if not isinstance(layer, nn.LeakyReLU)]
    values = np.random.default_rng(0).normal(size=(4, 5))
    observations = th.as_tensor(values, dtype=th.float32)
    for linear, layer_norm in [(layers[0], layers[1]), (layers[2], layers[3])]:
        assert isinstance(linear, nn.Linear)
        assert isinstance(layer_norm, nn.LayerNorm)
        values = values @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
        values = (values - values.mean(1, keepdims=True)) / np.sqrt(values.var(1, keepdims=True) + 1e-5)
        values = np.where(values > 0, values, 0.01 * values)
    assert isinstance(layers[4], nn.Linear)
    expected = values @ layers[4].weight.detach().double().numpy().T
    np.testing.assert_allclose(q_net(observations).detach().numpy(), expected, atol=1e-4)


def test_one_forward_pass_gives_the_values_of_all_actions() -> None:
    q_net = make_policy().q_net
    passes = []
    q_net.q_net.register_forward_hook(lambda *_: passes.append(1))
    assert q_net(th.zeros(7, 5)).shape == (7, 3)
    assert len(passes) == 1


def test_final_layer_starts_with_tiny_weights_and_zero_bias() -> None:
    th.manual_seed(0)
    policy = LectureDQNPolicy(VECTOR_SPACE, spaces.Discrete(100), lambda _: 1e-3)
    final_layer = policy.q_net.q_net[-1]
    assert isinstance(final_layer, nn.Linear)
    # 25 600 draws from N(0, 1e-3): the standard error of their deviation is 0.5 %
    assert final_layer.weight.std().item() == pytest.approx(1e-3, rel=0.03)
    assert final_layer.weight.mean().item() == pytest.approx(0, abs=3e-5)
    assert th.equal(final_layer.bias, th.zeros(100))


def test_q_starts_near_zero_and_does_not_without_the_small_layer() -> None:
    observations = th.as_tensor(np.random.default_rng(0).normal(size=(1000, 5)), dtype=th.float32)
    assert make_policy().q_net(observations).abs().max().item() < 0.1
    assert make_policy(final_layer_std=None).q_net(observations).abs().max().item() > 0.5


def test_target_network_starts_equal_and_shares_no_memory() -> None:
    policy = make_policy()
    pairs = list(zip(policy.q_net.parameters(), policy.q_net_target.parameters(), strict=True))
    assert all(th.equal(theta, psi) for theta, psi in pairs)
    with th.no_grad():
        pairs[0][0].add_(1)
    assert not th.equal(*pairs[0])


def test_policy_kwargs_change_each_part_of_the_network() -> None:
    q_net = make_policy(net_arch=[16], activation_fn=nn.Tanh, layer_norm=False, final_layer_std=0.5).q_net
    assert [type(layer) for layer in q_net.q_net] == [nn.Linear, nn.Tanh, nn.Linear]
    final_layer = q_net.q_net[-1]
    assert isinstance(final_layer, nn.Linear)
    assert final_layer.weight.std().item() == pytest.approx(0.5, rel=0.3)


def test_policy_is_greedy() -> None:
    policy = make_policy(final_layer_std=1.0)
    observations = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    q_values = policy.q_net(th.as_tensor(observations)).detach().numpy()
    np.testing.assert_array_equal(policy.predict(observations)[0], q_values.argmax(axis=1))


def test_cnn_policy_puts_an_encoder_in_front_of_the_same_head() -> None:
    q_net = CnnPolicy(IMAGE_SPACE, ACTIONS, lambda _: 1e-3).q_net
    assert isinstance(q_net.features_extractor, NatureCNN)
    head = [layer.out_features for layer in q_net.q_net if isinstance(layer, nn.Linear)]
    assert head == [256, 256, 3]
    assert sum(isinstance(layer, nn.LayerNorm) for layer in q_net.q_net) == 2


def test_multi_input_policy_puts_an_encoder_in_front_of_the_same_head() -> None:
    observation_space = spaces.Dict({"image": IMAGE_SPACE, "vector": VECTOR_SPACE})
    q_net = MultiInputPolicy(observation_space, ACTIONS, lambda _: 1e-3).q_net
    assert isinstance(q_net.features_extractor, CombinedExtractor)
    head = [layer.out_features for layer in q_net.q_net if isinstance(layer, nn.Linear)]
    assert head == [256, 256, 3]


def test_both_networks_have_an_encoder_of_their_own() -> None:
    policy = CnnPolicy(IMAGE_SPACE, ACTIONS, lambda _: 1e-3)
    assert policy.q_net.features_extractor is not policy.q_net_target.features_extractor


def test_policy_alone_survives_saving_with_every_argument(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "net_arch": [16],
        "activation_fn": nn.Tanh,
        "features_extractor_class": NatureCNN,
        "features_extractor_kwargs": {"features_dim": 9},
        "normalize_images": False,
        "optimizer_class": th.optim.AdamW,
        "optimizer_kwargs": {"weight_decay": 0.25},
        "layer_norm": False,
        "final_layer_std": 1.0,
    }
    th.manual_seed(0)
    policy = LectureDQNPolicy(IMAGE_SPACE, ACTIONS, lambda _: 1e-3, **arguments)
    policy.save(str(tmp_path / "policy"))
    loaded = LectureDQNPolicy.load(str(tmp_path / "policy"))
    assert {name: getattr(loaded, name) for name in arguments} == arguments
    assert [type(layer) for layer in loaded.q_net.q_net] == [nn.Linear, nn.Tanh, nn.Linear]
    assert loaded.optimizer.param_groups[0]["weight_decay"] == 0.25
    observations = th.randint(0, 255, (2, 3, 36, 36))
    assert th.equal(policy.q_net(observations), loaded.q_net(observations))


def test_optimizer_trains_theta_alone() -> None:
    policy = make_policy()
    trained = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in policy.q_net.parameters()}


@pytest.mark.parametrize(("kwargs", "divisor"), [({}, 255), ({"normalize_images": False}, 1)])
def test_images_from_an_environment_are_divided_by_255_unless_the_user_says_otherwise(
    kwargs: dict[str, Any], divisor: int
) -> None:
    th.manual_seed(0)
    policy = CnnPolicy(IMAGE_SPACE, ACTIONS, lambda _: 1e-3, final_layer_std=1.0, **kwargs)
    observations = th.randint(0, 255, (2, 3, 36, 36))
    for q_net in (policy.q_net, policy.q_net_target):
        expected = q_net.q_net(q_net.features_extractor(observations.float() / divisor))
        assert th.equal(q_net(observations), expected)


def test_gymnasium_environment_gives_the_policy_its_sizes() -> None:
    env = gymnasium.make("CartPole-v1")
    assert isinstance(env.action_space, spaces.Discrete)
    policy = LectureDQNPolicy(env.observation_space, env.action_space, lambda _: 1e-3)
    assert policy.q_net(th.zeros(1, 4)).shape == (1, 2)
