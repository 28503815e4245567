"""The story of one engine: prepared, started, ready, watched, restarted after a crash, drained, ended.

It decides nothing about processes: it is given a way to spawn one (see `supervisor`), and asks it to stop.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec

from engines.health import Probe, loading_step
from engines.lifecycle import (
    Command,
    HangWatch,
    IllegalMove,
    Sample,
    check_command,
    describe_exit,
    move,
    next_delay,
)
from engines.logs import tail_of_run
from engines.spec import EngineSpec, EngineStatus, Launch, State

log = logging.getLogger(__name__)

Report = Callable[[str, float | None], None]
Prepare = Callable[[EngineSpec, Report], Awaitable[Launch]]

T = TypeVar("T")

_TAIL_LINES: Final = 20
_LOADING_BYTES: Final = 64 * 1024
_LOADING_LINES: Final = 500


class Pace(msgspec.Struct, frozen=True):
    """How often an engine is looked at, and how long it is waited for. Seconds.

    loading: between looks at an engine that starts. watching: between looks at a ready one. hurry: between
    looks after one of its processes ended, which go on for `hurry_for`. settle: how long requests that are
    already on their way to a draining engine may take to reach it. grace: from SIGTERM to SIGKILL.
    """

    loading: float = 0.2
    watching: float = 2.0
    hurry: float = 0.1
    hurry_for: float = 5.0
    settle: float = 0.5
    draining: float = 0.1
    grace: float = 10.0


class Process(Protocol):
    """A running engine. `member_lost` is set when any process of its tree ends after `watch_members`."""

    @property
    def member_lost(self) -> asyncio.Event: ...

    async def started(self) -> int | None:
        """Start it; return the API server's process id, None if it could not be run."""

    async def wait(self) -> int:
        """Return its exit status once nothing of it is left."""

    async def stop(self, grace: float) -> None:
        """End it and all its processes; return when none is left."""

    def watch_members(self) -> None:
        """Watch the processes that it has now."""


Spawn = Callable[[EngineSpec, Launch], Awaitable[Process]]


class Crashed(Exception):
    """The engine ended or hung on its own; it is started again, after a while."""


class CannotStart(Exception):
    """The engine cannot be started, and trying again would not help."""


class _Order(msgspec.Struct, frozen=True):
    command: Command
    accepted: asyncio.Future[None]


