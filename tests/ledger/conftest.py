import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.ledger.store import Store
from tests.ledger.postgres import Postgres, postgres


@pytest.fixture(scope="session")
def cluster() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


class SqliteFile:
    """A file of SQLite that can be made to take nothing, as PostgreSQL does when it is stopped."""

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite:///{path}"
        self._path = path
        self._locked: sqlite3.Connection | None = None

    def stop(self) -> None:
        self._locked = sqlite3.connect(self._path, isolation_level=None)
        self._locked.execute("PRAGMA journal_mode=WAL")
        self._locked.execute("BEGIN IMMEDIATE")

    def start(self) -> None:
        assert self._locked
        self._locked.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> SqliteFile | Postgres:
    """Each kind of database, empty, with `url`, `stop()` and `start()`."""
    if request.param == "sqlite":
        return SqliteFile(tmp_path / "ledger.sqlite")
    cluster: Postgres = request.getfixturevalue("cluster")
    cluster.clear()
    return cluster


@pytest.fixture
def open_store(database: SqliteFile | Postgres) -> Callable[[], Store]:
    return lambda: Store(database.url, patience=0.3 if isinstance(database, SqliteFile) else 10.0)
