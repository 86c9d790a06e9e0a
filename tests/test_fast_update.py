"""The fast update is the plain update: the same function, and silently absent where it would not be."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pytest
import torch as th
from both_paths import (
    BATCH_SIZE,
    copied,
    largest_difference,
    make_model,
    random_batch,
    train_both,
    train_on,
    trained_in_float64,
)
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.policies import LectureDQNPolicy, QNetwork


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("kind", ["vector", "image", "dict"])
def test_both_paths_agree_in_float64_over_500_updates(kind: str, max_grad_norm: float | None) -> None:
    kwargs: dict[str, Any] = {"max_grad_norm": max_grad_norm, "target_update_interval": 20, "learning_rate": 1e-3}
    plain, fast = (make_model(kind, fast, **kwargs) for fast in (False, True))
    train_both(kind, (plain, fast), 500)
    assert fast._fast_update is not None
    assert plain._fast_update is None
    assert largest_difference(plain, fast) < 1e-9
    assert largest_difference(plain, make_model(kind, fast=False)) > 0.01


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize(
    "layers", [{"layer_norm": False}, {"activation_fn": nn.ReLU}, {"net_arch": []}, {"net_arch": [7, 5, 3]}]
)
def test_both_paths_agree_for_other_layers(layers: dict[str, Any]) -> None:
    plain, fast = (make_model("vector", fast, policy_kwargs=layers) for fast in (False, True))
    train_both("vector", (plain, fast), 50)
    assert fast._fast_update is not None
    assert largest_difference(plain, fast) < 1e-12


@pytest.mark.usefixtures("is_compiled")
def test_both_paths_agree_with_n_step_discounts() -> None:
    plain, fast = (make_model("vector", fast) for fast in (False, True))
    rng = np.random.default_rng(0)
    for _ in range(20):
        discounts = th.as_tensor(rng.choice([0.9, 0.81], size=(BATCH_SIZE, 1)))
        batch = random_batch("vector", rng)._replace(discounts=discounts)
        train_on(plain, batch)
        train_on(fast, batch)
    assert largest_difference(plain, fast) < 1e-12


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize("kwargs", [{}, {"n_steps": 3}, {"max_grad_norm": 0.5}])
def test_whole_float64_runs_with_normalised_observations_and_rewards_agree(kwargs: dict[str, Any]) -> None:
    plain, fast = (trained_in_float64(fast, normalised=True, **kwargs) for fast in (False, True))
    assert fast._fast_update is not None
    assert fast._n_updates == plain._n_updates == 501
    assert largest_difference(plain, fast) < 1e-9


@pytest.mark.usefixtures("is_compiled")
def test_one_float32_update_from_the_same_state_agrees_at_100_points_of_a_real_run() -> None:
    """Longer float32 runs drift apart by rounding alone, so each update starts from the same state."""
    # a constant learning rate: the two models are not at the same point of a schedule
    settings: dict[str, Any] = {"learning_rate": 5e-4, "policy_kwargs": {"net_arch": [32, 32]}}
    run = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=50, gradient_steps=-1, seed=0, **settings)
    run.learn(60)
    plain = LectureDQN("MlpPolicy", "CartPole-v1", **settings)
    plain._current_fast_update = lambda: None  # type: ignore[method-assign]
    plain._setup_learn(100)
    for _ in range(100):
        run.learn(8, reset_num_timesteps=False)
        plain.set_parameters(copied(run.get_parameters()))  # PyTorch's optimizers keep what they are given
        batch = run._sample_batch(BATCH_SIZE)
        for model in (run, plain):
            original = model._sample_batch
            train_on(model, batch)
            model._sample_batch = original  # type: ignore[method-assign]
        pairs = zip(run.q_net.parameters(), plain.q_net.parameters(), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) < 1e-6
    assert run._fast_update is not None


@pytest.mark.usefixtures("is_compiled")
def test_optimizer_state_is_the_same_so_that_either_path_can_go_on(tmp_path: Path) -> None:
    plain, fast = (make_model("vector", fast) for fast in (False, True))
    rng = np.random.default_rng(0)
    batches = [random_batch("vector", rng) for _ in range(40)]
    for batch in batches[:20]:
        train_on(plain, batch)
        train_on(fast, batch)
    for state, other in zip(*(m.policy.optimizer.state.values() for m in (plain, fast)), strict=True):
        assert state["step"] == other["step"] == 20
        assert th.allclose(state["exp_avg"], other["exp_avg"], atol=1e-12)
        assert th.allclose(state["exp_avg_sq"], other["exp_avg_sq"], atol=1e-12)
    # each goes on from the other's state
    plain_parameters, fast_parameters = (copied(model.get_parameters()) for model in (plain, fast))
    plain.set_parameters(fast_parameters)
    fast.set_parameters(plain_parameters)
    for batch in batches[20:]:
        train_on(plain, batch)
        train_on(fast, batch)
    assert largest_difference(plain, fast) < 1e-12


@pytest.mark.usefixtures("is_compiled")
def test_a_learning_rate_schedule_reaches_the_fast_path() -> None:
    plain, fast = (make_model("vector", fast, learning_rate=lambda progress: 1e-2 * progress) for fast in (False, True))
    rng = np.random.default_rng(0)
    for progress in (1.0, 0.5, 0.1):
        batch = random_batch("vector", rng)
        for model in (plain, fast):
            model._current_progress_remaining = progress
            train_on(model, batch)
    assert largest_difference(plain, fast) < 1e-12


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"activation_fn": nn.Tanh},
        {"activation_fn": lambda: nn.LeakyReLU(-0.5)},
        {"optimizer_class": th.optim.SGD},
        {"optimizer_class": th.optim.AdamW},
        {"optimizer_kwargs": {"weight_decay": 0.1}},
        {"optimizer_kwargs": {"amsgrad": True}},
    ],
)
def test_the_plain_path_is_taken_for_what_the_fast_one_does_not_do(policy_kwargs: dict[str, Any]) -> None:
    model = make_model("vector", fast=True, policy_kwargs=policy_kwargs)
    before = [parameter.clone() for parameter in model.q_net.parameters()]
    train_on(model, random_batch("vector", np.random.default_rng(0)))
    assert model._fast_update is None
    assert any((a != b).any() for a, b in zip(before, model.q_net.parameters(), strict=True))


@pytest.mark.parametrize("method", ["_gradient_step", "_clip_gradient"])
def test_a_subclass_with_an_update_of_its_own_is_asked(method: str) -> None:
    calls = []

    def counted(self: LectureDQN, *arguments: Any) -> Any:
        calls.append(method)
        return getattr(LectureDQN, method)(self, *arguments)

    subclass = type("Mine", (LectureDQN,), {method: counted})
    model = subclass("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, learning_starts=16, batch_size=4, seed=0)
    model.learn(40)
    assert len(calls) == model._n_updates > 0


class QNetworkOfAUsersOwn(QNetwork):
    """Reads the observations in its own way."""

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        return 2 * super().extract_features(obs, features_extractor)


class PolicyOfAUsersOwn(LectureDQNPolicy):
    """Makes such a network."""

    def make_q_net(self) -> QNetwork:
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        return QNetworkOfAUsersOwn(**net_args).to(self.device)


def test_features_of_a_users_own_are_used_for_training_and_acting() -> None:
    model = LectureDQN(PolicyOfAUsersOwn, "CartPole-v1", learning_starts=20, seed=0).learn(60)
    assert model._n_updates == 40
    assert model._fast_update is None
    assert model._fast_acting is None


def test_a_layer_that_was_exchanged_is_trained() -> None:
    model = make_model("vector", fast=True, dtype=th.float32)
    rng = np.random.default_rng(0)
    train_on(model, random_batch("vector", rng, th.float32))
    final_layer = nn.Linear(16, 3)
    model.policy.q_net.q_net[-1] = final_layer
    model.policy.optimizer = th.optim.Adam(model.policy.q_net.parameters())
    before = final_layer.weight.detach().clone()
    train_on(model, random_batch("vector", rng, th.float32))
    assert not th.equal(final_layer.weight, before)
    assert model._fast_update is not None


class BufferWithAField(ReplayBuffer):
    """Tells which transitions it drew, as a prioritized buffer does."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        samples = super()._get_samples(batch_inds, env)
        return SamplesWithIndices(*samples[:5], None, batch_inds)


