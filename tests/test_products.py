"""The matrix products of a Linear layer are the same by either library, and the quicker one is taken."""

import copy
import math
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numba
import pytest
import torch as th
from both_paths import copied, largest_difference
from stable_baselines3.common.env_util import make_vec_env

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast import products
from sb3_lecture_dqn.fast.products import LARGE_PRODUCT, LinearTensors, affine, inputs_gradient, write_gradients
from sb3_lecture_dqn.fast.second_thread import SecondThread, Work

pytestmark = pytest.mark.skipif(
    products.ONEDNN_LINEAR is None, reason="this build of PyTorch has no oneDNN, so all products are its own"
)


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's functions multiply by themselves."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is the quicker one; the shapes of the products that it is asked for."""
    shapes: list[tuple[int, ...]] = []
    operation = products.ONEDNN_LINEAR

    def noted(inputs: th.Tensor, weight: th.Tensor, *rest: Any) -> th.Tensor:
        shapes.append((*inputs.shape, *weight.shape))
        result: th.Tensor = operation(inputs, weight, *rest)
        return result

    monkeypatch.setattr(products, "ONEDNN_LINEAR", noted)
    monkeypatch.setattr(products, "is_onednn_quicker", lambda: True)
    return shapes


def layer(n_inputs: int, n_outputs: int, dtype: th.dtype = th.float32) -> LinearTensors:
    return LinearTensors.of(th.randn(n_outputs, n_inputs, dtype=dtype), th.randn(n_outputs, dtype=dtype))


@pytest.mark.parametrize(("n_rows", "n_inputs", "n_outputs"), [(32, 256, 256), (129, 256, 128), (700, 61, 50), (64, 128, 257)])
def test_products_by_onednn_are_those_of_pytorchs_own(
    calls: list[tuple[int, ...]], n_rows: int, n_inputs: int, n_outputs: int
) -> None:
    th.manual_seed(0)
    linear, gradients = layer(n_inputs, n_outputs), layer(n_inputs, n_outputs)
    inputs, gradient = th.randn(n_rows, n_inputs), th.randn(n_rows, n_outputs)
    close: Callable[..., bool] = lambda a, b: th.allclose(a, b.float(), rtol=1e-5, atol=1e-4)  # noqa: E731
    exact_weight, exact_bias = linear.weight.double(), linear.bias.double()
    assert close(affine(linear, inputs), inputs.double() @ exact_weight.t() + exact_bias)
    assert close(inputs_gradient(linear, gradient), gradient.double() @ exact_weight)
    write_gradients(gradients, inputs, gradient)
    assert close(gradients.weight, gradient.double().t() @ inputs.double())
    assert close(gradients.bias, gradient.double().sum(dim=0))
    assert len(calls) == 3


