"""
Where trials run: Ray, on this machine or on a cluster. The only module that imports Ray.

A worker needs no database. Its trial's values come with the task; what it reports goes through a mailbox, an actor beside
the driver, and the answer says whether to go on. So a study has one connection, however many workers it has.
"""

import asyncio
import logging
import os
import socket
import tempfile
from typing import Any

import optuna
import ray
import torch as th
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sb3_lecture_dqn import zoo
from sb3_lecture_dqn.tuning.driver import Outcome, Report
from sb3_lecture_dqn.tuning.storage import TuningError, first_line

#: One worker waits for each answer; Ray's own limit is 1000.
MAILBOX_CALLS = 100_000
#: How long a cluster may take to answer.
CONNECT_SECONDS = 5.0
#: The preface of HTTP/2 and an empty frame of settings, whose header names length, type, flags and stream.
FRAME_HEADER_BYTES, SETTINGS_FRAME = 9, 4
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS_FRAME, 0, 0, 0, 0, 0])
#: Tasks and results are a few hundred bytes, and a hyperparameter file; Ray would take a third of the memory.
OBJECT_STORE_BYTES = 100 * 2**20
#: Characters of a reason that are kept in the study.
MAX_REASON = 300


class Mailbox:
    """An actor that brings reports to the driver and its answers back."""

    def __init__(self) -> None:
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._tickets = 0

    async def report(self, number: int, attempt: int, value: float, step: int) -> bool:
        """
        Give the driver a value, and wait until it says whether the trial is pruned.

        :param number: Number of the trial
        :param attempt: The attempt's number
        :param value: The mean return
        :param step: The evaluation
        :return: Whether the trial is to stop
        """
        self._tickets += 1
        ticket = self._tickets
        self._answers[ticket] = asyncio.get_running_loop().create_future()
        await self._reports.put(Report(ticket, number, attempt, value, step))
        try:
            return await self._answers[ticket]
        finally:
            del self._answers[ticket]

    async def take(self) -> list[Report]:
        """
        Wait for reports, and hand over all that are there.

        :return: At least one report, the oldest first
        """
        reports = [await self._reports.get()]
        while not self._reports.empty():
            reports.append(self._reports.get_nowait())
        return reports

    async def answer(self, ticket: int, is_pruned: bool) -> None:
        """
        Let a worker go on or stop.

        :param ticket: Which report is answered; one that nobody waits for any more is left alone
        :param is_pruned: Whether the trial is to stop
        """
        future = self._answers.get(ticket)
        if future is not None and not future.done():
            future.set_result(is_pruned)


class ReportingTrial(optuna.trial.FixedTrial):
    """
    A trial in a worker: its values are drawn, its reports go to the driver.

    :param params: What the driver drew
    :param number: Number of the trial
    :param attempt: A number that no other attempt of this driver has
    :param mailbox: The driver's mailbox
    """

    def __init__(self, params: dict[str, Any], number: int, attempt: int, mailbox: Any) -> None:
        super().__init__(params, number)
        self._attempt = attempt
        self._mailbox = mailbox
        self._is_pruned = False

    def report(self, value: float, step: int) -> None:
        """
        Send a value to the driver, and note its answer.

        :param value: The mean return
        :param step: The evaluation
        """
        self._is_pruned = ray.get(self._mailbox.report.remote(self.number, self._attempt, float(value), step))

    def should_prune(self) -> bool:
        """
        Say what the driver answered to the last report.

        :return: Whether the trial is to stop
        """
        return self._is_pruned


def _run_trial(settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int, mailbox: Any) -> Outcome:
    th.set_num_threads(1)
    trial = ReportingTrial(params, number, attempt, mailbox)
    with tempfile.TemporaryDirectory() as folder:
        try:
            value = zoo.make_manager(settings, folder).objective(trial)
        except optuna.TrialPruned:
            return Outcome(number, optuna.trial.TrialState.PRUNED, attributes=trial.user_attrs)
    return Outcome(number, optuna.trial.TrialState.COMPLETE, value, attributes=trial.user_attrs)


