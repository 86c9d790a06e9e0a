"""The target network (L13): ψ = θ at the start, then a hard copy every so many steps."""

from typing import Any

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_lecture_dqn import LectureDQN


class WatchTarget(BaseCallback):
    """Notes after each training whether ψ equals θ as it was before it."""

    def __init__(self) -> None:
        super().__init__()
        self.synced_at: list[int] = []
        self.psi: list[th.Tensor] = []

    def _on_step(self) -> bool:
        assert isinstance(self.model, LectureDQN)
        psi = next(self.model.q_net_target.parameters()).detach().clone()
        if self.psi and not th.equal(self.psi[-1], psi):
            # the change happened after the previous step of the environments
            self.synced_at.append(self.num_timesteps - self.training_env.num_envs)
        self.psi.append(psi)
        return True


def sync_steps(n_envs: int, steps: int, **kwargs: Any) -> list[int]:
    model = LectureDQN(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=n_envs, seed=0),
        learning_starts=0,
        train_freq=1,
        gradient_steps=1,
        batch_size=4,
        policy_kwargs={"net_arch": [8]},
        seed=0,
        **kwargs,
    )
    watch = WatchTarget()
    model.learn(steps, callback=watch)
    return watch.synced_at


def test_target_network_changes_exactly_every_interval() -> None:
    assert sync_steps(1, 95, target_update_interval=20) == [20, 40, 60, 80]


def test_interval_counts_the_steps_of_all_environments() -> None:
    assert sync_steps(4, 200, target_update_interval=40) == [40, 80, 120, 160]


def test_a_warning_tells_when_the_interval_is_shorter_than_one_step_of_all_environments() -> None:
    with pytest.warns(UserWarning, match="target_update_interval"):
        steps = sync_steps(4, 40, target_update_interval=2)
    assert steps == list(range(8, 40, 4))


def set_parameters(network: nn.Module, value: float) -> None:
    with th.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 1.0), (0.25, 0.25)])
def test_sync_copies_hard_by_default_and_softly_with_tau(tau: float, expected: float) -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", target_update_interval=3, tau=tau)
    model._setup_learn(100)
    set_parameters(model.q_net, 1.0)
    set_parameters(model.q_net_target, 0.0)
    seen = []
    for _ in range(3):
        model._on_step()
        seen.append({parameter.item() for tensor in model.q_net_target.parameters() for parameter in tensor.flatten()})
    assert seen == [{0.0}, {0.0}, {expected}]


def test_default_tau_is_the_hard_copy() -> None:
    assert LectureDQN("MlpPolicy", "CartPole-v1").tau == 1.0


def test_batch_norm_statistics_are_copied_hard_whatever_tau_is() -> None:
    class NormalisedExtractor(nn.Module):
        def __init__(self, observation_space: Any) -> None:
            super().__init__()
            self.features_dim = observation_space.shape[0]
            self.norm = nn.BatchNorm1d(self.features_dim)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            normalised: th.Tensor = self.norm(observations)
            return normalised

    model = LectureDQN(
        "MlpPolicy",
        "CartPole-v1",
        target_update_interval=1,
        tau=0.25,
        policy_kwargs={"features_extractor_class": NormalisedExtractor},
    )
    assert len(model.batch_norm_stats) == 2
    model._setup_learn(100)
    for statistic in model.batch_norm_stats:
        statistic.fill_(3.0)
    model._on_step()
    assert all((statistic == 3.0).all() for statistic in model.batch_norm_stats_target)