@pytest.mark.usefixtures("calls")
def test_a_factor_with_gaps_is_put_into_one_piece_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN takes a thousand times as long for it."""
    operation, weights = products.ONEDNN_LINEAR, []
    monkeypatch.setattr(products, "ONEDNN_LINEAR", lambda x, w, *rest: (weights.append(w), operation(x, w, *rest))[1])
    gradients, gradient = layer(256, 256), th.randn(128, 256)
    inputs = th.randn(128, 4, 256)[:, 1]
    write_gradients(gradients, inputs, gradient)
    assert th.allclose(gradients.weight.double(), gradient.double().t() @ inputs.double(), rtol=1e-5, atol=1e-4)
    assert [weight.t().is_contiguous() for weight in weights] == [True]


@pytest.mark.usefixtures("calls")
def test_other_devices_and_who_switched_onednn_off_have_pytorchs_own_products() -> None:
    assert layer(8, 256).onednn_rows < math.inf
    of_no_cpu = LinearTensors.of(th.empty(256, 8, device="meta"), th.empty(256, device="meta"))
    with th.backends.mkldnn.flags(enabled=False):
        switched_off = layer(8, 256)
    for linear in (of_no_cpu, switched_off):
        assert linear.onednn_rows == math.inf


def test_only_large_float32_products_are_onednns(calls: list[tuple[int, ...]]) -> None:
    large = LARGE_PRODUCT // (256 * 256)
    affine(layer(256, 256), th.randn(large - 1, 256))
    affine(layer(256, 256, th.float64), th.randn(2 * large, 256, dtype=th.float64))
    assert calls == []
    affine(layer(256, 256), th.randn(large, 256))
    assert calls == [(large, 256, 256, 256)]


@pytest.mark.parametrize(
    ("capability", "description", "has", "expected"),
    [
        ("AVX512", "vendor_id : AuthenticAMD", (True, True), True),
        ("AVX512", "vendor_id : GenuineIntel", (True, True), False),
        ("AVX512", "", (True, True), False),
        ("AVX2", "vendor_id : AuthenticAMD", (True, True), False),
        ("AVX512", "vendor_id : AuthenticAMD", (False, True), False),
        ("AVX512", "vendor_id : AuthenticAMD", (True, False), False),
    ],
)
def test_onednn_is_taken_where_mkl_leaves_avx_512_idle(
    monkeypatch: pytest.MonkeyPatch, capability: str, description: str, has: tuple[bool, bool], expected: bool
) -> None:
    monkeypatch.setattr(th.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(th.backends.mkl, "is_available", lambda: has[0])
    monkeypatch.setattr(th.backends.mkldnn, "is_available", lambda: has[1])
    monkeypatch.setattr(products, "processor_description", lambda: description)
    products.is_onednn_quicker.cache_clear()
    assert products.is_onednn_quicker() == expected
    products.is_onednn_quicker.cache_clear()


def test_without_the_operation_all_products_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ONEDNN_LINEAR", None)
    monkeypatch.setattr(th.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "processor_description", lambda: "AuthenticAMD")
    products.is_onednn_quicker.cache_clear()
    assert not products.is_onednn_quicker()
    products.is_onednn_quicker.cache_clear()


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="only Linux on x86 has a vendor_id in /proc/cpuinfo"
)
def test_the_system_names_the_processors_maker() -> None:
    assert re.search(r"^vendor_id\s*: \w+$", products.processor_description(), re.MULTILINE)


def test_a_system_that_tells_nothing_of_its_processor_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert products.processor_description() == platform.processor()


SETTINGS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "batch_size": 128,
    "learning_starts": 50,
    "seed": 0,
    "policy_kwargs": {"net_arch": [256, 256]},
}


@pytest.mark.usefixtures("without_a_compiler")
def test_one_float32_update_by_onednn_agrees_with_the_plain_path_at_100_points_of_a_real_run(
    calls: list[tuple[int, ...]],
) -> None:
    run = LectureDQN("MlpPolicy", gymnasium.make("CartPole-v1"), gradient_steps=1, **SETTINGS)
    run.learn(60)
    plain = LectureDQN("MlpPolicy", gymnasium.make("CartPole-v1"), **SETTINGS)
    plain._current_fast_update = lambda: None  # type: ignore[method-assign]
    plain._setup_learn(100)
    plain.replay_buffer = run.replay_buffer
    for _ in range(100):
        run.learn(4, reset_num_timesteps=False)
        plain.set_parameters(copied(run.get_parameters()))
        plain.random_generator = copy.deepcopy(run.random_generator)
        calls.clear()
        for model in (run, plain):
            model.train(1, 128)
        assert len(calls) == 4  # Q(s', ·, ψ), Q(s, ·, θ), and the gradients of the inputs and of the weights
        assert largest_difference(plain, run) < 1e-6


@pytest.mark.usefixtures("calls")
def test_a_run_with_automatic_mixed_precision_acts_by_the_policy_itself() -> None:
    env = make_vec_env("CartPole-v1", n_envs=64)
    model = LectureDQN("MlpPolicy", env, exploration_initial_eps=0, exploration_final_eps=0, **SETTINGS)
    with th.autocast("cpu", th.bfloat16):
        model.learn(256)
    assert model._n_updates > 0
    model.learn(256, reset_num_timesteps=False)


@pytest.mark.usefixtures("without_a_compiler")
def test_either_thread_computes_the_same_by_onednn(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecondThread, "repetitions", 0)
    parameters = []
    for work in Work:
        th.set_num_threads(2)
        model = LectureDQN("MlpPolicy", gymnasium.make("CartPole-v1"), train_freq=4, gradient_steps=4, **SETTINGS)
        model.learn(56)
        assert model._fast_update is not None
        model._fast_update.second_thread._best = work
        model.learn(100, reset_num_timesteps=False)
        assert model._fast_update.second_thread._given == work
        parameters.append(copied(model.get_parameters()["policy"]))
    assert calls
    for others in parameters[1:]:
        assert all(th.equal(parameters[0][name], value) for name, value in others.items())
