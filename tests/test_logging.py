"""What is logged, and that logging does not wait for the device at every gradient step."""

import copy
import csv
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.metrics import RunningMeans


def joined(kept: Sequence[Sequence[th.Tensor]]) -> th.Tensor:
    return th.stack([th.cat(values) for values in zip(*kept, strict=True)])


def test_running_means_are_means_since_the_last_read() -> None:
    means = RunningMeans(("loss", "q_values"))
    assert means.pop() == {}
    means.add(joined, (th.tensor([1.0]), th.tensor([10.0])))
    means.add(joined, (th.tensor([3.0, 2.0]), th.tensor([20.0, 0.0])))
    assert means.pop() == {"loss": 2.0, "q_values": 10.0}
    means.add(joined, (th.tensor([5.0]), th.tensor([0.0])))
    assert means.pop() == {"loss": 5.0, "q_values": 0.0}
    assert means.pop() == {}


def test_running_means_of_two_kinds_are_computed_by_one_call_for_each_row_of_a_kind() -> None:
    calls: list[int] = []

    def doubled(kept: Sequence[float]) -> th.Tensor:
        calls.append(len(kept))
        return 2 * th.tensor([kept])

    means = RunningMeans(("loss",))
    means.add(doubled, 1.0)
    means.add(doubled, 2.0)
    means.add(joined, [th.tensor([3.0])])
    means.add(doubled, 4.5)
    assert means.pop() == {"loss": 4.5}
    assert calls == [2, 1]


def test_running_means_go_on_from_a_pickle() -> None:
    means = RunningMeans(("loss",))
    for value in (1.0, 2.0):
        means.add(joined, [th.tensor([value])])
        means = pickle.loads(pickle.dumps(means))
    means.add(joined, [th.tensor([6.0])])
    assert means.pop() == {"loss": 3.0}


def test_running_means_of_a_device_are_pickled_for_any_other() -> None:
    means = RunningMeans(("loss",))
    means.add(joined, [th.tensor([1.0])])
    means.pop()
    means._sums = mock.Mock(cpu=lambda: th.tensor([2.0]))
    assert means.__getstate__()["_sums"].tolist() == [2.0]


class BufferThatOverwrites(ReplayBuffer):
    """Gives the same tensors for each batch of a size."""

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        samples = super().sample(batch_size, env)
        given: ReplayBufferSamples = self.__dict__.setdefault("given", {}).setdefault(batch_size, samples)
        for kept, drawn in zip(given[:5], samples[:5], strict=True):
            kept.copy_(drawn)
        return given


@pytest.mark.parametrize("buffer_class", [None, BufferThatOverwrites])
def test_metrics_of_training_calls_with_batches_of_different_sizes_are_those_of_each(buffer_class: Any) -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, replay_buffer_class=buffer_class, seed=0)
    model.learn(60)
    means = []
    for at_once in (True, False):
        other = copy.deepcopy(model)
        other._training_metrics.pop()
        sums = th.zeros(4, dtype=th.float64)
        for batch_size in (32, 32, 64, 32):
            other.train(2, batch_size)
            if not at_once:
                sums += th.tensor(list(other._training_metrics.pop().values()))
        means.append(list(other._training_metrics.pop().values()) if at_once else (sums / 4).tolist())
    assert means[0] == pytest.approx(means[1], rel=1e-5)


