"""The second thread computes what it comes to first, and the training is the same with and without it."""

import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_lecture_dqn import LectureDQN
from sb3_lecture_dqn.fast.second_thread import SecondThread, Task, Work, wait_for_all
from sb3_lecture_dqn.metrics import MetricsOf, RunningMeans
from sb3_lecture_dqn.replay_buffer import ContiguousReplayBuffer


def this_thread() -> str:
    return threading.current_thread().name


@pytest.fixture
def used() -> SecondThread:
    """One that has decided for the second thread."""
    second_thread = SecondThread()
    second_thread._given = Work.GRADIENTS
    return second_thread


@pytest.fixture
def is_held_up(used: SecondThread) -> Iterator[None]:
    """The second thread is busy with something else all the time."""
    has_begun, may_end = threading.Event(), threading.Event()
    task = used.start(lambda: (has_begun.set(), may_end.wait()), Work.TARGETS)
    assert has_begun.wait(timeout=600)
    yield
    may_end.set()
    task.result()


def test_the_second_thread_computes_a_task_once(used: SecondThread) -> None:
    calls: list[str] = []
    is_done = threading.Event()
    task = used.start(lambda: (calls.append(this_thread()), is_done.set()), Work.GRADIENTS)
    assert is_done.wait(timeout=600)
    assert task.result() == task.result() == (None, None)
    assert calls == ["lecture_dqn_second_thread"]


@pytest.mark.usefixtures("is_held_up")
def test_a_task_that_it_has_not_begun_is_computed_by_who_asks(used: SecondThread) -> None:
    calls: list[str] = []
    task = used.start(lambda: calls.append(this_thread()), Work.GRADIENTS)
    task.result()
    task.result()
    assert calls == ["MainThread"]


def test_an_error_is_raised_where_the_result_is_asked_for(used: SecondThread) -> None:
    has_begun = threading.Event()

    def fail() -> None:
        has_begun.set()
        raise KeyError("of the task")

    with_it = used.start(fail, Work.GRADIENTS)
    assert has_begun.wait(timeout=600)
    for task in (with_it, Task(fail)):
        for _ in range(2):
            with pytest.raises(KeyError, match="of the task"):
                task.result()
    lives_on = threading.Event()
    used.start(lives_on.set, Work.GRADIENTS)
    assert lives_on.wait(timeout=600)


def test_a_task_that_was_withdrawn_is_computed_by_nobody(used: SecondThread) -> None:
    calls: list[str] = []
    may_go_on, is_behind_it = threading.Event(), threading.Event()
    used.start(may_go_on.wait, Work.GRADIENTS)
    used.start(lambda: calls.append(this_thread()), Work.GRADIENTS).withdraw()
    used.start(is_behind_it.set, Work.GRADIENTS)
    may_go_on.set()
    assert is_behind_it.wait(timeout=600)
    assert calls == []


def test_whoever_waits_for_several_tasks_waits_for_all_even_if_one_fails(used: SecondThread) -> None:
    ended: list[str] = []

    def fail() -> None:
        raise KeyError("of the task")

    def end_later() -> None:
        time.sleep(0.05)
        ended.append(this_thread())

    tasks = [used.start(fail, Work.GRADIENTS), used.start(end_later, Work.GRADIENTS), Task(end_later)]
    with pytest.raises(KeyError, match="of the task"):
        wait_for_all(tasks)
    assert len(ended) == 2


