"""The driver, on engines that train nothing: trials that are lost, put back, taken over."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from sb3_lecture_dqn import zoo
from sb3_lecture_dqn.tuning.driver import Driver, Outcome, Report
from sb3_lecture_dqn.tuning.sampling import RepeatableSampler
from sb3_lecture_dqn.tuning.storage import PatientStorage, open_storage, put_back
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


def driver_storage(folder: Path) -> BaseStorage:
    return open_storage(f"sqlite:///{folder}/study.db")


def driver_on(engine: LosingEngine, folder: Path, max_retries: int) -> Driver:
    manager = zoo.make_manager(SETTINGS, str(folder / "zoo"), sampler="random", pruner="none")
    study = open_study(driver_storage(folder), "study", zoo.scoring_of(manager))
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


def test_each_value_of_each_trial_of_each_seed_is_drawn_by_itself() -> None:
    values = []
    for seed in range(2):
        study = optuna.create_study(sampler=RepeatableSampler(lambda seed: optuna.samplers.RandomSampler(seed=seed), seed))
        for _ in range(2):
            trial = study.ask()
            values += [trial.suggest_float(name, 0.0, 1.0) for name in ("gamma", "tau")]
    assert len(set(values)) == 8


def test_values_that_are_drawn_together_are_drawn_again_for_a_trial_that_is_retried(tmp_path: Path) -> None:
    class Together(optuna.samplers.RandomSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return {"gamma": optuna.distributions.FloatDistribution(0.0, 1.0)}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {name: self.sample_independent(study, trial, name, what) for name, what in search_space.items()}

    sampler = RepeatableSampler(lambda seed: Together(seed=seed), 5)
    study = optuna.create_study(storage=driver_storage(tmp_path), sampler=sampler)
    first = study.ask()
    drawn = [first.relative_params, study.ask().relative_params]  # Optuna draws them now
    put_back(study, first)
    again = study.ask()
    assert again.number == first.number
    assert drawn[0] == again.relative_params != drawn[1]


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


class HeldBackEngine(LosingEngine):
    """An engine on which something comes of each attempt, but not before it is released."""

    def __init__(self, event: Callable[[int, int], Report | Outcome]) -> None:
        super().__init__(is_lossy=False)
        self._event = event
        self._is_released = False
        self.answers: list[bool] = []

    def release(self) -> None:
        self._is_released = True

    def submit(self, settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int) -> None:
        super().submit(settings, params, number, attempt)
        self._events.append(self._event(number, attempt))

    def wait(self, seconds: float) -> list[Report | Outcome]:
        return super().wait(seconds) if self._is_released else []

    def answer(self, report: Report, is_pruned: bool) -> None:
        self.answers.append(is_pruned)


def lost(number: int, attempt: int) -> Outcome:
    return Outcome(number, TrialState.RUNNING, reason="its node died")


def complete(number: int, attempt: int) -> Outcome:
    return Outcome(number, TrialState.COMPLETE, 1.0)


def reported(number: int, attempt: int) -> Report:
    return Report(1, number, attempt, 1.0, 1)


class ZombieEngine(HeldBackEngine):
    """An engine on which the first attempt is thought to be lost, and reports once more while the second one runs."""

    def __init__(self) -> None:
        super().__init__(complete)
        self.release()

    def submit(self, settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int) -> None:
        if not self.attempts:
            self._events += [Report(1, number, attempt, 1.0, 1), lost(number, attempt)]
            LosingEngine.submit(self, settings, params, number, attempt)
            return
        self._events += [Report(2, number, attempt - 1, 9.0, 2), Report(3, number, attempt, 1.0, 1)]
        super().submit(settings, params, number, attempt)


@pytest.mark.filterwarnings("error:.*already reported")
def test_an_attempt_that_lives_though_its_trial_is_retried_is_stopped_and_not_listened_to(tmp_path: Path) -> None:
    engine = ZombieEngine()
    driver = driver_on(engine, tmp_path, max_retries=1)
    driver.run(1, lambda trials: None)
    assert engine.answers == [False, True, False]
    assert driver.study.trials[0].intermediate_values == {1: 1.0}
    assert driver.study.trials[0].value == 1.0


def test_a_result_that_the_database_took_before_it_broke_off_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_state = PatientStorage.set_trial_state_values

    def set_state_twice(storage: PatientStorage, trial_id: int, state: TrialState, values: Any = None) -> Any:
        if state == TrialState.COMPLETE:
            set_state(storage, trial_id, state, values)
        return set_state(storage, trial_id, state, values)

    engine = HeldBackEngine(complete)
    engine.release()
    driver = driver_on(engine, tmp_path, max_retries=0)
    monkeypatch.setattr(PatientStorage, "set_trial_state_values", set_state_twice)
    driver.run(1, lambda trials: None)
    (trial,) = driver.study.trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 1.0)


def nothing() -> None: ...


def at_each_look(*steps: Callable[[], None]) -> Callable[[list[FrozenTrial]], None]:
    """What happens, one after the other, when the driver looks at its study."""
    remaining = iter(steps)
    return lambda trials: next(remaining, nothing)()


@pytest.mark.parametrize("is_over", [False, True])
@pytest.mark.parametrize("event", [lost, complete, reported])
def test_a_driver_that_was_suspended_leaves_its_trial_to_the_process_that_took_it_over(
    event: Callable[[int, int], Report | Outcome], is_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_lecture_dqn.tuning.driver.LOOK_SECONDS", 0.1)
    engine = HeldBackEngine(event)
    driver = driver_on(engine, tmp_path, max_retries=3)

    def take_over() -> None:
        study = optuna.load_study(study_name="study", storage=driver_storage(tmp_path))
        put_back(study, study.trials[0])
        trial = study.ask()
        trial.set_user_attr("runner", "other")
        if is_over:
            study.tell(trial, 5.0)
        engine.release()

    driver.run(1, at_each_look(nothing, take_over, driver.stop))
    (trial,) = optuna.load_study(study_name="study", storage=driver_storage(tmp_path)).trials
    assert trial.user_attrs["runner"] == "other"
    assert (trial.state, trial.value) == ((TrialState.COMPLETE, 5.0) if is_over else (TrialState.RUNNING, None))
    assert not trial.intermediate_values
    assert "losses" not in trial.user_attrs
    assert engine.answers == ([True] if event is reported else [])
    assert len(engine.attempts) == 1


def test_a_trial_that_was_put_back_while_its_driver_was_suspended_is_retried_when_its_attempt_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_lecture_dqn.tuning.driver.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("sb3_lecture_dqn.tuning.storage.FULL_READ_SECONDS", 0.0)
    engine = HeldBackEngine(complete)
    driver = driver_on(engine, tmp_path, max_retries=0)
    attempts_before = []

    def put_back_by_another() -> None:
        study = optuna.load_study(study_name="study", storage=driver_storage(tmp_path))
        put_back(study, study.trials[0])

    def release() -> None:
        attempts_before.extend(engine.attempts)
        engine.release()

    driver.run(1, at_each_look(nothing, put_back_by_another, nothing, release))
    (trial,) = driver.study.trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 1.0)
    assert attempts_before == [(0, trial.params)]
    assert engine.attempts == [(0, trial.params)] * 2
