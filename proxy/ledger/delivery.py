"""Brings rows from the journals of all workers into the database. One runs for each server, in the parent process."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from proxy.ledger import Row, journal

_INTERVAL = 1.0  # seconds between two looks into the journal
_LONGEST_WAIT = 30.0  # seconds until a database that is away is asked again
_BATCH = 500  # rows in one transaction
_LAST_CHANCE = 3.0  # seconds for what is left when the server ends

_log = logging.getLogger("polyvox.ledger")


class Database(Protocol):
    """Where rows go. Adding one that is there already changes nothing."""

    async def add(self, rows: Sequence[Row]) -> None: ...

    async def close(self) -> None: ...


class Delivery:
    """Reads what is new in the segments, and removes those that are finished."""

    def __init__(self, folder: Path, open_database: Callable[[], Database], redact: Callable[[str], str] = str) -> None:
        """open_database: called when there is something to bring, since that may be slow."""
        self._folder = folder
        self._open = open_database
        self._redact = redact
        # All mutable state: the database once it is open, how far each segment is in it, and the seconds until it is
        # asked again, which are more than the usual ones while it is away.
        self._database: Database | None = None
        self._brought: dict[Path, int] = {}
        self._wait = _INTERVAL

    def __repr__(self) -> str:
        return f"<Delivery from {self._folder}, {len(self._brought)} segments, looks again in {self._wait} s>"

    async def run(self) -> None:
        """Bring rows for ever; when cancelled, what is there once more."""
        try:
            while True:
                await self.attempt()
                await asyncio.sleep(self._wait)
        finally:
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(_LAST_CHANCE):
                    await self.attempt()
                    await self.close()

    async def close(self) -> None:
        """Give the database back."""
        if self._database:
            await self._database.close()

    async def attempt(self) -> bool:
        """Bring what is there; say whether the database took it. It not doing so is told once."""
        try:
            await self.deliver()
        except Exception as e:  # whatever a driver raises; the rows stay where they are
            if self._wait == _INTERVAL:
                what = self._redact(f"{type(e).__name__}: {e}").splitlines()[0][:200]
                _log.warning("the ledger's database takes no rows, they wait in %s: %s", self._folder, what)
            self._wait = min(self._wait * 2, _LONGEST_WAIT)
            return False
        if self._wait != _INTERVAL:
            _log.warning("the ledger's database takes rows again")
        self._wait = _INTERVAL
        return True

    async def deliver(self) -> None:
        """Bring all rows that are there, oldest segment first. Raises what the database does."""
        for path in journal.segments(self._folder):
            complete = journal.is_complete(path)
            await self._bring(path)
            if complete:
                path.unlink(missing_ok=True)
                self._brought.pop(path, None)

    async def _bring(self, path: Path) -> None:
        while True:
            start = self._brought.get(path, 0)
            rows, end = journal.read(path, start)
            if end == start:
                return
            for first in range(0, len(rows), _BATCH):
                await self._to_database(rows[first : first + _BATCH])
            self._brought[path] = end

    async def _to_database(self, rows: Sequence[Row]) -> None:
        if self._database is None:
            self._database = await asyncio.to_thread(self._open)
        await self._database.add(rows)