def test_an_interruption_waits_for_what_the_second_thread_has_begun(
    used: SecondThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_end, waits = threading.Event(), threading.Event(), []
    task = used.start(lambda: (has_begun.set(), may_end.wait()), Work.GRADIENTS)
    assert has_begun.wait(timeout=600)
    wait = Task.wait

    def interrupted_once(task: Task[Any]) -> None:
        waits.append(1)
        if len(waits) == 1:
            may_end.set()
            raise KeyboardInterrupt
        wait(task)

    monkeypatch.setattr(Task, "wait", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        task.result()
    assert len(waits) == 2
    assert task._results


def test_what_it_is_not_given_is_computed_by_who_asks(used: SecondThread) -> None:
    assert SecondThread().start(this_thread, Work.TARGETS).result() == "MainThread"
    used._given = Work.TARGETS
    assert used.start(this_thread, Work.GRADIENTS).result() == "MainThread"
    has_begun = threading.Event()
    task = used.start(lambda: (has_begun.set(), this_thread())[1], Work.TARGETS)
    assert has_begun.wait(timeout=600)
    assert task.result() == "lecture_dqn_second_thread"


def test_a_sequence_is_begun_one_ahead(used: SecondThread) -> None:
    begun: list[str] = []
    events = [threading.Event() for _ in range(4)]
    tasks = used.in_advance([lambda event=event: (begun.append(this_thread()), event.set()) for event in events], Work.TARGETS)  # type: ignore[misc]
    for n_taken in range(4):
        n_begun = max(n_taken + 1, 2)  # while the last one that was taken is used, the next one is computed
        assert all(event.wait(timeout=600) for event in events[:n_begun])
        assert not any(event.is_set() for event in events[n_begun:])
        next(tasks).result()
    assert next(tasks, None) is None
    assert begun == 4 * ["lecture_dqn_second_thread"]


NAMES_OF_THREADS = """
import os, sys, threading
from sb3_lecture_dqn.fast.second_thread import SecondThread, Work

used = SecondThread()
used._given = Work.GRADIENTS

def print_the_thread():
    is_done = threading.Event()
    used.start(lambda: (print(threading.current_thread().name, flush=True), is_done.set()), Work.TARGETS)
    is_done.wait(timeout=600)

print_the_thread()
child = os.fork()
if child == 0:
    print_the_thread()
    sys.exit()
os.waitpid(child, 0)
"""


STATE_AT_THE_END = """
import atexit, threading
from sb3_lecture_dqn.fast.second_thread import SecondThread, Work

def print_the_threads():
    print([thread.name for thread in threading.enumerate() if thread is not threading.main_thread()])

atexit.register(print_the_threads)  # what is registered last is called first
used = SecondThread()
used._given = Work.GRADIENTS
used.start(lambda: None, Work.TARGETS).result()
print_the_threads()
"""


STAYING_AT_THE_END = """
import threading
from sb3_lecture_dqn.fast.second_thread import SecondThread, Work

used, has_come, may_leave = SecondThread(), threading.Event(), threading.Event()
used._given = Work.GRADIENTS
used.start(lambda: (has_come.set(), may_leave.wait(), print("left")), Work.GRADIENTS, may_leave.set)
has_come.wait(timeout=600)
used.start(lambda: print("not begun"), Work.GRADIENTS)
"""


def test_what_waits_for_more_to_do_leaves_when_python_ends_the_process() -> None:
    run = subprocess.run([sys.executable, "-c", STAYING_AT_THE_END], capture_output=True, text=True, check=True, timeout=600)
    assert run.stdout.split() == ["left"]


def test_it_has_ended_when_python_ends_the_process() -> None:
    run = subprocess.run([sys.executable, "-c", STATE_AT_THE_END], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["['lecture_dqn_second_thread']", "[]"]


def test_a_forked_process_has_a_second_thread_of_its_own() -> None:
    run = subprocess.run([sys.executable, "-c", NAMES_OF_THREADS], capture_output=True, text=True, check=True)
    assert run.stdout.split() == 2 * ["lecture_dqn_second_thread"]


# Training


class ExtractorOfAUsersOwn(FlattenExtractor):
    """Who knows what it does."""


def trained(monkeypatch: pytest.MonkeyPatch, work: Work, threads: int = 2, **kwargs: object) -> LectureDQN:
    """A model whose training calls give some work to the second thread."""
    monkeypatch.setattr(SecondThread, "repetitions", 0)
    settings = {"learning_starts": 40, "batch_size": 32, "gradient_steps": 30, **kwargs}
    model = LectureDQN("MlpPolicy", "CartPole-v1", seed=0, **settings)  # type: ignore[arg-type]
    th.set_num_threads(threads)
    fast_update = model._current_fast_update()
    assert fast_update is not None
    fast_update.second_thread._best = work
    model.learn(100)
    assert model._fast_update is fast_update
    is_given = threads > 1 and not fast_update.needs_training_mode
    assert fast_update.second_thread._given == (work if is_given else Work.NOTHING)
    return model


def assert_equal(first: LectureDQN, second: LectureDQN) -> None:
    assert first._n_updates == second._n_updates > 80
    for ours, theirs in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"gradient_steps": 29},
        {"max_grad_norm": 0.1},
        {"policy_kwargs": {"net_arch": [9]}},
        {"policy_kwargs": {"features_extractor_class": ExtractorOfAUsersOwn}},
    ],
)
def test_the_parameters_are_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, object]) -> None:
    without_it = trained(monkeypatch, Work.NOTHING, **kwargs)
    for work in (Work.TARGETS, Work.GRADIENTS):
        assert_equal(without_it, trained(monkeypatch, work, **kwargs))
    assert_equal(without_it, trained(monkeypatch, Work.GRADIENTS, threads=1, **kwargs))


@pytest.mark.usefixtures("is_held_up")
def test_a_second_thread_that_never_comes_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal(trained(monkeypatch, Work.GRADIENTS), trained(monkeypatch, Work.NOTHING))


