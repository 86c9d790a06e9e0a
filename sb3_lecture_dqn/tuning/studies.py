"""Which study it is, who runs its trials, and which of them are lost."""

import json
import os
import threading
import uuid
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc

from sb3_lecture_dqn.processes import here, is_alive
from sb3_lecture_dqn.resume.run_settings import NOT_GIVEN
from sb3_lecture_dqn.tuning.storage import (
    TuningError,
    find_storage_file,
    first_line,
    is_held,
    open_storage,
    put_back,
    set_trial_attribute,
    wait_for_outages,
)

#: Study attribute that says what its scores mean.
SCORING = "lecture_dqn_scoring"
#: Study attribute with the hyperparameter entry that its search started from, in words.
ENTRY = "lecture_dqn_entry"
#: Prefix of the study attributes in which those who run trials say that they live.
RUNNER = "lecture_dqn_runner_"
BEAT_SECONDS = 15.0
#: Who has not said anything new at so many looks, one each beat, is dead.
LOOKS = 4
MAX_RETRIES = 3


def open_study(storage: BaseStorage, name: str, scoring: Mapping[str, Any]) -> optuna.Study:
    """
    Open a study, or make it; never one that scores something else.

    :param storage: Its storage
    :param name: Its name
    :param scoring: What decides what a score means: algorithm, environment and its arguments, steps, seeds, evaluations
    :return: The study
    :raises TuningError: if the study is another's, or the storage refuses to be written
    """
    try:
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
            check_study(study, scoring)
        study.set_user_attr(SCORING, dict(scoring))
    except (exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        raise TuningError(f"storage of study {name!r} cannot be written: {first_line(error)}") from error
    except json.JSONDecodeError as error:
        raise TuningError(f"storage of study {name!r} must be a journal file, got something else: {error}") from error
    wait_for_outages(storage)
    return study


def find_study(storage_url: str, name: str, scoring: Mapping[str, Any]) -> optuna.Study:
    """
    Open a study that is there already, to read it.

    :param storage_url: Its storage, as :func:`~sb3_lecture_dqn.tuning.storage.open_storage` takes it
    :param name: Its name
    :param scoring: What it must score, see :func:`check_study`
    :return: The study
    :raises TuningError: if there is none, or it scores something else; nothing is made or changed then
    """
    no_study = f"there is no study {name!r} in the storage"
    file = find_storage_file(storage_url)
    if file is not None and not file.exists():
        raise TuningError(f"{no_study}: there is no file {file}")
    try:
        study = optuna.load_study(storage=open_storage(storage_url), study_name=name)
    except KeyError as error:
        raise TuningError(no_study) from error
    check_study(study, scoring)
    return study


def check_study(study: optuna.Study, scoring: Mapping[str, Any]) -> None:
    """
    Check that a study scores what is asked for.

    :param study: An existing study
    :param scoring: The entries that must agree
    :raises TuningError: if the study does not say what it scores, or scores something else
    """
    recorded = study.user_attrs.get(SCORING)
    if recorded is None:
        if study.user_attrs or study.get_trials(deepcopy=False) or study.direction != optuna.study.StudyDirection.MAXIMIZE:
            raise TuningError(f"study {study.study_name!r} exists and is not one of lecture_dqn: choose another --study-name")
        return
    for key, value in scoring.items():
        if recorded.get(key) != value:
            raise TuningError(
                f"study {study.study_name!r} was made with {key} {recorded.get(key)!r}, got {value!r}: "
                "choose another --study-name"
            )


def note_entry(study: optuna.Study, entry: Mapping[str, str]) -> None:
    """
    Note, once, the hyperparameter entry that a search starts from.

    :param study: The study
    :param entry: The entry, in words
    """
    if ENTRY not in study.user_attrs:
        study.set_user_attr(ENTRY, dict(entry))


def check_entry(study: optuna.Study, entry: Mapping[str, str], names: Collection[str]) -> None:
    """
    Check that an entry is the one that a search started from, as far as that is noted.

    :param study: The study
    :param entry: The entry, in words
    :param names: What is not compared, since the trials have values of their own
    :raises TuningError: if the entries differ
    """
    noted = study.user_attrs.get(ENTRY, entry)
    for name in sorted({*noted, *entry} - set(names)):
        before, now = noted.get(name, NOT_GIVEN), entry.get(name, NOT_GIVEN)
        if before != now:
            raise TuningError(
                f"--conf-file must hold the entry that study {study.study_name!r} was searched from: there {name} was "
                f"{before}, got {now}"
            )


class Runner:
    """
    A process that runs trials of a study: it says every few seconds that it lives, and puts lost trials back.

    Optuna's own heartbeat needs a database and one beat for each trial; it never finds a trial whose process died
    before the first beat. This one works for journal files too, with one beat for each process, however many trials
    it runs. A trial is lost when its runner has said goodbye, when its process is gone (on the same host), or when it
    has not said anything new at several looks; clocks of different hosts are not compared. One that nobody has claimed
    yet is lost as soon as no runner is left who could have asked for it.

    :param study: The study
    :param max_retries: How often a trial is put back before it fails
    """

    def __init__(self, study: optuna.Study, max_retries: int = MAX_RETRIES) -> None:
        self.study = study
        self.max_retries = max_retries
        self.id = uuid.uuid4().hex[:12]
        self._beats = 0
        self._looks: dict[str, tuple[Any, int]] = {}  # what each runner said last, and how often it said just that
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> "Runner":
        self._beat()
        self.put_lost_trials_back()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=BEAT_SECONDS)
        if not isinstance(error, optuna.exceptions.StorageInternalError):
            self.study.set_user_attr(RUNNER + self.id, {"ended": True})
            self.put_lost_trials_back()

    def claim(self, trial: optuna.Trial) -> None:
        """
        Say that this process runs a trial.

        :param trial: A trial that :meth:`optuna.Study.ask` gave to this process
        """
        trial.set_user_attr("runner", self.id)

    def put_lost_trials_back(self) -> None:
        """Look once at who runs what; what nobody runs goes back into the queue, or fails after too many retries."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        others = [trial for trial in running if trial.user_attrs.get("runner") != self.id]
        attributes = self.study.user_attrs if others else {}  # read after the trials: who asks has beaten before
        lives = {_runner_of(trial): attributes.get(_runner_of(trial)) for trial in others}
        self._looks = {name: self._look(name, life) for name, life in lives.items()}
        nobody_asks = self._nobody_asks(attributes)
        for trial in others:
            life, looks = self._looks[_runner_of(trial)]
            is_lost = looks >= LOOKS or _has_ended(life) or (nobody_asks and "runner" not in trial.user_attrs)
            if is_lost and is_held(self.study, trial, trial.user_attrs.get("runner")):
                give_up_or_put_back(self.study, trial, "its process died", self.max_retries)

    def _nobody_asks(self, attributes: Mapping[str, Any]) -> bool:
        """Whether this process runs nothing, before its first trial or after its last, and all other runners have ended."""
        lives = [life for name, life in attributes.items() if name.startswith(RUNNER) and name != RUNNER + self.id]
        return not self._thread.is_alive() and all(map(_has_ended, lives))

    def _look(self, name: str, life: Any) -> tuple[Any, int]:
        last_life, looks = self._looks.get(name, (None, 0))
        return life, looks + 1 if life == last_life else 0

    def _beat(self) -> None:
        self._beats += 1
        life = {"host": here(), "pid": os.getpid(), "beats": self._beats}
        self.study.set_user_attr(RUNNER + self.id, life)

    def _live(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._beat()
            self.put_lost_trials_back()


def _runner_of(trial: FrozenTrial) -> str:
    runner = trial.user_attrs.get("runner")
    return RUNNER + runner if runner else f"trial {trial.number}"


def _has_ended(life: dict[str, Any] | None) -> bool:
    if not life:
        return False
    return life.get("ended", False) or (life["host"] == here() and not is_alive(life["pid"]))


def give_up_or_put_back(study: optuna.Study, trial: FrozenTrial, reason: str, max_retries: int) -> bool:
    """
    Deal with a trial that was lost: it is retried up to a limit, and then fails with the reasons.

    :param study: The study
    :param trial: The trial, as it was when it was found lost
    :param reason: Why it was lost
    :param max_retries: How often a trial is retried
    :return: Whether it is in the queue again
    """
    losses = [*trial.user_attrs.get("losses", []), reason]
    set_trial_attribute(study, trial, "losses", losses)
    if len(losses) > max_retries:
        fail(study, trial, f"lost {len(losses)} times, at last because {reason}")
        return False
    put_back(study, trial)
    return True


def fail(study: optuna.Study, trial: FrozenTrial, reason: str) -> None:
    """
    Fail a running trial, with the reason in its user attribute ``failure``.

    :param study: The study
    :param trial: The trial
    :param reason: What happened, in a line
    """
    set_trial_attribute(study, trial, "failure", reason)
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