class SamplesWithIndices(NamedTuple):
    """SB3's fields and one more."""

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    indices: np.ndarray


@pytest.mark.parametrize(("buffer_class", "draws"), [(None, [64]), (BufferWithAField, [16, 16, 16, 16])])
def test_a_buffer_that_we_do_not_know_is_asked_for_each_batch(buffer_class: Any, draws: list[int]) -> None:
    settings = {"learning_starts": 20, "batch_size": 16, "gradient_steps": 4, "replay_buffer_class": buffer_class}
    model = LectureDQN("MlpPolicy", "CartPole-v1", seed=0, **settings).learn(40)  # type: ignore[arg-type]
    buffer, asked = model.replay_buffer, []
    assert buffer is not None
    sample = buffer.sample
    buffer.sample = lambda size, env: (asked.append(size), sample(size, env))[1]  # type: ignore[method-assign, assignment]
    model.train(4, 16)
    assert asked == draws
    assert model._fast_update is not None


def test_a_batch_of_a_users_own_is_asked_for_with_its_own_size() -> None:
    class Mine(LectureDQN):
        def _sample_batch(self, batch_size: int) -> ReplayBufferSamples:
            asked.append(batch_size)
            return super()._sample_batch(batch_size)

    asked: list[int] = []
    Mine("MlpPolicy", "CartPole-v1", learning_starts=20, batch_size=16, train_freq=10, seed=0).learn(30)
    assert asked == [16] * 10


