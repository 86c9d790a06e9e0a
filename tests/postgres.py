"""A real PostgreSQL server for tests and benchmarks: its own cluster in a temporary folder, on a free port of loopback."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDERS = (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *map(Path, os.get_exec_path()))


def find_programs() -> Path | None:
    """The folder with ``initdb`` and ``pg_ctl``: Debian's, or one in PATH."""
    return next((folder for folder in FOLDERS if (folder / "initdb").exists()), None)


class PostgresServer:
    """
    A server that can be stopped and started again.

    :param programs: Folder of ``initdb`` and ``pg_ctl``
    :param folder: An empty folder, removed by whoever made it
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._data = folder / "data"
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            account = pwd.getpwnam("postgres")
            self._user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(folder, account.pw_uid, account.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._run("initdb", "--auth=trust", "--username=tuner", "--no-sync", "--encoding=UTF8", "--locale=C")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", str(self._data), *arguments]
        # a file, not a pipe: the server keeps what it inherits open
        with tempfile.TemporaryFile("w+") as output:
            options = {"cwd": "/", "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, **self._user}
            result = subprocess.run(command, check=False, stdout=output, stderr=output, **options)
            output.seek(0)
            assert result.returncode == 0, output.read()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=300"
        self._run("pg_ctl", "-w", "-o", options, "start")

    def stop(self) -> None:
        """Stop at once, with connections cut, as in a crash."""
        self._run("pg_ctl", "-m", "immediate", "-w", "stop")

    def url(self, user: str = "tuner", database: str = "postgres") -> str:
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        import psycopg

        address = self.url(database=database).replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement.encode())


@contextlib.contextmanager
def postgres_server(programs: Path) -> Iterator[PostgresServer]:
    """A running server, gone at the end with its files."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        server = PostgresServer(programs, folder)
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(AssertionError):  # a test may have stopped it
                server.stop()
    finally:
        shutil.rmtree(folder)
