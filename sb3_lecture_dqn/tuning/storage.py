"""
Where a study lives: SQLite, PostgreSQL (or another database), or a journal file; and what to do when the database is away.

Optuna's private API is used here alone; ``tests/test_upstream.py`` says what of it.
"""

import functools
import logging
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc
from sqlalchemy.engine import make_url

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: How long a database may be away before a study gives up.
PATIENCE_SECONDS = 600.0
#: What others may have done to held trials is seen after so long.
FULL_READ_SECONDS = 60.0
#: A server that vanished without a word is noticed after about half a minute.
POSTGRESQL_ARGUMENTS = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4}
#: What Optuna's cache calls of its database beside the abstract methods of a storage.
CACHE_METHODS = (
    "_create_new_trial",
    "_get_best_trial_id",
    "_get_trials",
    "_set_trial_param",
    "get_trial_id_from_study_id_trial_number",
)


class TuningError(Exception):
    """What the user has to change, in one line."""


def _is_outage(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    return isinstance(cause, (exc.OperationalError, exc.InterfaceError))


def _patiently(method: Callable[..., Result]) -> Callable[..., Result]:
    @functools.wraps(method)
    def call(storage: "PatientStorage", *args: Any, **kwargs: Any) -> Result:
        return storage._repeat(functools.partial(method, storage, *args, **kwargs))

    return call


class PatientStorage(RDBStorage):
    """
    A database whose outages are waited for: each method is one transaction, which is repeated until it succeeds.

    Optuna's cache reads every unfinished trial again, with its values, several times for each new one. A driver with a
    thousand workers would do nothing else; so it puts those that it runs itself into ``held``, and once they have been
    read as running they are left out.

    :param url: SQLAlchemy's URL
    :param engine_kwargs: Arguments of SQLAlchemy's ``create_engine``
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any]) -> None:
        self.patience_seconds = 0.0  # what is wrong at the start is an error, not an outage
        self.held: set[int] = set()
        self._read_as_running: set[int] = set()  # the others of those held may still be in the cache as waiting
        self._newest: dict[int, int] = {}
        self._next_full_read = 0.0
        super().__init__(url, engine_kwargs)

    def _repeat(self, transaction: Callable[[], Result]) -> Result:
        deadline = time.monotonic() + self.patience_seconds
        is_waiting = False
        while True:
            try:
                result = transaction()
            except (optuna.exceptions.StorageInternalError, exc.DBAPIError) as error:
                if not _is_outage(error) or time.monotonic() >= deadline:
                    raise
                if not is_waiting:
                    _logger.warning("the study's database does not answer, waiting: %s", first_line(error))
                is_waiting = True
                time.sleep(1.0)
            else:
                if is_waiting:
                    _logger.warning("the study's database is back")
                return result

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        now = time.monotonic()
        if not self.held or now >= self._next_full_read:
            self._next_full_read = now + FULL_READ_SECONDS
        else:
            included_trial_ids = included_trial_ids - (self.held & self._read_as_running)
            trial_id_greater_than = max(trial_id_greater_than, self._newest.get(study_id, -1))
        trials: list[FrozenTrial] = self._read_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        self._newest[study_id] = max((trial._trial_id for trial in trials), default=self._newest.get(study_id, -1))
        read = {trial._trial_id for trial in trials}
        running = {trial._trial_id for trial in trials if trial.state == TrialState.RUNNING}
        self._read_as_running = (self._read_as_running - read) | running
        return trials

    @_patiently
    def _read_trials(self, *arguments: Any) -> list[FrozenTrial]:
        return super()._get_trials(*arguments)

    def endswith(self, suffix: str) -> bool:
        """
        Answer rl_zoo3, which takes its storage for a string and asks whether it is a journal file.

        :param suffix: Without effect
        :return: ``False``
        """
        return False


for _name in {*BaseStorage.__abstractmethods__, *CACHE_METHODS} - {"_get_trials"}:
    setattr(PatientStorage, _name, _patiently(getattr(RDBStorage, _name)))


def first_line(error: BaseException) -> str:
    """
    Shorten what an error says to what helps.

    :param error: Any error
    :return: Its first line, or its type where it says nothing; of a database's error, the first line of what its driver said
    """
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ else error
    lines = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__


def show_url(url: str) -> str:
    """
    Write a storage's address without its password.

    :param url: SQLAlchemy's URL, or a journal file's path
    :return: What may be printed
    """
    try:
        return make_url(url).render_as_string(hide_password=True)
    except exc.ArgumentError:
        return url


def open_storage(url: str) -> BaseStorage:
    """
    Open a study's storage, and make its tables if it has none.

    :param url: SQLAlchemy's URL; or the path of a journal file, ending in ``.log``, as in rl_zoo3
    :return: The storage
    :raises TuningError: if it cannot be reached or opened
    """
    try:
        if url.endswith(".log"):
            _make_folder(url)
            return JournalStorage(JournalFileBackend(url))
        return _open_database(url)
    except (exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError, RuntimeError) as error:
        raise TuningError(f"storage {show_url(url)} cannot be opened: {first_line(error)}") from error


def _open_database(url: str) -> PatientStorage:
    backend = make_url(url).get_backend_name()
    if backend == "sqlite":
        _make_folder(url)
    arguments = POSTGRESQL_ARGUMENTS if backend == "postgresql" else {}
    engine_kwargs = {"pool_pre_ping": True, "connect_args": arguments}
    try:
        return PatientStorage(url, engine_kwargs)
    except (exc.IntegrityError, exc.ProgrammingError):
        time.sleep(1.0)  # another process made the tables at the same moment; they are there now
        return PatientStorage(url, engine_kwargs)


def _make_folder(url: str) -> None:
    file = find_storage_file(url)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)


def find_storage_file(url: str) -> Path | None:
    """
    Say which file a storage is.

    :param url: As :func:`open_storage` takes it
    :return: The journal or SQLite file; ``None`` for a server, a database in memory, or what is no storage
    """
    if url.endswith(".log"):
        return Path(url)
    try:
        parts = make_url(url)
    except exc.ArgumentError:
        return None
    is_file = parts.get_backend_name() == "sqlite" and parts.database and not parts.database.startswith(("file:", ":memory:"))
    return Path(parts.database or "") if is_file else None


def wait_for_outages(storage: BaseStorage) -> None:
    """
    From now on, wait while the database is away: everything that can be wrong from the start has been checked.

    :param storage: What :func:`open_storage` returned
    """
    if isinstance(storage, PatientStorage):
        storage.patience_seconds = PATIENCE_SECONDS


def held_trials(study: optuna.Study) -> set[int]:
    """
    Get the set of trials that this process runs, by their ids, which a database need not read again.

    :param study: The study
    :return: The set that its database looks at; for other storages one that nobody looks at
    """
    database = getattr(study._storage, "_backend", None)
    return database.held if isinstance(database, PatientStorage) else set()


def hold(study: optuna.Study, trial: optuna.Trial) -> None:
    """
    Note that this process runs a trial, which a database then need not read again.

    :param study: The study
    :param trial: The trial
    """
    held_trials(study).add(trial._trial_id)


def let_go(study: optuna.Study, trial: optuna.Trial) -> None:
    """
    Note that this process no longer runs a trial.

    :param study: The study
    :param trial: The trial
    """
    held_trials(study).discard(trial._trial_id)


def read_trial(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial:
    """
    Read a trial as it is now.

    :param study: The study
    :param trial: A running trial
    :return: What the storage says
    """
    return study._storage.get_trial(trial._trial_id)


def put_back(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> None:
    """
    Put a running trial back into the queue: the next one who asks gets it, with its number and its values.

    :param study: The study
    :param trial: A trial that nobody runs any more
    """
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def is_held(study: optuna.Study, trial: FrozenTrial | optuna.Trial, runner: str | None) -> bool:
    """
    Look, just before a trial is dealt with, whose it is.

    :param study: The study
    :param trial: The trial
    :param runner: Who is thought to run it; ``None`` if nobody has claimed it
    :return: Whether that is still so
    """
    now = study._storage.get_trial(trial._trial_id)
    return now.state == TrialState.RUNNING and now.user_attrs.get("runner") == runner


def set_trial_attribute(study: optuna.Study, trial: FrozenTrial | optuna.Trial, key: str, value: Any) -> None:
    """
    Set a user attribute of a trial that this process may not have asked for.

    :param study: The study
    :param trial: The trial
    :param key: Name of the attribute
    :param value: What json can write
    """
    study._storage.set_trial_user_attr(trial._trial_id, key, value)