class BufferInFloat64(ReplayBuffer):
    """As one of a user's own that computes rewards by numpy."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(rewards=samples.rewards.double(), dones=samples.dones.double())


class BufferOfHalfBatches(ReplayBuffer):
    """Gives fewer transitions than it was asked for."""

    def sample(self, batch_size: int, env: Any = None) -> Any:
        return super().sample(batch_size // 2, env)


class BufferOfDoubleBatches(ReplayBuffer):
    """Gives more, as augmentation does."""

    def sample(self, batch_size: int, env: Any = None) -> Any:
        return super().sample(batch_size * 2, env)


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize("buffer_class", [BufferInFloat64, BufferOfHalfBatches, BufferOfDoubleBatches])
def test_both_paths_agree_on_what_a_buffer_of_a_users_own_gives(buffer_class: Any) -> None:
    def trained(fast: bool) -> LectureDQN:
        settings: dict[str, Any] = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 20, "batch_size": 16}
        model = LectureDQN("MlpPolicy", "CartPole-v1", seed=0, replay_buffer_class=buffer_class, **settings)
        if not fast:
            model._current_fast_update = lambda: None  # type: ignore[method-assign]
        return model.learn(40)

    plain, fast = trained(fast=False), trained(fast=True)
    assert fast._fast_update is not None
    assert plain._n_updates == fast._n_updates == 20
    assert largest_difference(plain, fast) < 1e-5


def freeze_a_layer(model: LectureDQN) -> None:
    model.q_net.q_net[0].requires_grad_(False)


def take_another_optimizer(model: LectureDQN) -> None:
    model.policy.optimizer = th.optim.SGD(model.q_net.parameters(), lr=1e-4)


def take_another_adam(model: LectureDQN) -> None:
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters())


def set_weight_decay(model: LectureDQN) -> None:
    model.policy.optimizer.param_groups[0]["weight_decay"] = 0.1


def set_amsgrad(model: LectureDQN) -> None:
    model.policy.optimizer.param_groups[0]["amsgrad"] = True
    for state in model.policy.optimizer.state.values():
        state["max_exp_avg_sq"] = th.ones_like(state["exp_avg_sq"])


def turn_the_optimizer_round(model: LectureDQN) -> None:
    model.policy.optimizer.param_groups[0]["maximize"] = True


def register_a_hook_of_a_parameter(model: LectureDQN) -> None:
    model.q_net.q_net[0].weight.register_hook(lambda gradient: -gradient)


def register_a_hook_after_accumulation(model: LectureDQN) -> None:
    def turn(weight: th.Tensor) -> None:
        assert weight.grad is not None
        weight.grad.neg_()

    model.q_net.q_net[0].weight.register_post_accumulate_grad_hook(turn)


def register_a_backward_pre_hook(model: LectureDQN) -> None:
    model.q_net.q_net[0].register_full_backward_pre_hook(lambda module, gradients: (-gradients[0],))


def register_a_full_backward_hook(model: LectureDQN) -> None:
    model.q_net.q_net[3].register_full_backward_hook(lambda module, gradients, _: (-gradients[0],))


def register_a_hook_of_the_target(model: LectureDQN) -> None:
    model.q_net_target.q_net[0].register_forward_hook(lambda module, inputs, output: -output)


def register_a_hook_of_the_optimizer(model: LectureDQN) -> None:
    model.policy.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.param_groups[0]["params"][0].data.mul_(0.5))


class DoubledNorm(nn.LayerNorm):
    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return 2 * super().forward(inputs)


def turn_the_optimizers_step_round(model: LectureDQN) -> None:
    optimizer = model.policy.optimizer
    step = optimizer.step

    def turned_step() -> None:
        for parameter in model.q_net.parameters():
            assert parameter.grad is not None
            parameter.grad.neg_()
        step()

    optimizer.step = turned_step  # type: ignore[method-assign, assignment]


def double_a_layers_outputs(model: LectureDQN) -> None:
    layer = model.q_net.q_net[0]
    forward = layer.forward
    layer.forward = lambda inputs: 2 * forward(inputs)


def double_the_targets_features(model: LectureDQN) -> None:
    target = model.q_net_target
    extract = target.extract_features
    target.extract_features = lambda *arguments: 2 * extract(*arguments)  # type: ignore[method-assign]


def set_the_slope_of_an_activation(model: LectureDQN) -> None:
    model.q_net.q_net[2].negative_slope = 0.9


def set_the_epsilon_of_a_layer_norm(model: LectureDQN) -> None:
    model.q_net.q_net[1].eps = 0.5


def put_the_parameters_elsewhere(model: LectureDQN) -> None:
    for theta in model.q_net.parameters():
        theta.data = theta.data + 1


def put_the_targets_parameters_elsewhere(model: LectureDQN) -> None:
    """As a hard copy does that assigns to ``data``."""
    for psi, theta in zip(model.q_net_target.parameters(), model.q_net.parameters(), strict=True):
        psi.data = theta.data + 1


def take_another_target_network_in_the_algorithm_alone(model: LectureDQN) -> None:
    model.q_net_target = copy.deepcopy(model.q_net)
    model.q_net_target.q_net[-1].bias.data.fill_(1.0)


def exchange_a_parameter_of_the_target(model: LectureDQN) -> None:
    layer = model.q_net_target.q_net[0]
    layer.weight = nn.Parameter(layer.weight.detach().flip(1))


def exchange_a_layer_norm(model: LectureDQN) -> None:
    model.q_net.q_net[1] = DoubledNorm(16, dtype=th.float64)
    take_another_adam(model)


@pytest.mark.parametrize(
    "change",
    [
        freeze_a_layer,
        take_another_optimizer,
        take_another_adam,
        set_weight_decay,
        set_amsgrad,
        turn_the_optimizer_round,
        register_a_hook_of_a_parameter,
        register_a_hook_after_accumulation,
        register_a_backward_pre_hook,
        register_a_full_backward_hook,
        register_a_hook_of_the_target,
        register_a_hook_of_the_optimizer,
        exchange_a_parameter_of_the_target,
        exchange_a_layer_norm,
        turn_the_optimizers_step_round,
        double_a_layers_outputs,
        double_the_targets_features,
        set_the_slope_of_an_activation,
        set_the_epsilon_of_a_layer_norm,
        put_the_parameters_elsewhere,
        put_the_targets_parameters_elsewhere,
        take_another_target_network_in_the_algorithm_alone,
    ],
)
def test_both_paths_agree_after_a_change_in_the_middle_of_a_run(change: Any) -> None:
    plain, fast, unchanged = make_model("vector", fast=False), make_model("vector", fast=True), make_model("vector", fast=True)
    batch = random_batch("vector", np.random.default_rng(0))
    for model in (plain, fast, unchanged):
        train_on(model, batch)
    for model in (plain, fast):
        change(model)
    for model in (plain, fast, unchanged):
        train_on(model, batch)
    assert largest_difference(plain, fast) < 1e-12
    assert largest_difference(fast, unchanged) > 1e-6


def test_both_paths_agree_when_a_frozen_layer_is_trained_again() -> None:
    plain, fast = (make_model("vector", fast) for fast in (False, True))
    batch = random_batch("vector", np.random.default_rng(0))
    for requires_grad in (False, False, False, True, True):
        for model in (plain, fast):
            model.q_net.q_net[0].requires_grad_(requires_grad)
            train_on(model, batch)
    assert largest_difference(plain, fast) < 1e-12


class Standardised(FlattenExtractor):
    """An encoder without parameters to train, whose output depends on the whole batch and on the mode."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(5, affine=False)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.norm(super().forward(observations))
        return features


