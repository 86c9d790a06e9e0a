"""Runs a study on an engine: asks, submits, answers reports, tells; retries what was lost, and leaves nothing running."""

import contextlib
import functools
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from sb3_lecture_dqn import zoo
from sb3_lecture_dqn.search_space import sample_lecture_dqn_params
from sb3_lecture_dqn.tuning.sampling import RepeatableSampler
from sb3_lecture_dqn.tuning.storage import hold, is_held, let_go, put_back, read_trial
from sb3_lecture_dqn.tuning.studies import Runner, fail, give_up_or_put_back

_logger = logging.getLogger(__name__)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Report:
    """
    What a worker reports, and waits for an answer to.

    :param ticket: What the answer must name
    :param number: Number of the trial
    :param attempt: A number that no other attempt of this driver has
    :param value: The mean return
    :param step: The evaluation
    """

    ticket: int
    number: int
    attempt: int
    value: float
    step: int


@dataclass(frozen=True)
class Outcome:
    """
    How an attempt at a trial ended.

    :param number: Number of the trial
    :param state: ``COMPLETE``, ``PRUNED``, ``FAIL`` (its own error), or ``RUNNING`` if its worker was lost
    :param value: The score of a complete trial
    :param reason: Why it failed or was lost, in a line
    :param attributes: What the objective noted
    """

    number: int
    state: TrialState
    value: float | None = None
    reason: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """What the driver asks of an engine; see :class:`~sb3_lecture_dqn.tuning.engine.RayEngine`."""

    def capacity(self) -> int:
        """
        Count how many trials may run at once.

        :return: Their number, which may change
        """

    def submit(self, settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int) -> None:
        """
        Start an attempt at a trial.

        :param settings: What decides its score
        :param params: The values that were drawn
        :param number: Number of the trial
        :param attempt: A number that no other attempt of this driver has
        """

    def wait(self, seconds: float) -> list[Report | Outcome]:
        """
        Wait until there is something to hear of the attempts.

        :param seconds: How long at most
        :return: Reports, and the outcomes of attempts that have ended
        """

    def answer(self, report: Report, is_pruned: bool) -> None:
        """
        Answer a report.

        :param report: The report
        :param is_pruned: Whether its trial is to stop
        """


class Driver:
    """
    Runs a study until it has as many finished trials as were asked for.

    :param study: The study
    :param manager: The zoo's manager of the search, which makes sampler and pruner
    :param settings: What decides the score of a trial
    :param engine: Where trials run
    :param runner: This process's entry in the study
    :param seed: Seed of the sampler; see :class:`~sb3_lecture_dqn.tuning.sampling.RepeatableSampler`
    """

    def __init__(
        self, study: optuna.Study, manager: Any, settings: zoo.TrialSettings, engine: Engine, runner: Runner, seed: int
    ) -> None:
        self.study = study
        self.study.pruner = zoo.make_pruner(manager)
        self.study.sampler = RepeatableSampler(functools.partial(zoo.make_sampler, manager), seed)
        self._manager = manager
        self._settings = settings
        self._engine = engine
        self._runner = runner
        self._attempts = 0
        self._running: dict[int, tuple[optuna.Trial, int]] = {}  # trial and attempt by number
        self._n_missing = 0
        self._is_stopped = False

    def stop(self) -> None:
        """Let :meth:`run` return at the next safe moment, within about a second."""
        self._is_stopped = True

    def run(self, n_trials: int, show: Callable[[list[optuna.trial.FrozenTrial]], None]) -> None:
        """
        Run trials until the study has enough of them, or until :meth:`stop`; what still runs then goes back into the queue.

        :param n_trials: How many finished trials the study shall have, with those that it has already
        :param show: Called with the study's trials about every second
        """
        try:
            while not self._is_stopped and self._look(n_trials, show):
                next_look = time.monotonic() + LOOK_SECONDS
                while not self._is_stopped and time.monotonic() < next_look:
                    # with a thousand places to fill, those who have begun need not wait for the last
                    for event in self._engine.wait(0.0 if self._start_next() else LOOK_SECONDS):
                        self._handle(event)
        except optuna.exceptions.StorageInternalError:
            raise  # the next run finds that this process is gone
        except BaseException:
            self._put_everything_back()
            raise
        self._put_everything_back()

    def _look(self, n_trials: int, show: Callable[[list[optuna.trial.FrozenTrial]], None]) -> bool:
        trials = self.study.get_trials(deepcopy=False)
        show(trials)
        n_finished = sum(trial.state in FINISHED for trial in trials)
        self._n_missing = n_trials - n_finished - sum(trial.state == TrialState.RUNNING for trial in trials)
        return n_finished < n_trials

    def _start_next(self) -> bool:
        if self._n_missing <= 0 or len(self._running) >= self._engine.capacity():
            return False
        trial = self.study.ask()
        if trial.number in self._running:  # others put it back while this process was suspended: first its attempt has to end
            put_back(self.study, trial)
            return False
        self._n_missing -= 1
        self._attempts += 1
        self._running[trial.number] = (trial, self._attempts)
        hold(self.study, trial)
        self._runner.claim(trial)
        sample_lecture_dqn_params(trial, 0, self._manager.n_envs, {})
        self._engine.submit(self._settings, trial.params, trial.number, self._attempts)
        return True

    def _handle(self, event: Report | Outcome) -> None:
        if isinstance(event, Report):
            self._engine.answer(event, self._is_pruned(event))
            return
        trial = self._let_go(event.number)
        if not self._is_ours(trial):
            _logger.warning("trial %d was taken over by another process: its result is dropped", event.number)
        elif event.state == TrialState.RUNNING:
            self._retry(trial, event.reason)
        else:
            self._tell(trial, event)

    def _is_ours(self, trial: optuna.Trial) -> bool:
        # others think that a process is dead when it was suspended for long
        return is_held(self.study, trial, self._runner.id)

    def _is_pruned(self, report: Report) -> bool:
        trial, attempt = self._running.get(report.number, (None, 0))
        if trial is None or attempt != report.attempt or not self._is_ours(trial):
            return True  # an attempt that still lives, though its trial was given up or taken over
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*already reported")  # by an earlier attempt, with the same seeds
            trial.report(report.value, report.step)
        return trial.should_prune()

    def _retry(self, trial: optuna.Trial, reason: str) -> None:
        _logger.warning("trial %d was lost: %s", trial.number, reason)
        if give_up_or_put_back(self.study, read_trial(self.study, trial), reason, self._runner.max_retries):
            self._n_missing += 1

    def _tell(self, trial: optuna.Trial, outcome: Outcome) -> None:
        if "scores" in outcome.attributes:
            trial.set_user_attr("scores", outcome.attributes["scores"])
        if outcome.state == TrialState.FAIL:
            _logger.warning("trial %d failed: %s", outcome.number, outcome.reason)
            fail(self.study, read_trial(self.study, trial), outcome.reason)
            return
        if outcome.value is not None and math.isnan(outcome.value):  # which Optuna fails too, without saying why
            fail(self.study, read_trial(self.study, trial), "its score is not a number")
            return
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # told, though the database could not say so
            self.study.tell(trial, outcome.value, state=outcome.state, skip_if_finished=True)

    def _let_go(self, number: int) -> optuna.Trial:
        trial, _ = self._running.pop(number)
        let_go(self.study, trial)
        return trial

    def _put_everything_back(self) -> None:
        for trial in [self._let_go(number) for number in list(self._running)]:
            if self._is_ours(trial):
                put_back(self.study, trial)