def test_the_metrics_are_those_of_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # 25 gradient steps a call, so that both paths read their metrics after the same hundreds
    model = trained(monkeypatch, Work.GRADIENTS, gradient_steps=25, learning_rate=5e-4)
    monkeypatch.setattr(LectureDQN, "_current_fast_update", lambda _: None)
    plain = LectureDQN(
        "MlpPolicy", "CartPole-v1", seed=0, learning_starts=40, batch_size=32, gradient_steps=25, learning_rate=5e-4
    )
    plain.learn(100)
    for name in ("loss", "q_values", "td_target", "gradient_norm"):
        ours, theirs = (m.logger.name_to_value[f"train/{name}"] for m in (model, plain))
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert ours > 0


def test_metrics_that_are_read_later_are_those_of_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    then: list[th.Tensor] = []
    add = RunningMeans.add

    def add_and_look(means: RunningMeans, metrics_of: MetricsOf, kept: Any) -> None:
        then.append(metrics_of([kept]).clone())
        add(means, metrics_of, kept)

    monkeypatch.setattr(RunningMeans, "add", add_and_look)
    model = trained(monkeypatch, Work.GRADIENTS, gradient_steps=6)
    for _ in range(4):
        model.train(2, 32)
    later = [metrics_of([kept]) for metrics_of, kept in model._training_metrics._not_summed]
    assert 4 <= len(later) < len(then)
    for now, before in zip(reversed(later), reversed(then), strict=False):
        assert th.equal(now, before)


def test_metrics_that_are_read_later_keep_no_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[weakref.ReferenceType[np.ndarray]] = []
    to_device = ContiguousReplayBuffer._to_device

    def note(buffer: ContiguousReplayBuffer, array: np.ndarray) -> th.Tensor:
        drawn.append(weakref.ref(array if array.base is None else array.base))
        return to_device(buffer, array)

    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)  # what is compiled leaves numbers
    monkeypatch.setattr(ContiguousReplayBuffer, "_to_device", note)
    model = trained(monkeypatch, Work.NOTHING, gradient_steps=6)
    model.train(6, 32)
    assert model._training_metrics._not_summed
    assert len(drawn) > 50
    assert not any(reference() is not None for reference in drawn)


# What it is worth giving to it


def decisions(
    monkeypatch: pytest.MonkeyPatch, training: list[float], collection: list[float], may_be_used: bool = True
) -> list[Work]:
    """What training calls give to it, if a call and the collection after it take so many seconds with each work."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    second_thread = SecondThread()
    given = []
    for _ in range(second_thread.warm_up + second_thread.period + second_thread.trial):
        with second_thread.measured(may_be_used, gradient_steps=4):
            given.append(second_thread._given)
            now[0] += training[given[-1]]
        now[0] += collection[given[-1]]
    return given


@pytest.mark.parametrize(
    ("training", "collection", "quickest"),
    [
        ([1.0, 0.9, 0.8], [0.0, 0.0, 0.0], Work.GRADIENTS),
        ([1.0, 0.9, 1.1], [0.0, 0.0, 0.0], Work.TARGETS),
        ([1.0, 1.1, 1.2], [0.0, 0.0, 0.0], Work.NOTHING),
        ([1.0, 0.9, 0.8], [0.1, 0.1, 0.1], Work.GRADIENTS),
        ([1.0, 0.9, 0.8], [0.1, 0.1, 0.4], Work.TARGETS),
        ([1.0, 0.9, 0.8], [0.1, 0.4, 0.4], Work.NOTHING),
    ],
)
def test_it_is_given_what_makes_training_and_collecting_quickest_and_that_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch, training: list[float], collection: list[float], quickest: Work
) -> None:
    trial, period = SecondThread().trial, SecondThread.period
    given = decisions(monkeypatch, training, collection)
    assert set(given[: SecondThread.warm_up]) == {Work.NOTHING}
    given = given[SecondThread.warm_up :]
    for tried in (given[:trial], given[period:]):
        assert Counter(tried) == dict.fromkeys(Work, trial // 3)
    assert set(given[trial:period]) == {quickest}


def test_the_first_call_of_each_block_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    second_thread = SecondThread()
    for _ in range(second_thread.warm_up + second_thread.trial - 1):
        with second_thread.measured(may_be_used=True, gradient_steps=1):
            pass
    n_calls = [len(seconds) for seconds in second_thread._seconds.values()]
    assert n_calls == [2 * (SecondThread.block - 1), 2 * (SecondThread.block - 1), 2 * (SecondThread.block - 1) - 1]


def test_who_allows_one_thread_gets_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(decisions(monkeypatch, [1.0, 0.5, 0.5], [0.0, 0.0, 0.0], may_be_used=False)) == {Work.NOTHING}


def test_an_interrupted_piece_of_training_does_not_count() -> None:
    second_thread = SecondThread()
    position = second_thread._position
    with pytest.raises(KeyboardInterrupt), second_thread.measured(True, gradient_steps=1):
        raise KeyboardInterrupt
    assert second_thread._position == position
    assert second_thread._seconds == {work: [] for work in Work}