class Pretrained(FlattenExtractor):
    """An encoder that somebody forgot to freeze, and runs without gradient."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.linear = nn.Linear(5, 5)

    @th.no_grad()
    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.linear(super().forward(observations))
        return features


@pytest.mark.parametrize("encoder", [Standardised, Pretrained])
def test_both_paths_agree_behind_an_encoder_of_a_users_own(encoder: type[BaseFeaturesExtractor]) -> None:
    policy_kwargs = {"features_extractor_class": encoder}
    plain, fast = (make_model("vector", fast, th.float32, policy_kwargs=policy_kwargs) for fast in (False, True))
    rng = np.random.default_rng(0)
    batches = [random_batch("vector", rng, th.float32) for _ in range(4)]
    for batch in batches:
        train_on(plain, batch)
    together = [th.cat(values) for values in zip(*(batch[:5] for batch in batches), strict=True)]
    assert fast.replay_buffer is not None
    fast.replay_buffer.sample = lambda *_, **__: ReplayBufferSamples(*together)  # type: ignore[method-assign]
    fast.target_update_interval = plain.target_update_interval = 1_000
    fast.train(gradient_steps=4, batch_size=BATCH_SIZE)
    assert fast._fast_update is not None
    assert largest_difference(plain, fast) < 1e-5
    assert largest_difference(plain, make_model("vector", False, th.float32, policy_kwargs=policy_kwargs)) > 1e-4


class Dueling(nn.Module):
    """Q(s, a) = V(s) + A(s, a) − mean A(s, ·)."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.advantage = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, features: th.Tensor) -> th.Tensor:
        advantage = self.advantage(features)
        q_values: th.Tensor = self.value(features) + advantage - advantage.mean(dim=1, keepdim=True)
        return q_values