class Engine:
    """One engine and the one task that owns it. Commands are messages to that task."""

    def __init__(
        self,
        spec: EngineSpec,
        log_path: Path,
        prepare: Prepare,
        spawn: Spawn,
        changed: Callable[[], None],
        pace: Pace,
    ) -> None:
        # Mutable: what is reported, the commands that wait, the task of the present life, the probe of a
        # ready engine, the moment when draining must end (event loop's clock), and the event that it changed.
        self.spec = spec
        self.log_path = log_path
        self._prepare, self._spawn, self._changed, self._pace = prepare, spawn, changed, pace
        self._status = EngineStatus(
            id=spec.id, model=spec.model, replica=spec.replica, state="stopped", since=time.time()
        )
        self._orders: asyncio.Queue[_Order] = asyncio.Queue()
        self._life: asyncio.Task[None] | None = None
        self._probe: Probe | None = None
        self._drain_until = float("inf")
        self._hurried = asyncio.Event()

    def __repr__(self) -> str:
        return f"Engine({self.spec.id!r}, {self.state})"

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def state(self) -> State:
        return self._status.state

    # --- commands ---

    async def command(self, command: Command) -> None:
        """Have the engine do something; return once it has begun. Raises IllegalMove."""
        check_command(command, self.spec.id, self.state)
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._orders.put_nowait(_Order(command, accepted))
        await accepted

    def hurry(self, grace: float) -> None:
        """Let a drain, running or to come, take `grace` seconds at most."""
        self._drain_until = min(self._drain_until, asyncio.get_running_loop().time() + grace)
        self._hurried.set()

    async def own(self) -> None:
        """Carry out commands until cancelled; then drain and end the engine."""
        try:
            while True:
                await self._obey(await self._orders.get())
        finally:
            while not self._orders.empty():
                _settle(self._orders.get_nowait().accepted, IllegalMove("the server is stopping"))
            await self._end()

    async def _obey(self, order: _Order) -> None:
        """1. Refused by now. 2. Already so. 3. End what there is. 4. Begin anew."""
        try:
            check_command(order.command, self.spec.id, self.state)
        except IllegalMove as refusal:  # 1
            return _settle(order.accepted, refusal)
        if order.command == "load" and self.state in ("starting", "ready"):  # 2
            return _settle(order.accepted)
        await self._end(order.accepted if order.command != "load" else None)  # 3
        if order.command != "unload":  # 4
            self._move("starting", restarts=0)
            self._life = asyncio.create_task(self._live(), name=f"engine {self.spec.id}")
        return _settle(order.accepted)

    async def _end(self, accepted: asyncio.Future[None] | None = None) -> None:
        """Drain and end the present life, if there is one; `accepted` is settled as soon as that has begun.

        Cancelled while it drains, it can be called again: it goes on where it was.
        """
        if self.state in ("starting", "ready"):
            self._move("draining", detail="finishing its requests" if self.state == "ready" else "stopping")
        if accepted is not None:
            _settle(accepted)
        if (life := self._life) is not None:
            await self._drain(life)
            if not life.cancelling():
                life.cancel()
            await asyncio.wait([life])
            if not life.cancelled() and (bug := life.exception()) is not None:
                log.error("engine %s: its task failed", self.spec.id, exc_info=bug)
        self._life = None
        if self.state != "stopped":
            self._move("stopped", address=None, context_length=None, version=None, restarts=0)

    async def _drain(self, life: asyncio.Task[None]) -> None:
        """Wait until a ready engine has nothing in flight, twice in a row, or until its time is up."""
        if self._probe is None:
            return
        loop = asyncio.get_running_loop()
        self._drain_until = min(self._drain_until, loop.time() + self.spec.settings.drain_timeout)
        await self._pause(self._pace.settle)
        idle = 0
        while idle < 2 and loop.time() < self._drain_until and not life.done() and self._probe is not None:
            answer = await self._probe.look()
            idle = idle + 1 if answer.answered and not answer.in_flight else 0
            await self._pause(self._pace.draining)
        self._drain_until = float("inf")

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the drain, which may come closer meanwhile."""
        self._hurried.clear()
        left = self._drain_until - asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurried.wait(), max(0.0, min(seconds, left)))

    # --- a life: from load to unload ---

    async def _live(self) -> None:
        """Run the engine, and again after each crash, until it cannot go on.

        1. It cannot be started, or is being unloaded. 2. It crashed too often. 3. It crashed: wait, then again.
        """
        policy = self.spec.settings.restart
        crashes: tuple[float, ...] = ()
        while (reason := await self._run_once()) is not None and self.state == "failed":  # 1
            crashes = (*crashes, time.monotonic())
            delay = next_delay(crashes, crashes[-1], policy)
            if delay is None:  # 2
                times = f"gave up after {policy.give_up_after} crashes within {policy.window:g} s"
                return self._set(detail=f"{times}: {reason}")
            self._set(detail=reason, retry_at=time.time() + delay)  # 3
            await asyncio.sleep(delay)
            self._move("starting", restarts=self._status.restarts + 1)
        return None

    async def _run_once(self) -> str | None:
        """Run the engine to its end; return why it crashed, None if it must not be started again."""
        try:
            await self._run_process(await self._prepared())
        except Crashed as crash:
            return self._with_tail(str(crash))
        except CannotStart as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("engine %s: unexpected error", self.spec.id)
            self._fail(f"unexpected error: {error!r}")
        return None

    async def _prepared(self) -> Launch:
        self._step("preparing", None)
        try:
            return await self._prepare(self.spec, self._step)
        except Exception as error:
            raise CannotStart(str(error) or repr(error)) from error

    async def _run_process(self, launch: Launch) -> None:
        """Spawn the process and see it to its end; nothing of it is left afterwards.

        An engine that failed is ended at once; what it still had in flight is lost already.
        """
        process = await self._spawn(self.spec, launch)
        grace = self._pace.grace
        try:
            await self._serve(process, launch)
        except (Crashed, CannotStart) as failure:
            grace = 0.0
            self._fail(str(failure))
            raise
        finally:
            await _to_its_end(process.stop(grace))
            self._set(pid=None)

    async def _serve(self, process: Process, launch: Launch) -> None:
        """Wait until the engine is ready, then watch it. Raises Crashed or CannotStart."""
        pid = await process.started()
        if pid is None:
            raise CannotStart(self._with_tail("its program could not be run"))
        self._set(pid=pid, address=launch.address)
        async with contextlib.aclosing(Probe(launch.address, self.spec.model)) as probe:
            context, version = await _while_alive(process, self._ready(probe))
            process.watch_members()
            self._probe = probe
            try:
                self._move("ready", context_length=context, version=version)
                await _while_alive(process, self._watch(process, probe))
            finally:
                self._probe = None

    async def _ready(self, probe: Probe) -> tuple[int | None, str | None]:
        """Wait until the engine is ready; return its context length and version."""
        limit = self.spec.settings.start_timeout
        began = time.monotonic()
        while (card := await probe.card()) is None:
            elapsed = time.monotonic() - began
            if elapsed > limit:
                raise CannotStart(self._with_tail(f"not ready within {limit:g} s (start_timeout)"))
            step = loading_step(tail_of_run(self.log_path, _LOADING_LINES, _LOADING_BYTES))
            self._step(f"{step.detail} ({elapsed:.0f} s)", step.progress)
            await asyncio.sleep(min(self._pace.loading, limit))
        return card.max_model_len, await probe.version()

    async def _watch(self, process: Process, probe: Probe) -> None:
        """Look at a ready engine for as long as it is well; raise Crashed when it is not."""
        limit = self.spec.settings.hang_timeout
        clock = asyncio.get_running_loop().time
        watch, canary, hurry_until = HangWatch(), _Canary(probe, limit), 0.0
        try:
            while not watch.hung(limit):
                hurry_until = await self._until_next_look(process, hurry_until)
                seen = await probe.look()
                if seen.dead:
                    raise Crashed("one of its processes died: its /health says that it cannot go on")
                idle = seen.answered and not seen.in_flight
                busy = canary.sing(clock(), seen.iterations) if idle else seen.in_flight
                watch = watch.step(Sample(clock(), seen.answered, busy, seen.iterations))
        finally:
            canary.stop()
        what = "it does not answer" if watch.silent >= limit else "requests are in flight, none moves"
        raise Crashed(f"hung: {what} for {limit:g} s (hang_timeout)")

    async def _until_next_look(self, process: Process, hurry_until: float) -> float:
        """Sleep; return until when looks are hurried: a while after one of the engine's processes ended."""
        clock = asyncio.get_running_loop().time
        if clock() < hurry_until:
            await asyncio.sleep(self._pace.hurry)
            return hurry_until
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.member_lost.wait(), self._pace.watching)
            process.member_lost.clear()
            return clock() + self._pace.hurry_for
        return hurry_until

    # --- what is reported ---

    def _move(self, state: State, **changes: Any) -> None:
        fresh = {"detail": "", "progress": None, "retry_at": None, "since": time.time()}
        self._set(**{**fresh, **changes}, state=move(self.state, state))

    def _fail(self, detail: str) -> None:
        """Say that the engine failed; one that is being unloaded stays `draining` until it is stopped."""
        if self.state == "failed":
            self._set(detail=detail)
        elif self.state != "draining":
            self._move("failed", detail=detail, address=None, context_length=None, version=None)

    def _step(self, detail: str, progress: float | None) -> None:
        if self.state == "starting":
            self._set(detail=detail, progress=progress)

    def _set(self, **changes: Any) -> None:
        status = msgspec.structs.replace(self._status, **changes)
        if status != self._status:
            if status.state != self.state:
                log.info("engine %s: %s -> %s %s", self.spec.id, self.state, status.state, status.detail)
            self._status = status
            self._changed()

    def _with_tail(self, reason: str) -> str:
        lines = tail_of_run(self.log_path, _TAIL_LINES)
        return "\n".join((f"{reason}; the end of its log:", *lines)) if lines else reason


