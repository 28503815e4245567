"""The proxy workers: processes that share one listening socket. One that ends is replaced."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time

import msgspec

from engines.paths import StatePaths
from proxy import config
from proxy.cache.bulletin import Bulletin
from proxy.commands.console import Console
from proxy.config import Config
from proxy.errors import NotFollowed, ServeError
from proxy.metrics import conditions, note_reload
from proxy.orders import Followed, Orders
from proxy.shared import Slots, shared_memory, slots_of

log = logging.getLogger(__name__)

_QUICK_DEATH = 5.0  # seconds; a worker that ends sooner has not really started
_QUICK_DEATHS = 5
_PATIENCE = 30.0  # seconds for a worker to follow a new configuration


class _Worker:
    """One worker process, and the line to it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        line: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        first: Orders,
    ) -> None:
        """first: its orders, which are sent."""
        self.process = process
        self.number = first.worker
        self._reader, self._writer = line
        # All mutable state: the generation that it follows, whether it is gone, and the event that this has changed.
        self._followed = first.generation
        self._gone = False
        self._changed = asyncio.Event()
        self.send(first)

    def __repr__(self) -> str:
        return f"<_Worker {self.process.pid} follows generation {self._followed}>"

    def send(self, orders: Orders) -> None:
        """Give the worker orders; it follows them when it gets to them."""
        self._writer.write(orders.frame())

    async def run(self) -> int:
        """Hear from the worker until it ends; return its exit status."""
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self._hear(await Followed.read(self._reader))
            return await self.process.wait()
        finally:
            self._gone = True
            self._changed.set()
            self._writer.close()

    def _hear(self, said: Followed) -> None:
        if said.failed:
            log.error("worker %s cannot follow a new configuration: it ends, and another starts", self.process.pid)
            self.signal(signal.SIGTERM)
            return
        self._followed = said.generation
        self._changed.set()

    async def follows(self, generation: int, patience: float = _PATIENCE) -> bool:
        """Wait until the worker follows a generation or has ended, for so many seconds; say whether it does or has."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not self._gone and self._followed < generation:
                    self._changed.clear()
                    await self._changed.wait()
        return self._gone or self._followed >= generation

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def end(self) -> None:
        """See that the process is gone."""
        self.signal(signal.SIGKILL)
        await self.process.wait()


class Workers:
    """All workers of a server, which follow one configuration."""

    def __init__(self, settings: Config, listening: socket.socket, paths: StatePaths, console: Console) -> None:
        self._fd = listening.fileno()
        # What workers have counted outlives them here.
        self._metrics_fd = shared_memory()
        self._board_fd = shared_memory("board")
        self._cache_fd = shared_memory("cache")
        self.bulletin = Bulletin(settings.server.workers, None, self._cache_fd)
        self._control_socket = str(paths.control_socket)
        self._folders = str(paths.ledger), str(paths.capabilities)
        self._count = settings.server.workers
        self.console = console
        # All mutable state: the processes that run now, and whether they are meant to; what they follow.
        self._running: set[_Worker] = set()
        self._stopping = False
        self._generation = 0
        self._slots = Slots((), ())
        self._settings = b""
        self._take(settings)

    def __repr__(self) -> str:
        return f"<Workers {sorted(w.process.pid for w in self._running)} of {self._count}>"

    def endpoints(self) -> bytes:
        """Return how the endpoints are, as all workers together see them: figures.Condition for each, as JSON."""
        return msgspec.json.encode(conditions(self._slots, self._count, self._metrics_fd))

    async def follow(self, settings: Config) -> None:
        """Have all workers follow another configuration. Raises NotFollowed where one does not; it is replaced."""
        self._take(settings)
        generation = self._generation
        running = tuple(self._running)
        for worker in running:
            worker.send(self._orders(worker.number))
        done = await asyncio.gather(*(worker.follows(generation) for worker in running))
        if late := [worker for worker, follows in zip(running, done, strict=True) if not follows]:
            for worker in late:
                worker.signal(signal.SIGTERM)
            pids = ", ".join(str(worker.process.pid) for worker in late)
            raise NotFollowed(f"worker {pids} does not follow configuration {generation} in time; it is replaced")

    def refused(self) -> None:
        """Note that a new configuration was none."""
        note_reload(self._metrics_fd, self._generation, None)

    def _take(self, settings: Config) -> None:
        self._generation += 1
        self._slots = slots_of(settings, self._slots.given)
        self._settings = config.encode(settings)
        note_reload(self._metrics_fd, self._generation, time.time())

    async def run(self) -> None:
        """Keep all workers running until `stop`. Raises ServeError if they do not stay up."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._count):
                    group.create_task(self._keep_one(number))
        except* ServeError as failures:
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
            self.console.say(f"a worker ended (exit status {status}); starting another", style="yellow")

    async def _run_one(self, number: int) -> int:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "proxy.worker", stdin=theirs.fileno(), pass_fds=self._descriptors(),
                start_new_session=True,  # Ctrl-C is for us, who end it when its requests are answered
            )  # fmt: skip
        line = await asyncio.open_unix_connection(sock=ours)
        worker = _Worker(process, line, self._orders(number))
        self._running.add(worker)
        try:
            return await worker.run()
        finally:
            self._running.discard(worker)
            await worker.end()

    def _descriptors(self) -> tuple[int, int, int, int]:
        return self._fd, self._metrics_fd, self._board_fd, self._cache_fd

    def _orders(self, number: int) -> Orders:
        fixed = self._control_socket, *self._descriptors(), number, *self._folders
        return Orders(self._settings, self._generation, self._slots.given, *fixed)

    async def stop(self, grace: float) -> None:
        """Let requests in flight finish for `grace` seconds at most, then end the workers."""
        self._stopping = True
        running = set(self._running)
        for worker in running:
            worker.signal(signal.SIGTERM)
        if running:
            await asyncio.wait([asyncio.ensure_future(w.process.wait()) for w in running], timeout=grace)
        for worker in running:
            worker.signal(signal.SIGKILL)
