"""What a step costs, counted in PyTorch's operations instead of seconds, so that a slow machine cannot fail it."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numba
import pytest
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast import kernels, products
from sb3_lecture_dqn.fast.threads import SMALL_WORK, threads_for


class CountOperations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations_of(work: Callable[[], object]) -> Counter[str]:
    with CountOperations() as counter:
        work()
    return counter.counts


def trained_model(**kwargs: Any) -> LectureDQN:
    settings = {"batch_size": 128, "learning_starts": 50, "gradient_steps": 4, **kwargs}
    return LectureDQN("MlpPolicy", "LunarLander-v3", seed=0, **settings).learn(100)


#: The kinds of processors that this build of PyTorch makes a difference between.
KINDS = ["MKL", "oneDNN"] if products.ONEDNN_LINEAR is not None else ["MKL"]


@pytest.fixture(params=KINDS)
def is_onednn_quicker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On either kind of processor."""
    is_quicker: bool = request.param == "oneDNN"
    monkeypatch.setattr(products, "is_onednn_quicker", lambda: is_quicker)
    return is_quicker


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations in place of what Numba compiles."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)


def calls_of_kernels(model: LectureDQN, work: Callable[[], object]) -> Counter[str]:
    """How often each function that Numba compiles is called."""
    counts: Counter[str] = Counter()
    model._fast_update = None
    model._current_fast_update()  # which looks for the kernels when it is first asked for steps
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in vars(kernels).copy().items():
            if hasattr(kernel, "py_func"):
                patch.setattr(kernels, name, lambda *args, name=name, kernel=kernel: (counts.update([name]), kernel(*args))[1])
        work()
    return counts


def operations_of_a_step_and_shared_ones() -> tuple[float, float]:
    """Of a gradient step, and of a training call whatever its steps."""
    model = trained_model()
    two, four = (operations_of(lambda n=n: model.train(n, 128)).total() for n in (2, 4))
    each = (four - two) / 2
    return each, two - 2 * each


def test_a_gradient_step_needs_nothing_of_pytorch_and_a_training_call_seven_operations() -> None:
    each, shared = operations_of_a_step_and_shared_ones()
    assert each == 0
    assert shared <= 7


def test_a_training_call_is_two_compiled_calls_for_up_to_eight_batches() -> None:
    model = trained_model()
    for n_steps, n_draws in ((1, 1), (8, 1), (9, 2)):
        counts = calls_of_kernels(model, lambda n_steps=n_steps: model.train(n_steps, 128))
        assert counts == {"read_transitions": n_draws, "gradient_steps": n_draws}


def test_with_n_step_returns_the_buffer_draws_and_the_rest_is_one_compiled_call() -> None:
    model = trained_model(n_steps=3)
    assert calls_of_kernels(model, lambda: model.train(8, 128)) == {"gradient_steps": 1}


@pytest.mark.usefixtures("without_a_compiler")
def test_without_a_compiler_a_step_is_28_operations_and_those_that_a_training_call_shares_are_27(
    is_onednn_quicker: bool,
) -> None:
    each, shared = operations_of_a_step_and_shared_ones()
    assert each <= 28 + is_onednn_quicker
    assert shared <= 27


def test_the_plain_path_needs_many_times_more() -> None:
    model = trained_model()
    fast = operations_of(lambda: model.train(4, 128)).total()
    model._current_fast_update = lambda: None  # type: ignore[method-assign]
    assert operations_of(lambda: model.train(4, 128)).total() > 8 * fast


@pytest.mark.usefixtures("without_a_compiler")
def test_the_targets_of_a_training_call_are_a_forward_pass_for_the_first_batch_and_one_for_the_next_three(
    is_onednn_quicker: bool,
) -> None:
    model = trained_model()
    for n_steps, n_passes in ((1, 1), (4, 2), (7, 3)):
        counts = operations_of(lambda n_steps=n_steps: model.train(n_steps, 128))
        # three layers, forward for θ in each step, and for ψ; oneDNN takes the middle one
        n_layers, n_gradients = (2, 1 + 2) if is_onednn_quicker else (3, 3 + 2)
        assert counts["addmm.default"] == n_layers * (n_steps + n_passes)
        # of the middle layer: a gradient of the weights and one of the inputs; of the others one, or two for the final layer
        assert counts["mm.out"] + counts["mm.default"] == n_steps * n_gradients
        assert counts["_linear_pointwise.default"] == is_onednn_quicker * (3 * n_steps + n_passes)


@pytest.mark.usefixtures("without_a_compiler")
def test_adam_and_the_norm_of_the_gradient_are_one_operation_each() -> None:
    model = trained_model(max_grad_norm=10)
    counts = operations_of(lambda: model.train(4, 128))
    assert counts["_fused_adam_.default"] == 4
    assert counts["dot.default"] == 4


def test_the_hard_copy_of_the_target_network_is_one_operation() -> None:
    model = trained_model(target_update_interval=1)
    assert operations_of(model._on_step) == Counter({"_foreach_copy_.default": 1})


def test_the_hard_copy_of_the_target_network_wakes_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(target_update_interval=1)
    seen = []
    monkeypatch.setattr(th, "_foreach_copy_", lambda *_: seen.append(th.get_num_threads()))
    th.set_num_threads(3)
    model._on_step()
    assert seen == [1]
    assert th.get_num_threads() == 3


def test_acting_in_one_environment_needs_nothing_of_pytorch() -> None:
    model = trained_model()
    model.exploration_rate = 0.0
    model._is_collecting = True
    assert operations_of(lambda: model._sample_action(0, None, 1)).total() == 0


def test_exploring_steps_need_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model()
    passes: list[int] = []
    greedy_actions = model._greedy_actions
    monkeypatch.setattr(model, "_greedy_actions", lambda observation: (passes.append(1), greedy_actions(observation))[1])
    for exploration_rate, expected in ((1.0, 0), (0.0, 20)):
        model.exploration_rate = exploration_rate
        for _ in range(20):
            model._sample_action(0, None, 1)
        assert len(passes) == expected


def test_a_small_network_is_trained_by_one_thread_and_the_users_number_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model()
    seen = []
    updates = LectureDQN._fast_updates
    monkeypatch.setattr(LectureDQN, "_fast_updates", lambda *args: (seen.append(th.get_num_threads()), updates(*args))[1])
    th.set_num_threads(3)
    model.train(2, 128)
    assert seen == [1]
    assert th.get_num_threads() == 3
    model.train(1, 1024)
    assert seen[1:] == [3]
    with pytest.raises(KeyError), threads_for(1):
        raise KeyError
    assert th.get_num_threads() == 3


def test_work_that_is_large_or_unknown_keeps_the_users_threads() -> None:
    th.set_num_threads(2)
    for multiply_adds, threads in ((SMALL_WORK, 1), (SMALL_WORK + 1, 2), (None, 2)):
        with threads_for(multiply_adds):
            assert th.get_num_threads() == threads


def test_the_training_mode_is_left_alone_where_it_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(th.nn.Linear, "train", lambda self, mode=True: calls.append(mode) or self)
    model = LectureDQN("MlpPolicy", "LunarLander-v3", learning_starts=0, batch_size=8, gradient_steps=1, seed=0).learn(40)
    assert model._n_updates == 10
    # the network is made in training mode and put in evaluation mode once
    assert calls.count(True) == 0
    assert calls.count(False) <= 2 * len(list(model.q_net.q_net))


def test_the_counter_counts() -> None:
    assert operations_of(lambda: th.ones(2) + th.ones(2)) == Counter({"ones.default": 2, "add.Tensor": 1})