class _Canary:
    """Has an idle engine generate one token now and then, and tells while that is in flight.

    The gauges of vLLM come from its core: requests that a hung core never took do not show in them. So an
    engine that made no iteration for half of hang_timeout is given something that would make it move.
    """

    def __init__(self, probe: Probe, limit: float) -> None:
        # Mutable: the request in flight, when the engine last moved or was last asked, and its counter then.
        self._probe, self._limit = probe, limit
        self._song: asyncio.Task[bool] | None = None
        self._since: float | None = None
        self._iterations: float | None = None

    def __repr__(self) -> str:
        return f"_Canary(singing={self._song is not None and not self._song.done()})"

    def sing(self, now: float, iterations: float) -> int:
        """Return the number of requests that it has in flight: 0 or 1."""
        if self._song is not None and not self._song.done():
            return 1
        if self._song is not None and not self._song.result():
            return 0  # an engine that does not complete text is not asked again
        if self._since is None or iterations != self._iterations:
            self._since, self._iterations = now, iterations
        if now - self._since < self._limit / 2:
            return 0
        self._since = now
        self._song = asyncio.create_task(self._probe.generate(2 * self._limit))
        return 1

    def stop(self) -> None:
        if self._song is not None:
            self._song.cancel()


async def _while_alive(process: Process, doing: Coroutine[None, None, T]) -> T:
    """Return what `doing` returns; raise Crashed as soon as the process ends."""
    task, ended = asyncio.ensure_future(doing), asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait((task, ended), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise Crashed(describe_exit(ended.result()))
        return task.result()
    finally:
        task.cancel()
        ended.cancel()
        await asyncio.gather(task, ended, return_exceptions=True)


async def _to_its_end(doing: Coroutine[None, None, None]) -> None:
    """Await something to its end even when cancelled meanwhile; the cancellation takes effect after it."""
    task = asyncio.ensure_future(doing)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _settle(accepted: asyncio.Future[None], refusal: Exception | None = None) -> None:
    if accepted.done():
        return
    if refusal is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(refusal)