@pytest.mark.parametrize("is_fast", [True, False])
def test_the_metrics_are_the_loss_the_means_and_the_norm_of_the_gradient_before_clipping(is_fast: bool) -> None:
    settings: dict[str, Any] = {"learning_starts": 20, "max_grad_norm": 1e-3, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
    model = LectureDQN("MlpPolicy", "CartPole-v1", **settings).learn(60)
    if not is_fast:
        model._current_fast_update = lambda: None  # type: ignore[method-assign]
    model._training_metrics.pop()
    batch = model._sample_batch(32)
    model._sample_batch = lambda _: batch  # type: ignore[method-assign]
    with th.no_grad():
        next_values = model.q_net_target(batch.next_observations).max(dim=1, keepdim=True).values
        targets = batch.rewards + (1 - batch.dones) * model.gamma * next_values
    q_values = model.q_net(batch.observations).gather(1, batch.actions)
    loss = (q_values - targets).pow(2).mean()
    gradients = th.autograd.grad(loss, list(model.q_net.parameters()))
    norm = th.cat([gradient.flatten() for gradient in gradients]).norm()
    model.train(1, 32)
    values = {"loss": loss, "q_values": q_values.mean(), "td_target": targets.mean(), "gradient_norm": norm}
    assert norm > 1e-3
    assert model._training_metrics.pop() == pytest.approx({name: value.item() for name, value in values.items()}, rel=1e-4)


def test_a_metric_keeps_no_graph_alive() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, policy_kwargs={"activation_fn": th.nn.Tanh}, seed=0)
    model.learn(60).train(4, 32)
    assert model._training_metrics._not_summed
    all_values = [metrics_of([kept]) for metrics_of, kept in model._training_metrics._not_summed]
    assert not any(value.requires_grad for values in all_values for value in values)


def train_with_log(folder: Path, **kwargs: Any) -> tuple[LectureDQN, list[dict[str, str]]]:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, policy_kwargs={"net_arch": [8]}, seed=0, **kwargs)
    model.set_logger(configure(str(folder), ["csv"]))
    model.learn(600, log_interval=2)
    model.logger.close()
    with (folder / "progress.csv").open() as file:
        return model, list(csv.DictReader(file))


def test_every_promised_value_is_logged(tmp_path: Path) -> None:
    model, rows = train_with_log(tmp_path, learning_rate=1e-3)
    last = {key: float(value) for key, value in rows[-1].items() if value}
    names = ("loss", "q_values", "td_target", "gradient_norm", "learning_rate", "n_updates")
    assert set(last) >= {f"train/{name}" for name in names} | {"rollout/exploration_rate", "rollout/ep_rew_mean"}
    assert last["rollout/exploration_rate"] == model.exploration_final_eps
    assert last["train/learning_rate"] == 1e-3
    assert last["train/gradient_norm"] > 0
    # rewards are 1, so a target is at least near 1, and Q goes towards it
    assert last["train/td_target"] > last["train/q_values"] * 0.5 > 0


@pytest.mark.parametrize("activation_fn", [th.nn.LeakyReLU, th.nn.Tanh], ids=["fast update", "plain update"])
def test_metrics_are_logged_as_soon_as_an_interval_is_over_whatever_a_call_trains_at_once(
    activation_fn: type[th.nn.Module],
) -> None:
    policy_kwargs = {"net_arch": [8], "activation_fn": activation_fn}
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=200, policy_kwargs=policy_kwargs, seed=0).learn(200)
    for n_steps, is_logged in ((60, False), (60, True), (60, False), (20, True)):
        model.logger.name_to_value.clear()
        model.train(n_steps, 16)
        assert ("train/loss" in model.logger.name_to_value) == is_logged
    assert model._n_updates == 2 * model.metrics_interval
    assert model._training_metrics.pop() == {}  # those of the last step were logged too


def test_the_end_of_a_training_logs_what_the_last_interval_has_not() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, policy_kwargs={"net_arch": [8]}, seed=0).learn(40)
    assert 0 < model._n_updates < model.metrics_interval
    assert model.logger.name_to_value["train/loss"] > 0


def test_the_device_is_read_once_in_many_gradient_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original = getattr(th.Tensor, name)

        def counted(tensor: th.Tensor, *args: Any, _name: str = name, _original: Any = original) -> Any:
            reads.append(_name)
            return _original(tensor, *args)

        monkeypatch.setattr(th.Tensor, name, counted)
    # Adam reads its own step counter, which PyTorch keeps on the CPU; SGD has none
    policy_kwargs = {"net_arch": [8], "optimizer_class": th.optim.SGD}
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=20, policy_kwargs=policy_kwargs, seed=0)
    model.learn(40)
    reads.clear()
    model.train(gradient_steps=50, batch_size=16)
    assert model._n_updates < model.metrics_interval
    assert reads == []
    model.train(gradient_steps=model.metrics_interval, batch_size=16)
    assert reads == ["tolist"]