class DuelingPolicy(LectureDQNPolicy):
    def make_q_net(self) -> QNetwork:
        q_net = super().make_q_net()
        q_net.q_net = Dueling()  # type: ignore[assignment]
        return q_net


class NegativeHead(nn.Sequential):
    def forward(self, features: th.Tensor) -> th.Tensor:
        return -super().forward(features)


class NegativePolicy(LectureDQNPolicy):
    def make_q_net(self) -> QNetwork:
        q_net = super().make_q_net()
        q_net.q_net = NegativeHead(*q_net.q_net)
        return q_net


class PolicyWithoutABias(LectureDQNPolicy):
    def make_q_net(self) -> QNetwork:
        q_net = super().make_q_net()
        q_net.q_net[0] = nn.Linear(4, 256, bias=False)
        return q_net


class PolicyWithoutABiasOfALayerNorm(LectureDQNPolicy):
    def make_q_net(self) -> QNetwork:
        q_net = super().make_q_net()
        q_net.q_net[1] = nn.LayerNorm(256, bias=False)
        return q_net


@pytest.mark.parametrize("policy", [DuelingPolicy, NegativePolicy, PolicyWithoutABias, PolicyWithoutABiasOfALayerNorm])
def test_a_head_of_a_users_own_is_trained_and_acts_by_itself(policy: type[LectureDQNPolicy]) -> None:
    model = LectureDQN(policy, "CartPole-v1", learning_starts=20, seed=0)
    before = [parameter.clone() for parameter in model.q_net.parameters()]
    model.learn(60)
    assert model._fast_update is None
    assert model._fast_acting is None
    assert any(not th.equal(a, b) for a, b in zip(before, model.q_net.parameters(), strict=True))


