"""What Numba compiles computes what PyTorch computes, to the same bits in each process, and only where it fits."""

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numba
import numpy as np
import pytest
import torch as th
from both_paths import BATCH_SIZE, DoubleFlatten, make_model, random_batch, train_on
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch.nn import functional

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast import compiled_head, compiled_update, compiling, kernels
from sb3_lecture_dqn.fast.acting import FastActing
from sb3_lecture_dqn.fast.adam import FlatAdam
from sb3_lecture_dqn.fast.compiled_head import CompiledHead
from sb3_lecture_dqn.fast.compiled_update import CompiledAdam, CompiledUpdate
from sb3_lecture_dqn.fast.compiling import Use, can_compile
from sb3_lecture_dqn.fast.head import read_head
from sb3_lecture_dqn.fast.second_thread import Task, Work
from sb3_lecture_dqn.fast.stored_transitions import Transitions
from sb3_lecture_dqn.fast.threads import SMALL_WORK
from sb3_lecture_dqn.fast.update import FastUpdate
from sb3_lecture_dqn.lecture_dqn import squared_td_error, td_target

DTYPES = [np.float32, np.float64]
# rows and columns of a product that are fewer than those of a tile, as many, a few more, and none of these
SIZES = [(1, 1, 1), (5, 3, 2), (8, 4, 32), (9, 8, 33), (130, 33, 7), (13, 7, 257), (70, 16, 37), (128, 256, 256)]


def random(*shape: int, dtype: Any) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def assert_close(ours: np.ndarray, theirs: th.Tensor) -> None:
    tolerance = 1e-12 if ours.dtype == np.float64 else 2e-5
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "n_inputs", "n_outputs"), SIZES)
def test_products_are_pytorchs(n_rows: int, n_inputs: int, n_outputs: int, dtype: Any) -> None:
    a, b, bias = (random(*shape, dtype=dtype) for shape in ((n_rows, n_inputs), (n_inputs, n_outputs), (n_outputs,)))
    expected = th.addmm(*map(th.from_numpy, (bias, a, b)))
    for factor in (a, np.asfortranarray(a)):  # the gradient of a weight has a transpose on its left
        out = np.full((n_rows, n_outputs), np.nan, dtype)
        kernels.multiply(factor, b, bias, out)
        assert_close(out / dtype(n_inputs), expected / n_inputs)
        of_transpose = np.full((n_rows, n_outputs), np.nan, dtype)
        kernels.multiply_transposed(factor, np.ascontiguousarray(b.T), bias, of_transpose)
        np.testing.assert_array_equal(of_transpose, out)
    transposed = np.full((n_inputs, n_rows), np.nan, dtype)
    kernels.transpose(a, transposed)
    np.testing.assert_array_equal(transposed, a.T)


