"""The ledger as a worker sees it: rows go in, and reports come out."""

import asyncio
import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.config import LedgerSettings
from proxy.cost import Price
from proxy.errors import LedgerUnavailable
from proxy.ledger import usage
from proxy.ledger.journal import Writer
from proxy.ledger.recorder import Recorder
from proxy.ledger.usage import Query, Report

if TYPE_CHECKING:
    from proxy.ledger.store import Store

_PATIENCE = 20.0  # seconds for a report


class Place:
    """Where a server keeps its ledger: a folder for the journal, and the address of the database."""

    def __init__(self, settings: LedgerSettings, folder: Path) -> None:
        self.journal = folder / "journal"
        self.limit = settings.journal_bytes
        self._folder = folder
        self._url = settings.url.reveal() if settings.url else f"sqlite:///{folder / 'ledger.sqlite'}"

    def __repr__(self) -> str:
        return f"<Place {self._folder}>"

    def open(self) -> "Store":
        """Return the database. Takes a third of a second at first."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        store = importlib.import_module("proxy.ledger.store")
        return store.Store(self._url)  # type: ignore[no-any-return]


class Books:
    """One worker's way to the ledger."""

    def __init__(self, place: Place, prices: Callable[[], list[Price]]) -> None:
        self._place = place
        self._prices = prices
        self.recorder = Recorder(Writer(place.journal, place.limit))
        # All mutable state: the database, once somebody has asked for a report.
        self._store: Store | None = None

    def __repr__(self) -> str:
        return f"<Books {self._place!r} {self.recorder!r}>"

    async def report(self, query: Query) -> Report:
        """Answer a query. Raises LedgerUnavailable while the database does not."""
        try:
            async with asyncio.timeout(_PATIENCE):
                if self._store is None:
                    self._store = await asyncio.to_thread(self._place.open)
                return usage.report(query, await self._store.sums(query), self._prices())
        except Exception as e:  # whatever a driver raises; its words may have addresses
            raise LedgerUnavailable from e

    async def close(self) -> None:
        """Give the connections back."""
        if self._store:
            with contextlib.suppress(Exception):
                await self._store.close()