class OtherPolicyObject(nn.Module):
    """What ``torch.compile`` makes of a policy: another module around it, with its attributes."""

    def __init__(self, policy: LectureDQNPolicy) -> None:
        super().__init__()
        self._orig_mod = policy

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)


def test_a_policy_in_a_wrapper_like_that_of_torch_compile_is_trained() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, seed=0)
    model.policy = OtherPolicyObject(model.policy)  # type: ignore[assignment]
    model.learn(60)
    assert model._n_updates == 40
    assert model._fast_update is None


class EncoderInFloat64(FlattenExtractor):
    """Computes in float64 and gives float32."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.linear = nn.Linear(4, 4, dtype=th.float64)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.linear(super().forward(observations).double())
        return features.float()


def test_a_network_of_two_precisions_is_trained_in_both() -> None:
    policy_kwargs = {"features_extractor_class": EncoderInFloat64}
    model = LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, learning_starts=20, seed=0)
    before = [parameter.clone() for parameter in model.q_net.parameters()]
    model.learn(60)
    assert model._n_updates == 40
    assert model._fast_update is None
    for a, b in zip(before, model.q_net.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert not th.equal(a, b)


def test_parameters_in_shared_memory_stay_there() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, seed=0).learn(60)
    model.policy.share_memory()
    model.learn(20, reset_num_timesteps=False)
    assert all(parameter.is_shared() for parameter in model.policy.parameters())


def test_training_with_automatic_mixed_precision_is_the_plain_path() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, seed=0)
    with th.autocast("cpu", th.bfloat16):
        model.learn(60)
    assert model._n_updates == 40
    assert model._fast_update is None


@pytest.mark.parametrize("place", ["", "q_net", "q_net.0", "features_extractor", "features_extractor.flatten"])
def test_a_hook_that_appears_in_the_middle_of_a_run_is_called(place: str) -> None:
    model = make_model("vector", fast=True, dtype=th.float32)
    batch = random_batch("vector", np.random.default_rng(0), th.float32)
    train_on(model, batch)
    assert model._fast_update is not None
    calls: list[int] = []
    model.q_net.get_submodule(place).register_forward_hook(lambda *_: calls.append(1))
    train_on(model, batch)
    assert calls == [1]


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_a_hook_of_all_modules_is_called(register: Any) -> None:
    model = make_model("vector", fast=True, dtype=th.float32)
    batch = random_batch("vector", np.random.default_rng(0), th.float32)
    train_on(model, batch)
    calls: list[nn.Module] = []
    handle = register(lambda module, *_: calls.append(module))
    try:
        train_on(model, batch)
    finally:
        handle.remove()
    assert {model.q_net, model.q_net.q_net[0], model.q_net_target} <= set(calls)


def test_a_hook_of_all_optimizers_is_called() -> None:
    model = make_model("vector", fast=True, dtype=th.float32)
    batch = random_batch("vector", np.random.default_rng(0), th.float32)
    train_on(model, batch)
    calls: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    try:
        train_on(model, batch)
    finally:
        handle.remove()
    assert calls == [model.policy.optimizer]


def test_a_learning_rate_scheduler_of_pytorch_sees_the_steps(recwarn: pytest.WarningsRecorder) -> None:
    model = make_model("vector", fast=True, dtype=th.float32)
    scheduler = th.optim.lr_scheduler.ExponentialLR(model.policy.optimizer, 0.5)
    train_on(model, random_batch("vector", np.random.default_rng(0), th.float32))
    scheduler.step()
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_an_update_put_into_the_object_is_asked() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, learning_starts=16, batch_size=4, seed=0)
    calls: list[int] = []
    step = model._gradient_step
    model._gradient_step = lambda batch: (calls.append(1), step(batch))[1]  # type: ignore[method-assign]
    model.learn(40)
    assert len(calls) == model._n_updates > 0


def test_a_pickle_of_a_trained_model_is_not_larger_than_its_contents() -> None:
    model = make_model("vector", fast=True)
    size_before = len(cloudpickle.dumps(model))
    train_on(model, random_batch("vector", np.random.default_rng(0)))
    del model._sample_batch
    n_bytes = sum(parameter.nbytes for parameter in model.q_net.parameters())
    pickled = cloudpickle.dumps(model)
    assert len(pickled) < size_before + 5 * n_bytes  # gradients and two moments, and what pickle adds
    loaded = cloudpickle.loads(pickled)
    assert loaded.q_net.q_net[0].weight.untyped_storage().nbytes() == loaded.q_net.q_net[0].weight.nbytes
    for either in (model, loaded):
        train_on(either, random_batch("vector", np.random.default_rng(1)))
    assert largest_difference(model, loaded) == 0


def test_a_file_holds_the_parameters_alone(tmp_path: Path) -> None:
    model = make_model("vector", fast=True, dtype=th.float32)
    train_on(model, random_batch("vector", np.random.default_rng(0), th.float32))
    model.save(tmp_path / "fast")
    plain = make_model("vector", fast=False, dtype=th.float32)
    train_on(plain, random_batch("vector", np.random.default_rng(0), th.float32))
    plain.save(tmp_path / "plain")
    sizes = [(tmp_path / name).with_suffix(".zip").stat().st_size for name in ("fast", "plain")]
    assert sizes[0] < 1.1 * sizes[1]


def test_what_training_leaves_behind_can_be_differentiated() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, batch_size=8, learning_rate=1e-3, seed=0).learn(60)
    assert model._fast_update is not None
    parameters = list(model.policy.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    moments = [part for state in model.policy.optimizer.state.values() for part in state.values()]
    assert not any(tensor.is_inference() for tensor in (*parameters, *gradients, *moments))
    before = [p.detach().clone() for p in model.q_net.parameters()]
    model.policy.optimizer.zero_grad()
    model.q_net(th.zeros(1, 4)).sum().backward()
    model.policy.optimizer.step()
    assert all(not th.equal(a, b) for a, b in zip(before[-2:], list(model.q_net.parameters())[-2:], strict=True))


def test_gradients_that_somebody_dropped_are_made_again() -> None:
    model = make_model("vector", fast=True)
    batch = random_batch("vector", np.random.default_rng(0))
    train_on(model, batch)
    first = model._fast_update
    model.policy.optimizer.zero_grad()
    train_on(model, batch)
    assert model._fast_update is not first
    assert model._n_updates == 2
