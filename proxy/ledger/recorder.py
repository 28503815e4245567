"""Takes the end of each request for the ledger. Nothing waits for it: a list is appended to, and emptied behind."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable

from proxy.ledger import Row, row
from proxy.ledger.journal import Writer
from proxy.telemetry import UNKNOWN, RequestFinished, Sink

INTERVAL = 0.5  # seconds between two writings; with the writing itself, less than a second of rows is in memory only
_MOST = 50_000  # rows in memory where the disk takes none
_DAY = 86400

_Over = tuple[float, RequestFinished]

_log = logging.getLogger("polyvox.ledger")


class Recorder:
    """The rows of one worker on their way to its journal. It is a Sink's `finished`, and no more."""

    def __init__(self, journal: Writer, clock: Callable[[], float] = time.time) -> None:
        self._journal = journal
        self._clock = clock
        self._prefix = secrets.token_hex(8)
        # All mutable state: the requests that are over; the rows made of them that are not on disk yet, which belong to
        # whoever has the lock; the number of the next; how many were given up; the last day with its name.
        self._over: list[_Over] = []
        self._rows: list[Row] = []
        self._writing = threading.Lock()
        self._next = 0
        self.lost = 0
        self._day = (-1, "")

    def __repr__(self) -> str:
        return f"<Recorder {len(self._over) + len(self._rows)} rows, {self.lost} lost>"

    def finished(self, event: RequestFinished) -> None:
        """Take a request that named one of our models; what named none is no traffic of theirs."""
        if event.model is not UNKNOWN:
            self._over.append((self._clock(), event))

    async def run(self) -> None:
        """Write for ever, and once more when cancelled."""
        try:
            while True:
                await asyncio.sleep(INTERVAL)
                if self._over or self._rows:
                    await asyncio.to_thread(self._write, self._take())
        finally:
            self.flush()
            self._journal.close()

    def flush(self) -> None:
        """Write all to disk now. Rows that cannot be written stay, as many as there is room for."""
        self._write(self._take())

    def _take(self) -> list[_Over]:
        over, self._over = self._over, []  # on the thread that appends, or one could be lost
        return over

    def _write(self, over: list[_Over]) -> None:
        with self._writing:
            self._rows += [self._row(ended, event) for ended, event in over]
            try:
                if self._rows:
                    self._journal.append(self._rows)
                self._rows = []
            except OSError as e:
                self._give_up(e)

    def _row(self, ended: float, event: RequestFinished) -> Row:
        self._next += 1
        day = int(ended // _DAY)
        if day != self._day[0]:
            self._day = (day, time.strftime("%Y-%m-%d", time.gmtime(ended)))
        return row(f"{self._prefix}-{self._next:x}", ended, self._day[1], event)

    def _give_up(self, error: OSError) -> None:
        over = len(self._rows) - _MOST
        if over > 0:
            del self._rows[:over]
            self.lost += over
            _log.error("the ledger's journal takes no rows (%s): %d are lost", error.strerror or error, self.lost)


class Both:
    """A Sink of everything, and one more that takes only the ends of requests."""

    def __init__(self, every: Sink, ends: Recorder) -> None:
        self.started, self.queued, self.failed, self.changed = every.started, every.queued, every.failed, every.changed
        self._finished = every.finished
        self._record = ends.finished

    def __repr__(self) -> str:
        return f"<Both {self._record!r}>"

    def finished(self, event: RequestFinished) -> None:
        self._finished(event)
        self._record(event)
