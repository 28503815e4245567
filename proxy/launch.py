"""`polyvox serve`: the parent process. It owns the listening socket, the engines and the workers."""

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engines.paths import StatePaths
from proxy import config, providers
from proxy.cache import needs
from proxy.cache.bulletin import Bulletin
from proxy.cache.supervision import Supervision
from proxy.config import Config, Loaded, Server
from proxy.console import Console
from proxy.errors import ServeError
from proxy.ledger.books import Place
from proxy.ledger.delivery import Delivery
from proxy.metrics import conditions, shared_memory
from proxy.orders import Orders

_QUICK_DEATH = 5.0  # seconds; a worker that ends sooner has not really started
_QUICK_DEATHS = 5
_WORKER_MARGIN = 3.0  # seconds that a worker gets beyond its own grace before it is killed


def main(file: Path, environ: Mapping[str, str], paths: StatePaths) -> None:
    """Serve a configuration. Raises ConfigError or ServeError."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    loaded = config.load(file, environ)
    providers.check(loaded)
    needs.check(loaded)
    listening = _bind(loaded.config.server)
    try:
        paths.create()
    except OSError as e:
        raise ServeError(f"cannot write state to {e.filename}: {e.strerror}; give another --state-dir") from None
    asyncio.run(_serve(loaded, paths, Console(), listening))


async def _serve(loaded: Loaded, paths: StatePaths, console: Console, listening: socket.socket) -> None:
    """Run workers and engines until SIGTERM or SIGINT; a second one ends everything at once."""
    stop, hurry = _stop_signals()
    workers = Workers(loaded.config, listening, paths, console)
    async with _background(_deliver(loaded, paths), stop), _background(workers.run(), stop):
        # The workers listen while the parent is still importing what the engines need.
        from engines.control import serve_control
        from engines.launcher import Launcher
        from engines.supervisor import Supervisor

        launcher = Launcher(paths, loaded.base)
        supervisor = Supervisor(loaded.config.engines(), paths, launcher.prepare)
        address = address_of(listening)
        reports = {"endpoints": workers.endpoints, "address": lambda: msgspec.json.encode(address)}
        caches = Supervision(lambda: loaded.config, workers.bulletin)
        reports["cache"] = caches.report
        async with (
            _engines(supervisor, launcher, loaded),
            _background(serve_control(supervisor, paths.control_socket, reports, {"purge-cache": caches.purge}), stop),
        ):
            following = console.follow(supervisor.watch(), address, loaded.config)
            async with _background(following, stop):
                await stop.wait()
                console.say("stopping; requests in flight may finish, press Ctrl-C again to end at once")
                async with _background(hurry.wait(), stop) as hurried:
                    drained = asyncio.ensure_future(_drain(listening, workers, loaded.config))
                    await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
                    await _cancelled(drained)


async def _deliver(loaded: Loaded, paths: StatePaths) -> None:
    """Bring what the workers note of requests into the ledger's database, for as long as the server runs."""
    if settings := loaded.config.ledger_settings():
        place = Place(settings, paths.ledger)
        await Delivery(place.journal, place.open, loaded.redact).run()


@contextlib.asynccontextmanager
async def _engines(supervisor: Any, launcher: Any, loaded: Loaded) -> AsyncIterator[None]:
    """Load the engines, after whatever an earlier run left is gone and the memory for all of them is found."""
    from engines.memory import PlanRefused
    from engines.supervisor import AlreadyRunning
    from engines.weights import WeightsSourceError

    try:
        await supervisor.claim()
        await asyncio.to_thread(launcher.plan, [s for s in loaded.config.engines() if s.settings.autostart])
        await supervisor.start()
    except (AlreadyRunning, WeightsSourceError) as e:
        raise ServeError(loaded.redact(str(e))) from None
    except PlanRefused as e:
        raise ServeError(f"the engines do not fit on this machine:\n{loaded.redact(str(e))}") from None
    try:
        yield
    finally:
        await supervisor.close(0)


async def _drain(listening: socket.socket, workers: "Workers", settings: Config) -> None:
    """Refuse new connections, let the requests in flight finish."""
    listening.close()
    await workers.stop(settings.server.drain_timeout + _WORKER_MARGIN)


def _stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return two events: set by the first SIGTERM or SIGINT, and by the second."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, hurry


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


class Workers:
    """The proxy workers: processes that share one listening socket. One that ends is replaced."""

    def __init__(self, settings: Config, listening: socket.socket, paths: StatePaths, console: Console) -> None:
        self._fd = listening.fileno()
        # What workers have counted outlives them here.
        self._metrics_fd = shared_memory()
        self._board_fd = shared_memory("board")
        self._cache_fd = shared_memory("cache")
        self.bulletin = Bulletin(settings.server.workers, None, self._cache_fd)
        self._config = settings
        self._settings = config.encode(settings)
        self._control_socket = str(paths.control_socket)
        self._folders = (str(paths.ledger), str(paths.capabilities))
        self._count = settings.server.workers
        self._console = console
        # All mutable state: the processes that run now, and whether they are meant to.
        self._processes: set[asyncio.subprocess.Process] = set()
        self._stopping = False

    def __repr__(self) -> str:
        return f"<Workers {sorted(p.pid for p in self._processes)} of {self._count}>"

    def endpoints(self) -> bytes:
        """Return how the endpoints are, as all workers together see them: figures.Condition for each, as JSON."""
        return msgspec.json.encode(conditions(self._config, self._metrics_fd))

    async def run(self) -> None:
        """Keep all workers running until `stop`. Raises ServeError if they do not stay up."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._count):
                    group.create_task(self._keep_one(number))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _keep_one(self, number: int) -> None:
        loop, deaths = asyncio.get_running_loop(), 0
        while not self._stopping:
            started = loop.time()
            status = await self._run_one(number)
            if self._stopping:
                return
            deaths = deaths + 1 if loop.time() - started < _QUICK_DEATH else 0
            if deaths >= _QUICK_DEATHS:
                raise ServeError(f"workers end as soon as they start (exit status {status}); see above")
            self._console.say(f"a worker ended (exit status {status}); starting another", style="yellow")

    async def _run_one(self, number: int) -> int:
        shared = (self._fd, self._metrics_fd, self._board_fd, self._cache_fd)
        orders = Orders(self._settings, self._control_socket, *shared, number, *self._folders)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy.worker", stdin=subprocess.PIPE, pass_fds=shared
        )
        self._processes.add(process)
        try:
            assert process.stdin
            process.stdin.write(orders.frame())
            return await process.wait()
        finally:
            self._processes.discard(process)
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def stop(self, grace: float) -> None:
        """Let requests in flight finish for `grace` seconds at most, then end the workers."""
        self._stopping = True
        processes = set(self._processes)
        for process in processes:
            _signal(process, signal.SIGTERM)
        if processes:
            await asyncio.wait([asyncio.ensure_future(p.wait()) for p in processes], timeout=grace)
        for process in processes:
            _signal(process, signal.SIGKILL)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
