"""A supervisor over scripted engines, and ways to wait for what it does. As a program: serves until it is killed.

python -m tests.fakes.fleet STATE_FOLDER
"""

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from engines.engine import Pace, Report
from engines.marks import marked, state_id
from engines.paths import StatePaths
from engines.spec import EngineSettings, EngineSpec, EngineStatus, Launch, Restart
from engines.supervisor import Supervisor

T = TypeVar("T")

SCRIPT = Path(__file__).with_name("engine_process.py")
QUICK = Pace(loading=0.01, watching=0.05, hurry=0.01, hurry_for=0.5, settle=0.02, draining=0.01, grace=0.5)
NEVER = 3600.0
TREE = 6  # the processes of a scripted engine: guard, server, two children, two grandchildren


def run(story: Coroutine[Any, Any, T], seconds: float = 120.0) -> T:
    """Run a test's story on an event loop, with a limit."""
    return asyncio.run(asyncio.wait_for(story, seconds))


async def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a condition holds; fail when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not: {condition}"
        await asyncio.sleep(0.01)


def state_paths(folder: Path) -> StatePaths:
    return StatePaths(data=folder / "data", logs=folder / "logs", run=folder / "run")


def engine_spec(model: str = "tiny", replica: int = 0, **settings: Any) -> EngineSpec:
    """An engine that restarts fast and never counts as hung, unless said otherwise."""
    defaults: dict[str, Any] = {"restart": Restart(first_delay=0.01), "hang_timeout": NEVER}
    return EngineSpec(model=model, replica=replica, settings=EngineSettings(**{**defaults, **settings}))


class Scripted:
    """Launches scripted engines. `flags` are added to the command line; change them between starts."""

    def __init__(self, paths: StatePaths, *flags: str) -> None:
        self.paths = paths
        self.flags = flags
        self.interpreter = sys.executable
        self.prepared = 0

    async def __call__(self, spec: EngineSpec, report: Report) -> Launch:
        self.prepared += 1
        path = str(self.paths.run / f"{spec.model}-{spec.replica}.sock")
        argv = (self.interpreter, "-I", "-S", str(SCRIPT), "--uds", path, "--model", spec.model, *self.flags)
        return Launch(argv=argv, environment={"FROM_LAUNCH": "1"}, address=f"unix:{path}")


class Fleet:
    """A started supervisor and what a test asks of it."""

    def __init__(self, supervisor: Supervisor, script: Scripted) -> None:
        self.supervisor, self.script = supervisor, script

    def status(self, engine: str = "tiny/0") -> EngineStatus:
        return next(e for e in self.supervisor.fleet().engines if e.id == engine)

    async def until(self, test: Callable[[EngineStatus], bool], engine: str = "tiny/0") -> EngineStatus:
        """Wait for an engine's status that passes the test, and return it."""
        async for fleet in self.supervisor.watch():
            status = next(e for e in fleet.engines if e.id == engine)
            if test(status):
                return status
        raise AssertionError(f"{engine} never got there: {self.status(engine)}")

    async def until_state(self, state: str, engine: str = "tiny/0") -> EngineStatus:
        return await self.until(lambda status: status.state == state, engine)

    async def until_restarted(self, engine: str = "tiny/0") -> EngineStatus:
        return await self.until(lambda status: status.state == "ready" and status.restarts >= 1, engine)

    async def until_whole(self, engine: str = "tiny/0") -> EngineStatus:
        """Wait until the engine is ready and has all its processes."""
        status = await self.until_state("ready", engine)
        await eventually(lambda: len(self.processes(engine)) == TREE)
        return status

    def pid(self, engine: str = "tiny/0") -> int:
        pid = self.status(engine).pid
        assert pid is not None
        return pid

    def processes(self, engine: str | None = None) -> set[int]:
        """The ids of all processes of an engine, its guard included."""
        return set(marked(state_id(self.script.paths), engine))

    async def ask(self, target: str, engine: str = "tiny/0") -> str:
        """Send the scripted engine a command, such as `/set?running=1`; return what it answers."""
        address = self.status(engine).address
        assert address is not None
        return await asyncio.to_thread(_post, address.removeprefix("unix:"), target)


def _post(path: str, target: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(f"POST {target} HTTP/1.1\r\n\r\n".encode())
        return connection.recv(65536).decode().rpartition("\r\n")[2]


@asynccontextmanager
async def supervised(
    folder: Path, *specs: EngineSpec, flags: tuple[str, ...] = (), pace: Pace = QUICK
) -> AsyncIterator[Fleet]:
    """Start a supervisor over scripted engines; close it at the end, whatever happened."""
    paths = state_paths(folder)
    script = Scripted(paths, *flags)
    supervisor = Supervisor(specs or (engine_spec(),), paths, script, pace)
    await supervisor.start()
    try:
        yield Fleet(supervisor, script)
    finally:
        await supervisor.close(grace=0)


async def _serve_for_ever(folder: Path) -> None:
    async with supervised(folder) as fleet:
        await fleet.until_state("ready")
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve_for_ever(Path(sys.argv[1])))