@pytest.mark.parametrize("n_columns", [3, 70])
def test_a_row_of_a_product_does_not_depend_on_the_others(n_columns: int) -> None:
    a, b, bias = (random(*shape, dtype=np.float32) for shape in ((40, 9), (9, n_columns), (n_columns,)))
    all_rows, one_row, some_rows = (np.empty((n, n_columns), np.float32) for n in (40, 1, 11))
    kernels.multiply(a, b, bias, all_rows)
    kernels.multiply(a[7:8], b, bias, one_row)
    kernels.multiply(a[5:16], b, bias, some_rows)
    np.testing.assert_array_equal(one_row, all_rows[7:8])
    np.testing.assert_array_equal(some_rows, all_rows[5:16])


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("+avx,+avx2,+avx512f", (64, 32)),
        ("+sse2,+avx,-avx512f", (32, 16)),
        ("+neon", (16, 32)),
        ("+sse2", (16, 16)),
        (None, (16, 16)),
    ],
)
def test_tiles_are_made_for_the_processor_that_numba_is_told_of(
    monkeypatch: pytest.MonkeyPatch, features: str | None, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(numba.config, "CPU_NAME", "some")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    assert kernels.registers() == expected


def test_a_processor_that_llvm_knows_nothing_of_gets_the_smallest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError

    monkeypatch.setattr(numba.config, "CPU_NAME", None)
    monkeypatch.setattr(kernels.binding, "get_host_cpu_features", refuse)
    assert kernels.registers() == (16, 16)


PRODUCT = """
import numpy as np
from sb3_lecture_dqn.fast import kernels

for n_rows, n_inputs, n_outputs in [(3, 5, 40), (9, 8, 33), (128, 64, 64)]:
    a, b = (np.random.default_rng(0).normal(size=shape) for shape in ((n_rows, n_inputs), (n_inputs, n_outputs)))
    for dtype in (np.float32, np.float64):
        out = np.empty((n_rows, n_outputs), dtype)
        kernels.multiply(a.astype(dtype), b.astype(dtype), np.ones(n_outputs, dtype), out)
        np.testing.assert_allclose(out, a @ b + 1, rtol=1e-5, atol=1e-5)
        kernels.multiply_transposed(a.astype(dtype), b.T.astype(dtype, order="C"), np.ones(n_outputs, dtype), out)
        np.testing.assert_allclose(out, a @ b + 1, rtol=1e-5, atol=1e-5)
print(kernels.REGISTERS.n_bytes)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the features are those of x86 processors")
@pytest.mark.parametrize(("features", "n_bytes"), [("+sse2", 16), ("+avx", 32)])
def test_products_are_right_on_smaller_processors(tmp_path: Path, features: str, n_bytes: int) -> None:
    told = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PRODUCT], env={**os.environ, **told}, capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{n_bytes}\n"


class Layer:
    """LayerNorm → LeakyReLU by PyTorch, on the numbers that the kernels get."""

    def __init__(self, n_rows: int, n: int, dtype: Any, slope: float) -> None:
        self.slope, self.dtype = slope, dtype
        self.outputs, self.gradient = random(n_rows, n, dtype=dtype), random(n_rows, n, dtype=dtype)[::-1].copy()
        self.weight, self.bias = random(n, dtype=dtype), random(n, dtype=dtype)[::-1].copy()
        tensors = [th.tensor(array, requires_grad=True) for array in (self.outputs, self.weight, self.bias)]
        normalised = functional.layer_norm(tensors[0], [n], *tensors[1:], eps=0.1)
        self.expected = functional.leaky_relu(normalised, slope)
        self.expected_gradients = th.autograd.grad(self.expected, tensors, th.from_numpy(self.gradient))

    def activations(self, in_place: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        outputs = self.outputs.copy()
        activations = outputs if in_place else np.full_like(outputs, np.nan)
        means, rstds = np.full((2, len(outputs)), np.nan, self.dtype)
        settings = self.dtype(0.1), self.dtype(self.slope)
        kernels.normalise_and_activate(outputs, self.weight, self.bias, *settings, activations, means, rstds)
        return activations, means, rstds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.5])
@pytest.mark.parametrize(("n_rows", "n"), [(1, 2), (5, 17), (64, 256)])
def test_layer_norm_and_leaky_relu_are_pytorchs_forward_and_backward(n_rows: int, n: int, slope: float, dtype: Any) -> None:
    layer = Layer(n_rows, n, dtype, slope)
    activations, means, rstds = layer.activations()
    assert_close(activations, layer.expected)
    np.testing.assert_array_equal(layer.activations(in_place=True)[0], activations)
    gradients = [np.full(n, np.nan, dtype) for _ in range(3)]
    kernels.normalise_and_activate_backward(
        layer.gradient, layer.outputs, activations, means, rstds, layer.weight, dtype(slope), *gradients
    )
    of_outputs, of_weight, of_bias = layer.expected_gradients
    for ours, theirs in zip([layer.gradient, *gradients], [of_outputs, of_weight, of_bias, of_outputs.sum(0)], strict=True):
        assert_close(ours, theirs)


def small_head(dtype: th.dtype, net_arch: list[int]) -> tuple[LectureDQN, CompiledHead]:
    """A Q network whose numbers are all different, and its arrays."""
    model = LectureDQN("MlpPolicy", "CartPole-v1", seed=0, policy_kwargs={"net_arch": net_arch})
    model.policy.to(dtype)
    th.manual_seed(0)
    for parameter in model.policy.parameters():
        parameter.data += 0.1 * th.randn_like(parameter)
    head = read_head(model.q_net_target)
    assert can_compile(head, Use.STEPS)
    assert head is not None
    return model, CompiledHead.of(head)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("net_arch", [[33], [256, 256], [40, 7, 64]])
def test_q_values_of_one_observation_and_of_several_are_the_networks(net_arch: list[int], dtype: th.dtype) -> None:
    model, head = small_head(dtype, net_arch)
    observations = th.randn(19, 4, dtype=dtype)
    expected = model.q_net_target.q_net(observations)
    assert_close(head.for_several()(observations.numpy()), expected)
    of_one = head.for_one()
    for observation, q_values in zip(observations, expected, strict=True):
        assert_close(of_one(observation[None].numpy()), q_values[None])


def transitions_of(observations: np.ndarray, actions: np.ndarray, targets: np.ndarray) -> Transitions:
    """Transitions that end an episode, so that the targets are the rewards."""
    return Transitions(observations, actions, observations[::-1].copy(), np.ones_like(targets), targets, targets)


def test_where_arrays_lie_does_not_change_a_bit() -> None:
    """A small network's are neighbours of others in one run and not in the next."""
    generator = np.random.default_rng(0)
    features, targets = random(8, 4, dtype=np.float32), random(8, 1, dtype=np.float32)
    actions, dones = np.arange(8)[:, None] % 2, np.arange(8, dtype=np.float32)[:, None] % 3 % 2
    results: set[bytes] = set()
    kept: list[Any] = []
    for _ in range(300):
        model = LectureDQN("MlpPolicy", "CartPole-v1", seed=0, buffer_size=10, policy_kwargs={"net_arch": [16]})
        kept.append([np.empty(size, np.float32) for size in generator.integers(1, 300, size=6)])
        update = CompiledUpdate.for_policy(model.policy)
        assert isinstance(update, CompiledUpdate)
        arrays = (features, actions, features[::-1], dones, targets, np.full_like(targets, 0.9))
        metrics = update._compiled_steps(Transitions(*map(np.array, arrays)), 8, None)
        kept.append(update)
        if len(kept) > 40:
            del kept[: generator.integers(1, 30)]
        results.add(update.gradient.numpy().tobytes() + metrics.tobytes())
    assert len(results) == 1


def test_targets_are_the_lectures() -> None:
    model, head = small_head(th.float64, [33])
    next_observations, rewards = th.randn(20, 4, dtype=th.float64), th.randn(20, 1, dtype=th.float64)
    dones, discounts = (th.arange(20)[:, None] % 3 == 0).double(), th.linspace(0.8, 0.99, 20, dtype=th.float64)[:, None]
    arrays = (tensor.numpy() for tensor in (next_observations, rewards, dones, discounts))
    targets = np.full((20, 1), np.nan)
    kernels.td_targets(head, head.workspaces(20), *arrays, targets)
    assert_close(targets, td_target(rewards, dones, model.q_net_target.q_net(next_observations), discounts))


@pytest.mark.parametrize("action", range(2))
def test_a_nan_among_the_next_q_values_is_a_nan_in_the_target(action: int) -> None:
    _, head = small_head(th.float32, [33])
    head.final_bias[action] = np.nan
    features, zeros, targets = np.ones((3, 4), np.float32), np.zeros((3, 1), np.float32), np.zeros((3, 1), np.float32)
    kernels.td_targets(head, head.workspaces(3), features, zeros, zeros, zeros + 0.9, targets)
    assert np.isnan(targets).all()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_gradient_steps_in_one_call_are_those_of_the_plain_path(max_grad_norm: float | None) -> None:
    plain, _ = small_head(th.float64, [40, 7, 33])
    compiled, _ = small_head(th.float64, [40, 7, 33])
    for model in (plain, compiled):
        model.max_grad_norm, model.metrics_interval = max_grad_norm, 10_000
    update = CompiledUpdate.for_policy(compiled.policy)
    assert isinstance(update, CompiledUpdate)
    assert isinstance(update.adam, CompiledAdam)
    plain_losses = []
    for call in range(100):
        plain.policy.optimizer.param_groups[0]["lr"] = compiled.policy.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + call)
        th.manual_seed(call)
        observations, targets = th.randn(5 * 16, 4, dtype=th.float64), th.randn(5 * 16, 1, dtype=th.float64)
        actions = th.randint(2, (5 * 16, 1))
        arrays = (tensor.numpy() for tensor in (observations, actions, targets))
        metrics = update._compiled_steps(transitions_of(*arrays), 16, max_grad_norm)
        for step in range(5):
            rows = slice(step * 16, (step + 1) * 16)
            q_values = plain.q_net.q_net(observations[rows]).gather(1, actions[rows])
            loss = squared_td_error(q_values, targets[rows])
            plain.policy.optimizer.zero_grad()
            loss.backward()
            expected = [loss, q_values.mean(), targets[rows].mean(), plain._clip_gradient()]
            plain.policy.optimizer.step()
            assert metrics[step] == pytest.approx([each.item() for each in expected], rel=1e-7)
            plain_losses.append(loss.item())
    assert plain_losses[-1] < plain_losses[0]
    pairs = zip(compiled.q_net.parameters(), plain.q_net.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-9
    states = [model.policy.optimizer.state_dict()["state"] for model in (compiled, plain)]
    for ours, theirs in zip(*(state.values() for state in states), strict=True):
        assert ours["step"] == theirs["step"] == 500
        assert th.allclose(ours["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-7, atol=0)


# Two threads


class Steps:
    """Two gradient steps on the same transitions with the same network, by one thread or two."""

    def __init__(self, net_arch: list[int], batch_size: int = 16) -> None:
        model, _ = small_head(th.float32, net_arch)
        update = CompiledUpdate.for_policy(model.policy)
        assert isinstance(update, CompiledUpdate)
        self.update = update
        n_rows, self.batch_size = 2 * batch_size, batch_size
        self.observations, self.next_observations = (random(n_rows, 4, dtype=np.float32) ** power for power in (1, 2))
        self.actions, self.rewards = np.arange(n_rows)[:, None] % 2, random(n_rows, 1, dtype=np.float32)
        zeros = np.zeros_like(self.rewards)
        arrays = (self.observations, self.actions, self.next_observations, zeros, self.rewards, zeros + 0.9)
        self.transitions = Transitions(*arrays)

    def by(self, work: Work) -> bytes:
        """All results of both steps, with some work given to the second thread."""
        self.update.second_thread._given = work
        metrics = self.update._compiled_steps(self.transitions, self.batch_size, 0.5)
        return metrics.tobytes() + self.update.gradient.numpy().tobytes() + self.update.theta.numpy().tobytes()

    def by_second_thread(self, presence: int, progress: np.ndarray) -> None:
        """What the second thread does where this has come to something, until it leaves."""
        workspaces, scratch = self.update._workspaces_for(self.batch_size)
        heads = self.update.compiled_head, self.update.compiled_target, self.update.compiled_gradients
        assert isinstance(self.update.adam, CompiledAdam)
        settings = self.update.adam.for_kernels(), 0.5
        results = np.zeros_like(self.rewards), np.zeros((2, 4), np.float32)
        of_both = *heads, workspaces, *settings, self.transitions, *results, np.array([presence]), progress
        kernels.gradient_steps(False, scratch, *of_both)

    def second_thread_has_come(self) -> bool:
        """Whether it has computed targets since this was asked before."""
        written = [workspace.gradient for workspace in self.update._workspaces_for(self.batch_size)[1]]
        has_come = not any(np.isnan(gradient).any() for gradient in written)
        for gradient in written:
            gradient[:] = np.nan
        return has_come

    def is_second_thread_there(self) -> bool:
        assert self.update._shared is not None
        return bool(self.update._shared.presence[0] == kernels.HERE)


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not is_so():
        assert time.monotonic() < end
        time.sleep(1e-4)


@pytest.mark.parametrize("net_arch", [[33], [64, 48], [40, 7, 33]])
def test_it_makes_no_difference_which_thread_computes_a_piece(net_arch: list[int]) -> None:
    alone, by_two = (Steps(net_arch, batch_size=2048) for _ in range(2))  # which takes long enough for both to come
    by_two.second_thread_has_come()

    def are_made_by_both() -> bool:
        assert by_two.by(Work.GRADIENTS) == alone.by(Work.NOTHING)
        return by_two.second_thread_has_come()

    for _ in range(5):
        wait_until(are_made_by_both)


@pytest.mark.parametrize("net_arch", [[33], [64, 48], [40, 7, 33]])
@pytest.mark.parametrize(("presence", "left"), [(kernels.HERE, kernels.DONE), (kernels.GONE, kernels.READY)])
def test_the_second_thread_does_what_is_ready_unless_it_should_leave(net_arch: list[int], presence: int, left: int) -> None:
    progress = np.full((2, len(net_arch)), kernels.READY)
    steps = Steps(net_arch)
    steps.by(Work.NOTHING)
    steps.by_second_thread(presence, progress)
    assert (progress == left).all()


def does_two_calls_in_one_stay(steps: Steps) -> bool:
    progress = np.full((2, 1), kernels.READY)
    thread = threading.Thread(target=steps.by_second_thread, args=(kernels.HERE, progress))
    thread.start()
    wait_until(lambda: bool((progress == kernels.DONE).all()))
    progress.fill(kernels.READY)
    thread.join()
    return bool((progress == kernels.DONE).all())


def test_the_second_thread_waits_a_while_for_the_next_call() -> None:
    steps = Steps([24])
    # it stays some milliseconds, in which this thread may not come
    assert any(does_two_calls_in_one_stay(steps) for _ in range(1000))


def test_other_transitions_are_not_those_that_the_second_thread_has_stayed_for() -> None:
    alone, by_two = (Steps([64, 48], batch_size=2048) for _ in range(2))
    by_two.second_thread_has_come()

    def are_made_by_both() -> bool:
        for steps in (alone, by_two):
            next_observations = steps.transitions.next_observations[::-1].copy()
            steps.transitions = steps.transitions._replace(next_observations=next_observations)
        assert by_two.by(Work.GRADIENTS) == alone.by(Work.NOTHING)
        return by_two.second_thread_has_come()

    for _ in range(5):
        wait_until(are_made_by_both)


def started_by(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What is given to the second thread from now on."""
    started: list[Callable[[], Any]] = []
    start = steps.update.second_thread.start
    monkeypatch.setattr(steps.update.second_thread, "start", lambda *args: (started.append(args[0]), start(*args))[1])
    return started


def test_the_second_thread_stays_for_the_next_call_with_the_same_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gradient_steps", lambda is_first_thread, *_: is_first_thread or may_leave.wait(timeout=600))
    steps, may_leave = Steps([24]), threading.Event()
    started = started_by(steps, monkeypatch)
    for _ in range(5):
        steps.by(Work.GRADIENTS)
        assert steps.is_second_thread_there()
    assert len(started) == 1
    may_leave.set()
    wait_until(lambda: not steps.is_second_thread_there())
    steps.by(Work.GRADIENTS)
    assert len(started) == 2


def test_the_second_thread_leaves_if_nothing_comes() -> None:
    steps = Steps([24])
    steps.by(Work.GRADIENTS)
    assert steps.update._task is not None
    steps.update._task.result()
    assert not steps.is_second_thread_there()


def leave_nothing_to_it(steps: Steps) -> None:
    steps.by(Work.NOTHING)


def take_other_transitions(steps: Steps) -> None:
    steps.update._compiled_steps(Transitions(*steps.transitions), 16, None)


def take_other_batches(steps: Steps) -> None:
    steps.update._compiled_steps(steps.transitions, 32, None)


def take_other_workspaces(steps: Steps) -> None:
    steps.update._workspaces = []
    steps.update._compiled_steps(steps.transitions, 16, None)


def go_on_in_a_forked_process(steps: Steps) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.getpid", lambda: 0)
        steps.update._compiled_steps(steps.transitions, 16, None)


def take_an_action_that_there_is_not(steps: Steps) -> None:
    steps.actions[7] = 2
    with pytest.raises(IndexError):
        steps.by(Work.GRADIENTS)


def run_out_of_memory(steps: Steps) -> None:
    def fail(*args: Any) -> None:
        args[-1][:] = kernels.READY
        raise MemoryError

    steps.update._gradient_steps = fail
    with pytest.raises(MemoryError):
        steps.by(Work.GRADIENTS)


@pytest.mark.parametrize(
    "change",
    [
        leave_nothing_to_it,
        take_other_transitions,
        take_other_batches,
        take_other_workspaces,
        go_on_in_a_forked_process,
        take_an_action_that_there_is_not,
        run_out_of_memory,
    ],
)
def test_the_second_thread_is_let_go_where_it_has_no_use(
    change: Callable[[Steps], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, has_begun = Steps([24]), []
    steps.by(Work.NOTHING)
    task = Task(lambda: has_begun.append(True))
    monkeypatch.setattr(steps.update.second_thread, "start", lambda *_: task)
    steps.by(Work.GRADIENTS)
    shared = steps.update._shared
    assert shared is not None
    assert shared.presence[0] == kernels.HERE
    change(steps)
    assert shared.presence[0] == kernels.GONE
    assert (shared.progress == kernels.DONE).all()
    task.run()
    assert not has_begun


#: What a piece has come to, and whether a thread that comes then computes it.
STATES = [(kernels.READY, True), (kernels.CLAIMED_BY_FIRST, False), (kernels.DONE, False)]


@pytest.mark.parametrize(
    ("state", "is_computed", "is_first_thread"),
    [*((*state, False) for state in STATES), (kernels.READY, True, True), (kernels.DONE, False, True)],
)
def test_a_weights_gradient_is_computed_by_who_claims_it(state: int, is_computed: bool, is_first_thread: bool) -> None:
    steps = Steps([24, 40])
    steps.by(Work.NOTHING)
    workspaces, gradients = steps.update._workspaces[0], steps.update.compiled_gradients
    weight = gradients.hidden_layers[1].weight
    expected = workspaces[1].gradient.T @ workspaces[0].activations
    weight[:] = 0
    pieces = np.array([kernels.DONE, state])
    kernels.weight_gradients_by_either(pieces, is_first_thread, workspaces, gradients)
    assert pieces[1] == (kernels.DONE if is_computed else state)
    np.testing.assert_allclose(weight, expected if is_computed else 0, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("state", "is_computed"), STATES)
def test_targets_are_computed_by_who_claims_them(state: int, is_computed: bool) -> None:
    steps = Steps([24])
    _, scratch = steps.update._workspaces_for(16)
    pieces, targets = np.array([state]), np.full((32, 1), np.nan, np.float32)
    of_batch = steps.update.compiled_target, scratch, steps.transitions, slice(16, 32)
    kernels.td_targets_by_either(pieces, False, *of_batch, targets)
    assert np.isnan(targets).sum() == (16 if is_computed else 32)
    assert pieces[0] == (kernels.DONE if is_computed else state)


def later(action: Callable[[], object]) -> threading.Thread:
    """Something that another thread does while this one waits."""
    thread = threading.Thread(target=lambda: (time.sleep(0.1), action()))
    thread.start()
    return thread


def test_the_second_thread_waits_for_what_is_not_ready() -> None:
    steps = Steps([24, 40])
    steps.by(Work.NOTHING)
    workspaces, gradients = steps.update._workspaces[0], steps.update.compiled_gradients
    gradients.hidden_layers[1].weight[:] = 0
    pieces = np.array([kernels.DONE, kernels.NOT_READY])
    thread = later(lambda: pieces.__setitem__(1, kernels.READY))
    kernels.weight_gradients_by_either(pieces, False, workspaces, gradients)
    thread.join()
    assert pieces[1] == kernels.DONE
    assert gradients.hidden_layers[1].weight.any()


def test_what_the_second_thread_gives_back_is_computed_by_the_first() -> None:
    steps = Steps([24])
    pieces, targets = np.array([kernels.CLAIMED_BY_SECOND]), np.full((32, 1), np.nan, np.float32)
    thread = later(lambda: pieces.__setitem__(0, kernels.READY))
    scratch = steps.update._workspaces_for(16)[0]
    kernels.td_targets_by_either(pieces, True, steps.update.compiled_target, scratch, steps.transitions, slice(16), targets)
    thread.join()
    assert pieces[0] == kernels.DONE
    assert np.isnan(targets).sum() == 16


def test_a_failure_of_the_second_thread_gives_back_what_it_has_claimed() -> None:
    presence = np.array([kernels.HERE])
    progress = np.array([[kernels.DONE, kernels.CLAIMED_BY_FIRST], [kernels.CLAIMED_BY_SECOND, kernels.NOT_READY]])

    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        compiled_update._help(fail, (), presence, progress)
    assert progress.tolist() == [[kernels.DONE, kernels.CLAIMED_BY_FIRST], [kernels.READY, kernels.NOT_READY]]
    assert presence[0] == kernels.GONE


def test_another_clipping_counts_at_once_whatever_kind_of_number_it_is() -> None:
    steps = Steps([24, 40])
    n_kinds = len(kernels.gradient_steps.signatures)  # type: ignore[attr-defined]
    norms = []
    for max_grad_norm in (10, 0.5, None, 0.25):
        steps.update._compiled_steps(steps.transitions, 16, max_grad_norm)
        norms.append(float(np.linalg.norm(steps.update.gradient.numpy())))
    assert norms[1] == pytest.approx(0.5, rel=1e-4)
    assert norms[2] > 0.5
    assert norms[3] == pytest.approx(0.25, rel=1e-4)
    assert len(kernels.gradient_steps.signatures) == n_kinds  # type: ignore[attr-defined]


def test_the_second_thread_is_free_again_after_an_error() -> None:
    steps = Steps([24, 40])
    steps.actions[7] = 2
    with pytest.raises(IndexError):
        steps.by(Work.GRADIENTS)
    has_come = threading.Event()
    steps.update.second_thread.start(has_come.set, Work.GRADIENTS)
    assert has_come.wait(timeout=600)


def test_a_second_thread_that_comes_late_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, late = Steps([24, 40]), []
    monkeypatch.setattr(steps.update.second_thread, "start", lambda *args: late.append(args[0]))
    results = steps.by(Work.GRADIENTS)
    assert steps.is_second_thread_there()
    late[0]()
    assert not steps.is_second_thread_there()
    assert results.endswith(steps.update.gradient.numpy().tobytes() + steps.update.theta.numpy().tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "n_actions"), [(1, 1), (7, 4), (128, 18)])
def test_the_final_layer_and_the_gradient_of_the_squared_td_error_are_pytorchs(
    n_rows: int, n_actions: int, dtype: Any
) -> None:
    features, weight = random(n_rows, 19, dtype=dtype), random(n_actions, 19, dtype=dtype)
    bias, targets = random(n_actions, dtype=dtype), random(n_rows, 1, dtype=dtype)
    actions = np.random.default_rng(0).integers(n_actions, size=(n_rows, 1))
    tensors = [th.tensor(array, requires_grad=True) for array in (features, weight, bias)]
    expected = functional.linear(*tensors)
    loss = functional.mse_loss(expected.gather(1, th.from_numpy(actions)), th.from_numpy(targets))
    q_values = np.full((n_rows, n_actions), np.nan, dtype)
    kernels.final_layer(features, weight, bias, q_values)
    assert_close(q_values, expected)
    gradients = [np.full_like(array, np.nan) for array in (features, weight, bias)]
    kernels.squared_td_error_backward(features, weight, q_values, actions, targets, *gradients)
    for ours, theirs in zip(gradients, th.autograd.grad(loss, tensors), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("action", [-1, 3])
def test_an_action_outside_of_the_action_space_is_an_error_and_changes_nothing(action: int) -> None:
    model = make_model("vector", fast=True)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    batch = random_batch("vector", np.random.default_rng(0))
    batch.actions[5] = action
    with pytest.raises(RuntimeError, match=rf"^actions of a batch must be in 0 to 2, got {action}$"):
        train_on(model, batch)
    assert all(map(th.equal, before, model.policy.parameters()))
    assert model._n_updates == 0


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_adam_is_pytorchs(dtype: th.dtype) -> None:
    th.manual_seed(0)
    ours, theirs = (th.nn.Parameter(th.linspace(-1, 1, 37, dtype=dtype)) for _ in range(2))
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-5}
    optimizer, plain = th.optim.Adam([ours], **settings), th.optim.Adam([theirs], **settings)
    gradient = th.zeros_like(ours.data)
    adam = CompiledAdam(optimizer, ours.data, gradient)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 3e-3 / (1 + step)
        gradient.copy_(th.randn(37, dtype=dtype))
        theirs.grad = gradient.clone()
        adam.step()
        plain.step()
    assert_close(ours.detach().numpy(), theirs)
    for name, value in plain.state[theirs].items():
        assert th.allclose(optimizer.state[ours][name], value, rtol=1e-5)


def test_the_norm_of_the_gradient_is_pytorchs() -> None:
    for dtype in DTYPES:
        gradient = random(70_148, dtype=dtype)
        assert kernels.squared_norm(gradient) == pytest.approx(float(np.square(gradient, dtype=np.float64).sum()), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_reach_the_parameters_as_they_do_on_the_plain_path(bad: float) -> None:
    for fast in (False, True):
        model = make_model("vector", fast)
        batch = random_batch("vector", np.random.default_rng(0))
        batch.rewards[3] = bad
        train_on(model, batch)
        assert all(not parameter.isfinite().all() for parameter in model.q_net.parameters())


# Rounding


def parameters_after(kind: str, dtype: th.dtype = th.float32) -> th.Tensor:
    """θ after 300 gradient steps on the same transitions, whose actions no float32 rounding changes."""
    settings: dict[str, Any] = {"learning_starts": 40, "batch_size": 32, "gradient_steps": 25, "learning_rate": 5e-4}
    policy_kwargs = {"features_extractor_class": DoubleFlatten} if dtype == th.float64 else {}
    model = LectureDQN("MlpPolicy", "CartPole-v1", seed=0, policy_kwargs=policy_kwargs, **settings)
    model.policy.to(dtype)
    make = {"plain": lambda: None, "compiled": lambda: CompiledUpdate.for_policy(model.policy)}[kind]
    model._make_fast_update = make  # type: ignore[method-assign]
    model.learn(88)
    assert model._n_updates == 300
    assert type(model._fast_update) is {"plain": type(None), "compiled": CompiledUpdate}[kind]
    return th.cat([parameter.detach().double().flatten() for parameter in model.q_net.parameters()])


def test_a_float32_run_stays_as_near_to_float64_as_the_plain_path() -> None:
    exact = parameters_after("plain", th.float64)
    errors = {kind: (parameters_after(kind) - exact).abs().max().item() for kind in ("plain", "compiled")}
    assert errors["compiled"] < 2 * errors["plain"] < 1e-5


# Where they are used


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({}, CompiledUpdate),
        ({"policy_kwargs": {"activation_fn": th.nn.ReLU}}, CompiledUpdate),
        ({"policy_kwargs": {"net_arch": []}}, FastUpdate),
        ({"policy_kwargs": {"layer_norm": False}}, FastUpdate),
    ],
)
def test_they_are_used_for_hidden_layers_with_layer_norm(kwargs: dict[str, Any], kind: type[FastUpdate]) -> None:
    model = make_model("vector", fast=True, dtype=th.float32, **kwargs)
    train_on(model, random_batch("vector", np.random.default_rng(0), th.float32))
    assert type(model._fast_update) is kind
    acting = FastActing.for_policy(model.policy)
    assert acting is not None
    assert (acting.compiled_head is not None) == (kind is CompiledUpdate)


def test_without_a_compiler_pytorchs_operations_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    model = make_model("vector", fast=True, dtype=th.float32)
    train_on(model, random_batch("vector", np.random.default_rng(0), th.float32))
    assert type(model._fast_update) is FastUpdate
    acting = FastActing.for_policy(model.policy)
    assert acting is not None
    assert acting.compiled_head is None


def test_work_for_several_threads_is_left_to_pytorch_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    kernel = kernels.gradient_steps
    monkeypatch.setattr(kernels, "gradient_steps", lambda *args: (sizes.append(len(args[-4])), kernel(*args))[1])
    model = LectureDQN("MlpPolicy", gymnasium.make("CartPole-v1"), learning_starts=0, seed=0)
    most_rows = SMALL_WORK // sum(parameter.numel() for parameter in model.q_net.parameters())
    model.learn(8)
    for n_threads, batch_size, expected in ((2, most_rows, 1), (2, most_rows + 1, 0), (1, most_rows + 1, 1)):
        th.set_num_threads(n_threads)
        sizes.clear()
        model.train(1, batch_size)
        assert sizes == expected * [batch_size]


def test_large_weights_are_left_to_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, kind in ((40 * 5, CompiledUpdate), (40 * 5 - 1, FastUpdate)):
        monkeypatch.setattr(compiled_head, "MOST_WEIGHTS", most)
        model = make_model("vector", fast=True, policy_kwargs={"net_arch": [40, 5]})
        train_on(model, random_batch("vector", np.random.default_rng(0)))
        assert type(model._fast_update) is kind


def test_behind_an_encoder_the_rest_of_a_step_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("vector", fast=True, dtype=th.float32, policy_kwargs={"features_extractor_class": GratefulEncoder})
    assert can_compile(read_head(model.q_net), Use.HEAD)
    calls: list[str] = []
    for name in ("q_values", "squared_td_error_gradients", "squared_norm", "gradient_steps"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, kernel=kernel: (calls.append(name), kernel(*args))[1])
    train_on(model, random_batch("vector", np.random.default_rng(0), th.float32))
    assert calls == ["q_values", "squared_td_error_gradients", "squared_norm"]


def test_batches_of_another_size_get_memory_of_their_own() -> None:
    model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=0, policy_kwargs={"net_arch": [9]}, seed=0).learn(20)
    for batch_size in (16, 7, 16):
        model.train(2, batch_size)
        update = model._fast_update
        assert isinstance(update, CompiledUpdate)
        assert [len(workspace.means) for (workspace,) in update._workspaces] == 2 * [batch_size]


def test_a_target_network_of_another_width_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    small_head(th.float32, [24])  # the kernels are compiled
    monkeypatch.setattr(kernels, "gradient_steps", None)
    parameters = []
    for fast in (False, True):
        model, other = (make_model("vector", fast, th.float32, policy_kwargs={"net_arch": [n]}) for n in (24, 40))
        model.policy.q_net_target = other.q_net_target
        model._create_aliases()
        batch = random_batch("vector", np.random.default_rng(0), th.float32)
        monkeypatch.setattr(model, "_sample_batch", lambda _, batch=batch: batch)
        model.train(1, BATCH_SIZE)
        assert type(model._fast_update) is (CompiledUpdate if fast else type(None))
        parameters.append(th.cat([parameter.detach().flatten() for parameter in model.q_net.parameters()]))
    th.testing.assert_close(*parameters, rtol=0, atol=1e-6)


def test_targets_that_are_not_one_for_each_action_are_pytorchs_error() -> None:
    model = make_model("vector", fast=True)
    batch = random_batch("vector", np.random.default_rng(0))
    with pytest.raises(RuntimeError, match=rf"tensor a \(3\) must match the size of tensor b \({BATCH_SIZE}\)"):
        train_on(model, batch._replace(rewards=batch.rewards[:, 0]))


class WideEncoder(FlattenExtractor):
    """Gives other features than it says."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).repeat(1, 2)


class DoublingEncoder(FlattenExtractor):
    """Gives twice as many rows in training mode, as augmentation does."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        return th.cat([features, -features]) if self.training else features


def test_more_features_than_actions_are_pytorchs_error() -> None:
    model = make_model("vector", fast=True, dtype=th.float32, policy_kwargs={"features_extractor_class": DoublingEncoder})
    with pytest.raises(RuntimeError, match="must match the size"):
        train_on(model, random_batch("vector", np.random.default_rng(0), th.float32))


def test_features_that_the_network_cannot_take_are_pytorchs_errors() -> None:
    """The kernels would read what lies behind the array."""
    for fast in (False, True):
        model = make_model("vector", fast, dtype=th.float32, policy_kwargs={"features_extractor_class": WideEncoder})
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            train_on(model, random_batch("vector", np.random.default_rng(0)))
        model = make_model("vector", fast, dtype=th.float32)
        model.policy.double()
        with pytest.raises(RuntimeError, match="dtype"):
            train_on(model, random_batch("vector", np.random.default_rng(0)))
    model = make_model("vector", fast=True, dtype=th.float32, policy_kwargs={"features_extractor_class": WideEncoder})
    acting = FastActing.for_policy(model.policy)
    assert acting is not None
    with pytest.raises(ValueError, match="not aligned"):
        acting.greedy_actions(np.zeros((1, 5), np.float32))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        acting.greedy_actions(np.zeros((2, 5), np.float32))


def test_a_target_network_that_takes_other_features_is_pytorchs_error() -> None:
    """The kernels would read what lies behind the array."""
    for fast in (False, True):
        model = make_model("vector", fast, dtype=th.float32)
        model.q_net_target.q_net[0] = th.nn.Linear(9, len(model.q_net_target.q_net[0].bias))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            train_on(model, random_batch("vector", np.random.default_rng(0), th.float32))


def exchange_the_final_layer(model: LectureDQN) -> None:
    model.q_net.q_net[-1] = th.nn.Linear(8, 3, dtype=th.float64)


def take_one_bias_for_all(model: LectureDQN) -> None:
    model.q_net.q_net[0].bias = th.nn.Parameter(th.zeros(1, dtype=th.float64))


def exchange_a_norms_weight(model: LectureDQN) -> None:
    model.q_net.q_net[1].weight = th.nn.Parameter(th.ones(17, dtype=th.float64))


def exchange_a_norms_bias(model: LectureDQN) -> None:
    model.q_net.q_net[1].bias = th.nn.Parameter(th.ones(17, dtype=th.float64))


def exchange_a_middle_layer(model: LectureDQN) -> None:
    model.q_net.q_net[3] = th.nn.Linear(40, 16, dtype=th.float64)


def take_a_target_without_layer_norm(model: LectureDQN) -> None:
    layers = model.q_net_target.q_net
    model.q_net_target.q_net = th.nn.Sequential(*(layer for layer in layers if type(layer) is not th.nn.LayerNorm))


@pytest.mark.parametrize(
    "change",
    [
        exchange_the_final_layer,
        take_one_bias_for_all,
        exchange_a_norms_weight,
        exchange_a_norms_bias,
        exchange_a_middle_layer,
        take_a_target_without_layer_norm,
    ],
)
def test_layers_that_do_not_fit_the_kernels_are_left_to_pytorch(change: Callable[[LectureDQN], None]) -> None:
    model = make_model("vector", fast=True)
    change(model)
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters())
    assert not all(can_compile(read_head(q_net), Use.HEAD) for q_net in (model.q_net, model.q_net_target))
    acting = FastActing.for_policy(model.policy.float())
    assert acting is not None
    assert (acting.compiled_head is None) == (change is not take_a_target_without_layer_norm)


class GratefulEncoder(FlattenExtractor):
    """Whatever is said around it, its features know where they come from."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        self.scale = th.nn.Parameter(th.ones(()))

    @th.enable_grad()
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).to(self.scale.dtype) * self.scale


def test_features_that_know_where_they_come_from_are_taken() -> None:
    kwargs = {"features_extractor_class": GratefulEncoder}
    plain, fast = (make_model("vector", is_fast, policy_kwargs=kwargs) for is_fast in (False, True))
    batch = random_batch("vector", np.random.default_rng(0))
    for model in (plain, fast):
        train_on(model, batch)
    assert type(fast._fast_update) is CompiledUpdate
    pairs = zip(fast.policy.parameters(), plain.policy.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12
    acting = FastActing.for_policy(fast.policy.float())
    assert acting is not None
    for n_envs in (1, 3):
        assert acting.greedy_actions(np.zeros((n_envs, 5), np.float32)).shape == (n_envs,)


def test_many_parameters_are_left_to_pytorchs_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, adam in ((10_000, CompiledAdam), (10, FlatAdam)):
        monkeypatch.setattr(compiled_update, "MOST_PARAMETERS", most)
        plain, fast = (make_model("vector", is_fast) for is_fast in (False, True))
        batch = random_batch("vector", np.random.default_rng(0))
        for model in (plain, fast):
            train_on(model, batch)
        assert isinstance(fast._fast_update, CompiledUpdate)
        assert type(fast._fast_update.adam) is adam
        pairs = zip(fast.policy.parameters(), plain.policy.parameters(), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12


@pytest.fixture
def undecided() -> Iterator[None]:
    """Whether Numba compiles here is asked anew, and once more afterwards."""
    compiling._can_compile_for.cache_clear()
    yield
    compiling._can_compile_for.cache_clear()


@pytest.mark.usefixtures("undecided")
def test_whatever_keeps_numba_from_compiling_a_warning_says_it_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compile_for_acting(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(kernels, "compile_for_acting", compile_for_acting)
    with pytest.warns(UserWarning, match=r"Numba does not compile here.*\(OSError: No space left on device\)") as warned:
        model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=10, seed=0).learn(40)
    assert [str(warning.message).startswith("Numba") for warning in warned].count(True) == 1
    assert type(model._fast_update) is FastUpdate
    assert model._n_updates > 0


def test_where_nothing_can_be_kept_on_disk_functions_are_compiled_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def without_a_folder(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_a_folder)
    assert kernels.compiled(lambda number: number + 1)(2) == 3


PARAMETERS = """
import hashlib
from sb3_lecture_dqn import LectureDQN

model = LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=40, batch_size=32, seed=0).learn(200)
print(hashlib.sha256(b"".join(parameter.detach().numpy().tobytes() for parameter in model.policy.parameters())).hexdigest())
"""


def test_the_process_that_compiles_computes_the_same_bits_as_those_that_read_from_the_disk(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", PARAMETERS], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc"))
    assert runs[0].stdout == runs[1].stdout


TRAINING = """
import numba
from sb3_lecture_dqn import LectureDQN

LectureDQN("MlpPolicy", "CartPole-v1", learning_starts=5, seed=0).learn(10)
print(repr(numba.config.CACHE_DIR))
"""


@pytest.mark.parametrize("users_folder", ["", "mine"])
def test_what_is_compiled_is_kept_in_the_users_folder_for_caches(tmp_path: Path, users_folder: str) -> None:
    folder = str(tmp_path / users_folder) if users_folder else ""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "caches"), "NUMBA_CACHE_DIR": folder}
    run = subprocess.run([sys.executable, "-c", TRAINING], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == f"{folder!r}\n"  # the user's own functions go where they went
    kept = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.nbc")}
    assert kept == {users_folder or "caches"}


ONLY_LOADING = """
import sys
from sb3_lecture_dqn import LectureDQN

model = LectureDQN.load(sys.argv[1])
model.predict(model.observation_space.sample(), deterministic=True)
print("numba" in sys.modules)
"""


def test_who_only_loads_a_model_and_acts_by_it_does_not_import_numba(tmp_path: Path) -> None:
    LectureDQN("MlpPolicy", "CartPole-v1").save(tmp_path / "model.zip")
    command = [sys.executable, "-c", ONLY_LOADING, str(tmp_path / "model.zip")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
