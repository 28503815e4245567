"""The only file that spawns, signals and reaps. One supervisor owns one state folder and all engines in it.

    supervisor ── guard (one per engine, its own session) ── API server ── core, workers, ...

Three things end an engine's processes, so that none is ever orphaned:
1. Its guard, when the API server ends, when it is told to, or when the supervisor is gone.
2. The supervisor, a child subreaper as well, when the guard itself was killed: by the mark in the environment.
3. The next supervisor of the same state folder, which finds by the same mark what an earlier one left behind.
"""

import asyncio
import contextlib
import difflib
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

import engines.guard
from engines.engine import Engine, Pace, Prepare, Process
from engines.guard import Order, become_subreaper, descendants, process_table, send
from engines.lifecycle import Command, IllegalMove
from engines.logs import slug
from engines.marks import engine_environment, mark, marked, state_id
from engines.paths import StatePaths
from engines.spec import EngineSpec, FleetStatus, Launch

log = logging.getLogger(__name__)

# How much longer than its grace a guard may take before it is killed, and how long SIGKILL may take to work.
_GUARD_MARGIN: Final = 10.0
_KILL_LIMIT: Final = 10.0


class AlreadyRunning(Exception):
    """Another supervisor owns this state folder."""


class UnknownEngine(Exception):
    """No engine of this name. `matches` are the names that come close."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.matches = tuple(difflib.get_close_matches(name, known))
        hint = f"; did you mean {', '.join(self.matches)}?" if self.matches else ""
        super().__init__(f"no local engine serves {name!r}{hint}")


class Supervisor:
    """All engines of one server.

    specs: what there is to run. prepare: makes the Launch of an engine, reporting what it does; what it
    raises is shown to the user as the reason why the engine failed.
    """

    def __init__(
        self, specs: Sequence[EngineSpec], paths: StatePaths, prepare: Prepare, pace: Pace | None = None
    ) -> None:
        # Mutable: the engines, those that are wanted, and the task that owns each; the lock's file, the version of the
        # fleet and the event of its next change, what is being done to follow other specs, and the task that closes it.
        self._paths, self._pace, self._prepare = paths, pace or Pace(), prepare
        self._engines = {spec.id: self._engine(spec) for spec in specs}
        self._wanted = {spec.id: spec for spec in specs}
        self._owners: dict[str, asyncio.Task[None]] = {}
        self._state_id = ""
        self._lock: int | None = None
        self._started = False
        self._following: set[asyncio.Task[None]] = set()
        self._version = 0
        self._changed = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Supervisor({list(self._engines.values())!r}, version={self._version})"

    async def claim(self) -> None:
        """Take the state folder, and end what an earlier run left in it: then the memory is free to be planned.

        Raises AlreadyRunning where another server has the folder.
        """
        self._paths.create()
        self._lock = take_lock(self._paths.lock)
        self._state_id = state_id(self._paths)
        become_subreaper()
        await end_leftovers(self._state_id)

    async def start(self) -> None:
        """Claim the folder if that was not done, and begin to load the engines; returns before they are ready."""
        if self._lock is None:
            await self.claim()
        self._started = True
        await asyncio.gather(*(self._begin(engine) for engine in self._engines.values()))

    async def follow(self, specs: Sequence[EngineSpec]) -> None:
        """Run these engines from now on; return when that has begun.

        1. One that is gone drains and stops. 2. A new one is loaded, where it is to start by itself. 3. One whose
        process would be another is restarted, one replica of a model after the other; 4. all others just go on.
        """
        self._wanted = {spec.id: spec for spec in specs}
        for engine_id in self._engines.keys() - self._wanted.keys():  # 1
            if not self._is_leaving(engine_id):
                self._go_on(self._remove(self._engines[engine_id]))
        others: dict[str, list[Engine]] = {}
        for spec in specs:
            engine = self._engines.get(spec.id)
            if engine is None:  # 2
                await self._add(spec.id)
            elif self._is_leaving(spec.id):
                self._go_on(self._add(spec.id))
            else:  # 3, 4
                if not spec.same_process(engine.spec):
                    others.setdefault(spec.model, []).append(engine)
                engine.spec = spec
        for changed in others.values():
            self._go_on(self._restart_in_turn(changed))

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _add(self, engine_id: str) -> None:
        """Take an engine in, if it is still wanted when one of its name that leaves has gone."""
        while self._is_leaving(engine_id):
            await self._changed.wait()
        if engine_id in self._wanted and engine_id not in self._engines:
            engine = self._engines[engine_id] = self._engine(self._wanted[engine_id])
            await self._begin(engine)

    def _is_leaving(self, engine_id: str) -> bool:
        return engine_id in self._owners and bool(self._owners[engine_id].cancelling())

    async def _begin(self, engine: Engine) -> None:
        self._owners[engine.spec.id] = asyncio.create_task(engine.own())
        if engine.spec.settings.autostart:
            await engine.command("load")

    async def _remove(self, engine: Engine) -> None:
        """Drain and stop an engine, and forget it."""
        owner = self._owners[engine.spec.id]
        owner.cancel()
        await asyncio.wait([owner])
        del self._engines[engine.spec.id], self._owners[engine.spec.id]
        self._change()

    async def _restart_in_turn(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            with contextlib.suppress(IllegalMove):  # it does not run, or begins anew already
                await engine.command("restart")
            while engine.state in ("starting", "draining"):
                await self._changed.wait()

    def _engine(self, spec: EngineSpec) -> Engine:
        return Engine(spec, self._log_file(spec.id), self._prepare, self._spawn, self._change, self._pace)

    async def load(self, model: str, replica: int | None = None) -> None:
        """Begin to load a model's engines, or one of them; nothing happens to those that run."""
        await self.command("load", model, replica)

    async def unload(self, model: str, replica: int | None = None) -> None:
        """Begin to drain and stop a model's engines, or one of them."""
        await self.command("unload", model, replica)

    async def restart(self, model: str, replica: int | None = None) -> None:
        """Begin to drain, stop and load again a model's engines, or one of them."""
        await self.command("restart", model, replica)

    async def command(self, command: Command, model: str, replica: int | None = None) -> None:
        """Have a model's engines, or one of them, begin to do something.

        Raises UnknownEngine, or IllegalMove when none of them can do it now.
        """
        if self._closing is not None or not self._started:
            raise IllegalMove("the server is stopping" if self._closing else "the supervisor has not started")
        chosen = [self._engines[i] for i in self.select(model, replica)]
        outcomes = await asyncio.gather(*(e.command(command) for e in chosen), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(chosen):
            raise failures[0]

    def select(self, model: str, replica: int | None = None) -> tuple[str, ...]:
        """Return the ids of a model's engines; `model` may be an engine id too. Raises UnknownEngine."""
        ids = tuple(
            engine_id
            for engine_id, engine in self._engines.items()
            if engine.spec.model == model and replica in (None, engine.spec.replica)
        )
        if not ids and replica is None and model in self._engines:
            ids = (model,)
        if not ids:
            known = {engine.spec.model for engine in self._engines.values()} | self._engines.keys()
            raise UnknownEngine(model if replica is None else f"{model}/{replica}", sorted(known))
        return ids

    def log_path(self, engine: str) -> Path:
        """Return the log of an engine, which may not exist yet. Raises UnknownEngine."""
        if engine not in self._engines:
            raise UnknownEngine(engine, list(self._engines))
        return self._log_file(engine)

    def fleet(self) -> FleetStatus:
        """Return all engines as they are now."""
        return FleetStatus(self._version, tuple(engine.status for engine in self._engines.values()))

    async def watch(self) -> AsyncGenerator[FleetStatus, None]:
        """Yield the fleet as it is now and after each change, until it is closed; a slow reader gets the latest."""
        while True:
            changed, closed = self._changed, self._closed
            yield self.fleet()
            if closed:
                return
            await changed.wait()

    async def close(self, grace: float | None = None) -> None:
        """Drain and stop all engines, give the state folder back. May be called again, to hurry.

        grace: seconds for requests in flight, where that is less than the engine's own drain_timeout.
        """
        if grace is not None:
            for engine in self._engines.values():
                engine.hurry(grace)
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for task in (*self._following, *self._owners.values()):
            if not task.cancelling():  # it ends its engine already
                task.cancel()
        await asyncio.gather(*self._following, *self._owners.values(), return_exceptions=True)
        self._closed = True
        self._change()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _change(self) -> None:
        self._version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _log_file(self, engine: str) -> Path:
        return self._paths.logs / f"{slug(engine)}.log"

    async def _spawn(self, spec: EngineSpec, launch: Launch) -> Process:
        order = Order(
            argv=list(launch.argv),
            log=str(self._log_file(spec.id)),
            parent=os.getpid(),
            socket=launch.address.removeprefix("unix:") if launch.address.startswith("unix:") else None,
            grace=self._pace.grace,
        )
        environment = engine_environment(os.environ, launch, mark(self._state_id, spec.id))
        # Isolated and without site: it starts in milliseconds, and nothing of the engine's environment bends it.
        guard = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", engines.guard.__file__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        return GuardedProcess(guard, order, self._state_id, spec.id)


class GuardedProcess:
    """An engine's process tree under its guard."""

    def __init__(self, guard: asyncio.subprocess.Process, order: Order, state: str, engine: str) -> None:
        # Mutable: the descriptors that tell when a member ends, and the task that waits for the end of all.
        self.member_lost = asyncio.Event()
        self._guard, self._order = guard, order
        self._state_id, self._engine = state, engine
        self._members: set[int] = set()
        self._end = asyncio.create_task(self._until_nothing_is_left())

    def __repr__(self) -> str:
        return f"GuardedProcess({self._engine!r}, guard={self._guard.pid})"

    async def started(self) -> int | None:
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        self._guard.stdin.write(msgspec.json.encode(self._order._asdict()) + b"\n")
        return int(await self._guard.stdout.readline() or 0) or None

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    async def stop(self, grace: float) -> None:
        self._signal(signal.SIGTERM if grace > 0 else signal.SIGINT)
        try:
            await asyncio.wait_for(asyncio.shield(self._end), self._order.grace + _GUARD_MARGIN)
        except TimeoutError:
            log.error("engine %s: its guard does not end it; killing both", self._engine)
            self._signal(signal.SIGKILL)
            await asyncio.shield(self._end)

    def watch_members(self) -> None:
        loop = asyncio.get_running_loop()
        for pid in descendants(self._guard.pid, process_table()):
            with contextlib.suppress(OSError):
                member = os.pidfd_open(pid)
                self._members.add(member)
                loop.add_reader(member, self._lose, member)

    def _lose(self, member: int) -> None:
        self._forget(member)
        self.member_lost.set()

    def _forget(self, member: int) -> None:
        asyncio.get_running_loop().remove_reader(member)
        os.close(member)
        self._members.remove(member)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._guard.send_signal(number)

    async def _until_nothing_is_left(self) -> int:
        status = await self._guard.wait()
        for member in tuple(self._members):
            self._forget(member)
        if status < 0:
            log.warning("engine %s: its guard was killed; ending what it left", self._engine)
            await kill_marked(self._state_id, self._engine, session=self._guard.pid)
        return status


def take_lock(path: Path) -> int:
    """Lock a state folder for this process; return the descriptor that holds the lock. Raises AlreadyRunning."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode() or "unknown"
        os.close(lock)
        raise AlreadyRunning(
            f"another server (process {holder}) uses {path.parent}; stop it, or choose another folder with --state-dir"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


async def end_leftovers(state: str) -> None:
    """End the engine processes that an earlier run of this state folder left behind."""
    if found := marked(state):
        names = ", ".join(sorted(set(found.values())))
        log.warning("ending %d processes that an earlier run left behind: %s", len(found), names)
        await kill_marked(state)


async def kill_marked(state: str, engine: str | None = None, session: int | None = None) -> None:
    """SIGKILL all processes of an engine, or of all engines of a state folder, until none is left.

    session: the engine's session, whose members belong to it even where they lost the mark.
    """
    deadline = time.monotonic() + _KILL_LIMIT
    dying: set[int] = set()
    while dying := _victims(state, engine, session) | _not_gone(dying):
        for pid in dying:
            send(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            log.error("processes %s cannot be killed; what they hold is not free", sorted(dying))
            return
        await asyncio.sleep(0.01)


def _victims(state: str, engine: str | None, session: int | None) -> set[int]:
    members = {pid for pid, row in process_table().items() if row.session == session} if session else set()
    return (members | marked(state, engine).keys()) - {os.getpid()}


def _not_gone(dying: set[int]) -> set[int]:
    """Return those that still have to go. Orphans that were handed to us, as the subreaper, are reaped here.

    A zombie that another process has to reap holds nothing any more, and counts as gone.
    """
    for pid in dying:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    table = process_table()
    ours = dying | {os.getpid()}
    return {pid for pid in dying & table.keys() if table[pid].state != "Z" or table[pid].parent in ours}
