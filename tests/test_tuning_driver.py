"""The driver, on engines that train nothing: trials that are lost, put back, taken over."""

import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from sb3_lecture_dqn import zoo
from sb3_lecture_dqn.tuning.driver import Driver, Outcome, Report
from sb3_lecture_dqn.tuning.sampling import RepeatableSampler
from sb3_lecture_dqn.tuning.storage import open_storage, put_back
from sb3_lecture_dqn.tuning.studies import Runner, open_study

SETTINGS = zoo.TrialSettings("CartPole-v1", n_timesteps=250, eval_episodes=1)


class LosingEngine:
    """An engine on which every attempt is lost, as often as the driver likes; or on which nothing ever ends."""

    def __init__(self, is_lossy: bool) -> None:
        self._is_lossy = is_lossy
        self.attempts: list[tuple[int, dict[str, Any]]] = []
        self._events: list[Report | Outcome] = []

    def capacity(self) -> int:
        return 2

    def submit(self, settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int) -> None:
        self.attempts.append((number, params))
        if self._is_lossy:
            self._events.append(Outcome(number, TrialState.RUNNING, reason="its node died"))

    def wait(self, seconds: float) -> list[Report | Outcome]:
        events, self._events = self._events, []
        return events

    def answer(self, report: Report, is_pruned: bool) -> None: ...


def driver_on(engine: LosingEngine, folder: Path, max_retries: int) -> Driver:
    manager = zoo.make_manager(SETTINGS, str(folder / "zoo"), sampler="random", pruner="none")
    study = open_study(open_storage(f"sqlite:///{folder}/study.db"), "study", zoo.scoring_of(manager))
    return Driver(study, manager, SETTINGS, engine, Runner(study, max_retries), seed=5)


def test_a_trial_is_lost_so_often_and_then_fails_with_the_reason(tmp_path: Path) -> None:
    engine = LosingEngine(is_lossy=True)
    driver = driver_on(engine, tmp_path, max_retries=2)
    driver.run(1, lambda trials: None)
    (trial,) = driver.study.trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["losses"] == ["its node died"] * 3
    assert trial.user_attrs["failure"] == "lost 3 times, at last because its node died"
    assert engine.attempts == [(0, trial.params)] * 3


def test_a_driver_that_is_stopped_leaves_nothing_running(tmp_path: Path) -> None:
    engine = LosingEngine(is_lossy=False)
    driver = driver_on(engine, tmp_path, max_retries=0)
    driver.run(5, lambda trials: driver.stop() if len(engine.attempts) == 2 else None)
    assert [trial.state for trial in driver.study.trials] == [TrialState.WAITING] * 2
    assert not any("losses" in trial.user_attrs for trial in driver.study.trials)


class SlowEngine(LosingEngine):
    """An engine that runs one trial at a time, each for a little longer than the driver waits before it looks again."""

    def __init__(self) -> None:
        super().__init__(is_lossy=False)
        self._has_waited = False

    def capacity(self) -> int:
        return 1

    def wait(self, seconds: float) -> list[Report | Outcome]:
        self._has_waited = not self._has_waited
        if self._has_waited:
            time.sleep(0.35)
            return []
        return [Outcome(number, TrialState.COMPLETE, float(number)) for number, _ in self.attempts[-1:]]


class NanEngine(LosingEngine):
    """An engine on which every score is not a number."""

    def wait(self, seconds: float) -> list[Report | Outcome]:
        attempts, self.attempts = self.attempts, []
        return [Outcome(number, TrialState.COMPLETE, float("nan")) for number, _ in attempts]


def test_a_score_that_is_not_a_number_fails_the_trial_with_that_reason(tmp_path: Path) -> None:
    driver = driver_on(NanEngine(is_lossy=False), tmp_path, max_retries=0)
    driver.run(2, lambda trials: None)
    assert [trial.state for trial in driver.study.trials] == [TrialState.FAIL] * 2
    assert {trial.user_attrs["failure"] for trial in driver.study.trials} == {"its score is not a number"}


def test_a_study_with_trials_in_its_queue_gets_as_many_as_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_lecture_dqn.tuning.driver.LOOK_SECONDS", 0.3)
    driver = driver_on(SlowEngine(), tmp_path, max_retries=0)
    for trial in [driver.study.ask() for _ in range(3)]:
        put_back(driver.study, trial)
    driver.run(3, lambda trials: None)
    assert [trial.state for trial in driver.study.trials] == [TrialState.COMPLETE] * 3


class DyingSampler(RepeatableSampler):
    """Dies when it shall draw one value more than it may."""

    draws = 0

    def sample_independent(self, *arguments: Any) -> Any:
        if not self.draws:
            raise KeyboardInterrupt
        self.draws -= 1
        return super().sample_independent(*arguments)


@pytest.mark.parametrize("n_drawn", [0, 1, 2, 7, 11])
def test_a_trial_whose_driver_died_while_it_drew_gets_the_same_values_again(n_drawn: int, tmp_path: Path) -> None:
    engine = LosingEngine(is_lossy=False)
    driver = driver_on(engine, tmp_path, max_retries=0)
    untouched = driver.study.sampler
    driver.study.sampler = DyingSampler(untouched._make_sampler, untouched._seed)
    driver.study.sampler.draws = 12 + n_drawn  # of the second trial's twelve
    with pytest.raises(KeyboardInterrupt):
        driver.run(2, lambda trials: None)
    assert [len(trial.params) for trial in driver.study.trials] == [12, n_drawn]

    driver.study.sampler = untouched
    driver.run(2, lambda trials: driver.stop() if len(engine.attempts) == 3 else None)
    whole = LosingEngine(is_lossy=False)
    uninterrupted = driver_on(whole, tmp_path / "uninterrupted", max_retries=0)
    uninterrupted.run(2, lambda trials: uninterrupted.stop() if len(whole.attempts) == 2 else None)
    assert engine.attempts[1:] == whole.attempts
