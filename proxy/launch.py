"""`polyvox serve`: the parent process. It owns the listening socket, the engines and the workers."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engines.paths import StatePaths
from engines.spec import EngineSpec
from proxy import config, providers
from proxy.administration import services
from proxy.cache import needs
from proxy.cache.settings import CacheSettings
from proxy.cache.supervision import Supervision
from proxy.commands.console import Console
from proxy.config import Config, Loaded, Server
from proxy.errors import ServeError
from proxy.ledger.books import Place
from proxy.ledger.delivery import Delivery
from proxy.reloading import Reloader, Start
from proxy.workers import Workers

if TYPE_CHECKING:
    from proxy.cache.shield import Shield

_WORKER_MARGIN = 3.0  # seconds that a worker gets beyond its own grace before it is killed


def main(file: Path, environ: Mapping[str, str], paths: StatePaths) -> None:
    """Serve a configuration. Raises ConfigError or ServeError."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    text = config.read(file)
    loaded = config.parse(text, file, environ)
    providers.check(loaded)
    needs.check(loaded)
    listening = _bind(loaded.config.server)
    try:
        paths.create()
    except OSError as e:
        raise ServeError(f"cannot write state to {e.filename}: {e.strerror}; give another --state-dir") from None
    workers = Workers(loaded.config, listening, paths, Console())
    asyncio.run(_serve(Start(file, environ, text, loaded), paths, workers, listening))


async def _serve(start: Start, paths: StatePaths, workers: Workers, listening: socket.socket) -> None:
    """Run workers and engines until SIGTERM or SIGINT; a second one ends everything at once."""
    stop, hurry, reload = _signals()
    console, loaded = workers.console, start.loaded
    async with _background(_deliver(loaded, paths), stop), _background(workers.run(), stop):
        # The workers listen while the parent is still importing what the engines need.
        from engines.control import serve_control
        from engines.launcher import Launcher
        from engines.supervisor import Supervisor

        launcher = Launcher(paths, loaded.base)
        supervisor = Supervisor(loaded.config.engines(), paths, launcher.prepare)
        reloader = Reloader(start, Parts(workers, supervisor, launcher), console)
        address = address_of(listening)
        reports = {"endpoints": workers.endpoints, "address": lambda: msgspec.json.encode(address)}
        caches = Supervision(lambda: reloader.loaded.config, workers.bulletin, _store_elsewhere)
        offered = {**services(reloader), "purge-cache": caches.purge, "cache": caches.stats}
        async with (
            _engines(supervisor, launcher, loaded),
            _background(serve_control(supervisor, paths.control_socket, reports, offered), stop),
        ):
            following = console.follow(supervisor.watch(), address, loaded.config)
            async with _background(following, stop), _background(reloader.watch(reload), stop):
                await stop.wait()
                console.say("stopping; requests in flight may finish, press Ctrl-C again to end at once")
                async with _background(hurry.wait(), stop) as hurried:
                    drained = asyncio.ensure_future(_drain(listening, workers, reloader.loaded.config))
                    await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
                    await _cancelled(drained)


def _store_elsewhere(settings: CacheSettings) -> contextlib.AbstractAsyncContextManager["Shield | None"]:
    from proxy.caching import store_elsewhere  # most servers are never asked for it

    return store_elsewhere(settings)


async def _deliver(loaded: Loaded, paths: StatePaths) -> None:
    """Bring what the workers note of requests into the ledger's database, for as long as the server runs."""
    if settings := loaded.config.ledger_settings():
        place = Place(settings, paths.ledger)
        await Delivery(place.journal, place.open, loaded.redact).run()


@contextlib.asynccontextmanager
async def _engines(supervisor: Any, launcher: Any, loaded: Loaded) -> AsyncIterator[None]:
    """Load the engines, after whatever an earlier run left is gone and the memory for all of them is found."""
    from engines.supervisor import AlreadyRunning

    try:
        await supervisor.claim()
        await _plan(launcher, loaded.config.engines(), loaded)
        await supervisor.start()
    except AlreadyRunning as e:
        raise ServeError(loaded.redact(str(e))) from None
    try:
        yield
    finally:
        await supervisor.close(0)


