"""
A second thread for what a gradient step need not wait for.

PyTorch would split each of a step's operations among all cores, and for a network of this size the cores then mostly wait for
each other. Here a second core gets a few long pieces of work instead: the targets of the next batch, a weight's gradient.
Whatever it has not begun when it is needed, the first thread computes itself, so a core that is busy with something else does
not hold up the training; and the same pieces are computed in the same way by either, so the result does not depend on it.
"""

import atexit
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from queue import SimpleQueue
from typing import Any, ClassVar, Generic, TypeVar

import torch as th

T = TypeVar("T")


class Task(Generic[T]):
    """
    Something to compute, by whichever thread comes to it first.

    What a ``concurrent.futures.Future`` is that gets cancelled where it has not begun, in less than half of the time.

    :param call: What computes it
    :param leave: Makes the call end soon, if it would otherwise wait for more to do
    """

    def __init__(self, call: Callable[[], T], leave: Callable[[], None] = lambda: None) -> None:
        self._call: Callable[[], T] | None = call
        self.leave = leave
        self._begun, self._running = threading.Lock(), threading.Lock()
        self._running.acquire()
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Compute it, unless another thread has begun."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            assert self._call is not None
            self._results.append(self._call())
        except BaseException as error:
            self._error = error
        finally:
            self._call = None  # the second thread keeps its last task, which should not keep a model
            self._running.release()

    def result(self) -> T:
        """
        The result, which is computed now if no thread has begun.

        :return: What the call returned
        :raises BaseException: what the call raised
        """
        self.run()
        try:
            self.wait()
        except BaseException:  # an interruption: the other thread still writes into what belongs to the caller
            self.wait()
            raise
        if self._error is not None:
            raise self._error
        return self._results[0]

    def withdraw(self) -> None:
        """Let nobody begin it from now on."""
        if self._begun.acquire(blocking=False):
            self._call = None

    def wait(self) -> None:
        """Wait for who has begun it."""
        with self._running:
            pass


def wait_for_all(tasks: Sequence[Task[Any]]) -> None:
    """
    Wait for tasks, for all of them even if one fails or the waiting is interrupted.

    :param tasks: The tasks
    :raises BaseException: what one of them raised
    """
    try:
        for task in tasks:
            task.result()
    except BaseException:
        for task in tasks:
            task.run()
            task.wait()
        raise


@cache
def _queue(process_id: int) -> "SimpleQueue[Task[Any] | None]":
    """The tasks of the second thread. A process has one; a forked process has its parent's variables, but not its threads."""
    tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()
    has_begun, is_ending = threading.Event(), threading.Event()
    newest: list[Task[Any]] = []

    @th.inference_mode()
    def work() -> None:
        th.get_num_threads()  # PyTorch gives this thread the number of threads that is set now, which is one
        has_begun.set()
        while (task := tasks.get()) is not None:
            newest[:] = [task]
            if is_ending.is_set():
                return
            task.run()

    thread = threading.Thread(target=work, name="lecture_dqn_second_thread", daemon=True)
    thread.start()
    has_begun.wait()

    @atexit.register
    def end() -> None:  # PyTorch aborts a process that Python ends while another thread is still at work
        is_ending.set()
        tasks.put(None)
        for task in newest:
            task.leave()
        thread.join()

    return tasks


class Work(IntEnum):
    """What the second thread may be given: this, and all with a smaller number."""

    NOTHING = 0
    TARGETS = 1
    GRADIENTS = 2


class SecondThread:
    """
    The second thread of one model, and the measurement what it is worth giving to it.

    Whether a second core is idle, and how far from the first, is not known and changes, so now and then some training calls
    are made in each way in turn, and the quickest is kept until the next time. Quicker is what takes less time from the end of
    one training call to the end of the next: what the other core has written, the collection reads more slowly.

    :param ways: What it may be given, the least first
    """

    #: Of so many training calls …
    period: ClassVar[int] = 500
    #: … the first ones decide about the others: so many in each way, the first of which finds what the way before has left and
    #: is not counted, and …
    block: ClassVar[int] = 5
    #: … that so often.
    repetitions: ClassVar[int] = 2
    #: Before the first trial so many get nothing, so that it does not count what is compiled, allocated and read then.
    warm_up: ClassVar[int] = 50

    def __init__(self, ways: Sequence[Work] = tuple(Work)) -> None:
        self.ways = ways
        self._given = Work.NOTHING
        self._best = Work.NOTHING
        self._position = self.period - self.warm_up
        self._last_end: float | None = None
        self._seconds: dict[Work, list[float]] = {work: [] for work in ways}

    @property
    def trial(self) -> int:
        """Of a period, the training calls that decide about the others."""
        return self.repetitions * self.block * len(self.ways)

    def is_given(self, work: Work) -> bool:
        """
        Whether the second thread may compute something now.

        :param work: What it is
        :return: Whether :meth:`start` gives it to the second thread
        """
        return work <= self._given

    def start(self, call: Callable[[], T], work: Work, leave: Callable[[], None] = lambda: None) -> Task[T]:
        """
        Have something computed.

        :param call: What computes it
        :param work: What it is
        :param leave: As of :class:`Task`
        :return: Where to ask for the result
        """
        task = Task(call, leave)
        if self.is_given(work):
            _queue(os.getpid()).put(task)
        return task

    def in_advance(self, calls: Sequence[Callable[[], T]], work: Work) -> Iterator[Task[T]]:
        """
        Have a sequence computed, each of it while the one before is used.

        :param calls: What computes them; the first two are begun now
        :param work: What they are
        :return: Where to ask for the results, in their order
        """
        pending = [self.start(call, work) for call in calls[:2]]

        def tasks() -> Iterator[Task[T]]:
            for call in calls[2:]:
                yield pending.pop(0)
                pending.append(self.start(call, work))
            yield from pending

        return tasks()

    @contextmanager
    def measured(self, may_be_used: bool, gradient_steps: int) -> Iterator[None]:
        """
        A training call, inside which the second thread is used or not.

        :param may_be_used: Whether the user lets PyTorch have more than one thread, and the work needs only one
        :param gradient_steps: Number of its gradient steps
        """
        if not may_be_used:
            self._given, self._last_end = Work.NOTHING, None
            yield
            return
        is_trial = self._position < self.trial
        self._given = self.ways[self._position // self.block % len(self.ways)] if is_trial else self._best
        start = time.perf_counter() if self._last_end is None else self._last_end
        self._last_end = None  # if this is interrupted, nobody knows how long for
        yield
        self._last_end = time.perf_counter()
        if is_trial and self._position % self.block:
            self._seconds[self._given].append((self._last_end - start) / max(gradient_steps, 1))
        self._position = (self._position + 1) % self.period
        if is_trial and self._position == self.trial:
            self._best = min(self.ways, key=lambda work: statistics.median(self._seconds[work]))
            self._seconds = {work: [] for work in self.ways}