class RayEngine:
    """
    Runs attempts at trials on Ray, one thread each.

    :param address: Address of a cluster (``HOST:PORT``, or ``auto`` for the one on this machine); ``None`` starts Ray here
    :param workers: How many trials may run at once; ``None`` for one on each core
    :raises TuningError: if there is no such cluster
    """

    def __init__(self, address: str | None, workers: int | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster of our own; the user was not asked
        self._workers = workers
        _start_ray(address, workers)
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote: Any = ray.remote  # its annotations leave out some of its arguments
        mailbox = remote(num_cpus=0, max_restarts=-1, max_concurrency=MAILBOX_CALLS, scheduling_strategy=strategy)
        self._mailbox = mailbox(Mailbox).remote()
        self._mail = self._mailbox.take.remote()
        self._attempts: dict[Any, int] = {}
        # retried by the driver, which keeps account of it
        self._run_trial = remote(num_cpus=1, max_retries=0)(_run_trial)

    def capacity(self) -> int:
        """
        Count how many trials may run at once; a cluster may grow and shrink.

        :return: The number that was asked for, or one for each core that is there now
        """
        resources: Any = ray.cluster_resources  # not annotated
        return self._workers or max(int(resources().get("CPU", 0)), 1)

    def submit(self, settings: zoo.TrialSettings, params: dict[str, Any], number: int, attempt: int) -> None:
        """
        Start an attempt at a trial.

        :param settings: What decides its score
        :param params: The values that were drawn
        :param number: Number of the trial
        :param attempt: A number that no other attempt of this driver has
        """
        reference = self._run_trial.remote(settings, params, number, attempt, self._mailbox)
        self._attempts[reference] = number

    def wait(self, seconds: float) -> list[Report | Outcome]:
        """
        Wait for what the workers say.

        :param seconds: How long at most
        :return: Reports, and the outcomes of attempts that have ended
        """
        ready, _ = ray.wait([self._mail, *self._attempts], num_returns=1, timeout=seconds)
        if ready:
            ready, _ = ray.wait([self._mail, *self._attempts], num_returns=1 + len(self._attempts), timeout=0)
        events: list[Report | Outcome] = []
        for reference in ready:
            if reference == self._mail:
                events.extend(self._take_mail())
            else:
                events.append(_outcome(self._attempts.pop(reference), reference))
        return events

    def _take_mail(self) -> list[Report]:
        mail, self._mail = self._mail, self._mailbox.take.remote()
        try:
            reports: list[Report] = ray.get(mail)
        except exceptions.RayError:  # the mailbox died and was restarted; who waited for it is lost
            return []
        return reports

    def answer(self, report: Report, is_pruned: bool) -> None:
        """
        Answer a report.

        :param report: The report
        :param is_pruned: Whether its trial is to stop
        """
        self._mailbox.answer.remote(report.ticket, is_pruned)

    def close(self) -> None:
        """Stop what runs, and leave the cluster (or stop it, if it is our own)."""
        for reference in self._attempts:
            ray.cancel(reference, force=True)
        ray.kill(self._mailbox)
        ray.shutdown()


def _start_ray(address: str | None, workers: int | None) -> None:
    try:
        if address is None:
            options: dict[str, Any] = {
                "num_cpus": workers,
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": False,
            }
            ray.init(address="local", log_to_driver=False, logging_level=logging.WARNING, **options)
            return
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, exceptions.RayError) as error:
        raise TuningError(f"Ray cluster {address or 'on this machine'} cannot be reached: {first_line(error)}") from error


def check_address(address: str | None) -> None:
    """
    Check that something answers at a cluster's address; Ray itself would try for a long time.

    :param address: As :class:`RayEngine` takes it
    :raises TuningError: if it is no address, or nothing answers
    """
    if address in (None, "auto"):
        return
    host, separator, port = str(address).rpartition(":")
    if not separator or not port.isdigit() or "/" in host:
        raise TuningError(f"--ray-address must be auto or HOST:PORT, got {address}")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as connection:
            is_ray = _uses_tls() or _speaks_grpc(connection)
    except OSError as error:
        raise TuningError(f"Ray cluster {address} cannot be reached: {error}") from error
    if not is_ray:
        raise TuningError(f"Ray cluster {address} cannot be reached: something else answers there")


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _speaks_grpc(connection: socket.socket) -> bool:
    """Greet a server as HTTP/2 (RFC 9113, 3.4), on which gRPC and so Ray's head node rests; it answers with its settings."""
    connection.sendall(HTTP2_GREETING)
    answer = b""
    while len(answer) < FRAME_HEADER_BYTES:
        received = connection.recv(FRAME_HEADER_BYTES - len(answer))
        if not received:
            return False
        answer += received
    return answer[3] == SETTINGS_FRAME


def _outcome(number: int, reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, exceptions.RayError):  # its mailbox died
            return Outcome(number, optuna.trial.TrialState.RUNNING, reason=_reason(error.cause))
        return Outcome(number, optuna.trial.TrialState.FAIL, reason=f"{type(error.cause).__name__}: {_reason(error.cause)}")
    except exceptions.RayError as error:
        return Outcome(number, optuna.trial.TrialState.RUNNING, reason=f"{type(error).__name__}: {_reason(error)}")
    return outcome


def _reason(error: BaseException) -> str:
    return first_line(error)[:MAX_REASON]