async def _plan(launcher: Any, engines: Iterable[EngineSpec], loaded: Loaded) -> None:
    """Find the memory for all engines that start by themselves. Raises ServeError."""
    from engines.memory import PlanRefused
    from engines.weights import WeightsSourceError

    try:
        await asyncio.to_thread(launcher.plan, [spec for spec in engines if spec.settings.autostart])
    except WeightsSourceError as e:
        raise ServeError(loaded.redact(str(e))) from None
    except PlanRefused as e:
        raise ServeError(f"the engines do not fit on this machine:\n{loaded.redact(str(e))}") from None


class Parts:
    """The workers and the engines, which follow a configuration: see reloading.Followers."""

    def __init__(self, workers: Workers, supervisor: Any, launcher: Any) -> None:
        self._workers = workers
        self._supervisor = supervisor
        self._launcher = launcher

    def __repr__(self) -> str:
        return f"<Parts {self._workers!r} {self._supervisor!r}>"

    async def check(self, new: Loaded, old: Loaded) -> None:
        """See that there is memory for new engines, beside those that run. Raises ConfigError or ServeError.

        One that changes frees what it has before it starts anew, and is planned then.
        """
        there = {spec.id for spec in old.config.engines()}
        await asyncio.to_thread(needs.check, new)
        if added := [spec for spec in new.config.engines() if spec.id not in there]:
            await _plan(self._launcher, added, new)

    async def follow(self, new: Loaded, old: Loaded) -> None:
        """Have the workers go by a configuration, then the engines: who is to go gets no more. Raises NotFollowed."""
        there, specs = {spec.id: spec for spec in old.config.engines()}, new.config.engines()
        self._launcher.forget(spec.id for spec in specs if spec.id in there and not spec.same_process(there[spec.id]))
        try:
            await self._workers.follow(new.config)
        finally:
            await self._supervisor.follow(specs)

    def refused(self) -> None:
        self._workers.refused()


async def _drain(listening: socket.socket, workers: Workers, settings: Config) -> None:
    """Refuse new connections, let the requests in flight finish."""
    listening.close()
    await workers.stop(settings.server.drain_timeout + _WORKER_MARGIN)


def _signals() -> tuple[asyncio.Event, asyncio.Event, asyncio.Event]:
    """Return three events: set by the first SIGTERM or SIGINT, by the second, and by SIGHUP.

    That is also what comes when a terminal is closed, which ends a server that was started there.
    """
    stop, hurry, reload = asyncio.Event(), asyncio.Event(), asyncio.Event()
    had_terminal = sys.stdin.isatty()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)

    def on_hangup() -> None:
        if had_terminal and not sys.stdin.isatty():
            on_signal()
        else:
            reload.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)
    return stop, hurry, reload


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, Any], stop: asyncio.Event) -> AsyncIterator["asyncio.Task[Any]"]:
    """Run something beside the block. If it fails, the block is asked to stop, and fails with it."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda t: None if t.cancelled() or t.exception() is None else stop.set())
    try:
        yield task
    finally:
        await _cancelled(task)
    if not task.cancelled():
        task.result()


async def _cancelled(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    await asyncio.wait((task,))


def _bind(server: Server) -> socket.socket:
    """Return the listening socket. Raises ServeError where the address cannot be had."""
    host = server.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, server.port))
    except OSError as e:
        listening.close()
        where = f"{server.host}:{server.port}"
        raise ServeError(f"cannot listen on {where}: {e.strerror}; choose another --host or --port") from None
    listening.listen(2048)
    return listening


def address_of(listening: socket.socket) -> str:
    """Return the URL at which a client on this machine reaches a listening socket."""
    host, port = listening.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{reachable}:{port}"
