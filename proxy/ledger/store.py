"""The ledger's database: SQLite or PostgreSQL, through SQLAlchemy. Slow to import."""

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from proxy.ledger import Row
from proxy.ledger.usage import GROUPS, Query, Sums

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}

_metadata = sa.MetaData()
_TABLE = sa.Table(
    "polyvox_requests",
    _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("time", sa.Double, nullable=False, index=True),
    sa.Column("day", sa.String(10), nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("alias", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("key_id", sa.String(64), nullable=False),
    sa.Column("operation", sa.String(32), nullable=False),
    sa.Column("tokens_in", sa.BigInteger, nullable=False),
    sa.Column("tokens_out", sa.BigInteger, nullable=False),
    sa.Column("tokens_cached", sa.BigInteger, nullable=False),
    sa.Column("usd", sa.Double),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("error", sa.String(64)),
    sa.Column("finish_reason", sa.String(32), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("cache", sa.String(16), nullable=False, server_default=""),
    sa.Column("saved", sa.Double),
    sa.Index("polyvox_requests_by_key", "key_id", "time"),
)


class Store:
    """A database of rows. Every method raises what SQLAlchemy and the drivers do where the database does not answer."""

    def __init__(self, url: str, patience: float = 10.0) -> None:
        """url: sqlite:////absolute/path, or postgresql://user:password@host:port/name?sslmode=require.

        patience: seconds for the database to answer.
        """
        self._engine = _engine(sa.make_url(url), patience)
        # All mutable state: whether the table is known to be there. (The engine has its pool.)
        self._made = False

    def __repr__(self) -> str:
        return f"<Store {self._engine.url.render_as_string(hide_password=True)}>"

    async def add(self, rows: Sequence[Row]) -> None:
        """Add rows, all or none. Those whose id is there already are left as they are."""
        await self._make()
        async with self._engine.begin() as connection:
            await connection.execute(self._insert(), [msgspec.structs.asdict(row) for row in rows])

    async def sums(self, query: Query) -> list[Sums]:
        """Add up what a query asks for, one Sums for each group, in the order of their names."""
        await self._make()
        async with self._engine.connect() as connection:
            found = await connection.execute(_select(query))
            return [Sums(*_plain(row)) for row in found]

    async def close(self) -> None:
        """Give the connections back."""
        await self._engine.dispose()

    async def _make(self) -> None:
        """Make the table where there is none, and what it lacks. Two who do so at once: one fails, and comes again."""
        if not self._made:
            async with self._engine.begin() as connection:
                await connection.run_sync(_prepare_table)
            self._made = True

    def _insert(self) -> Any:
        dialect = sqlite if self._engine.dialect.name == "sqlite" else postgresql
        return dialect.insert(_TABLE).on_conflict_do_nothing(index_elements=["id"])


def _engine(url: sa.URL, patience: float) -> AsyncEngine:
    name = url.get_backend_name()
    url = url.set(drivername=_DRIVERS[name])
    if name == "sqlite":
        engine = create_async_engine(url, connect_args={"timeout": patience})
        sa.event.listen(engine.sync_engine, "connect", _prepare)
        return engine
    timeouts: dict[str, Any] = {"timeout": patience, "command_timeout": patience}
    if mode := url.query.get("sslmode"):  # as libpq calls it; asyncpg does not
        timeouts["ssl"] = mode
    url = url.difference_update_query(["sslmode"])
    return create_async_engine(url, connect_args=timeouts, pool_pre_ping=True, pool_size=1, pool_timeout=patience)


def _prepare_table(connection: sa.Connection) -> None:
    """Make the table, or add the columns that one of an earlier version has not."""
    _metadata.create_all(connection)
    there = {column["name"] for column in sa.inspect(connection).get_columns(_TABLE.name)}
    for column in _TABLE.columns:
        if column.name not in there:
            described = sa.schema.CreateColumn(column).compile(connection)
            connection.execute(sa.text(f"ALTER TABLE {_TABLE.name} ADD COLUMN {described}"))


def _prepare(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # so that those who read do not wait for those who write
    cursor.execute("PRAGMA synchronous=FULL")  # rows leave the journal when they are here
    cursor.close()


def _select(query: Query) -> sa.Select[Any]:
    t = _TABLE.c
    priced = t.usd.is_not(None)
    group = t[GROUPS[query.group_by]]
    columns = (
        group,
        sa.func.count(),
        sa.func.sum(t.tokens_in),
        sa.func.sum(t.tokens_out),
        sa.func.sum(t.tokens_cached),
        sa.func.sum(t.usd),
        sa.func.sum(sa.case((priced, 0), else_=1)),
        sa.func.sum(t.seconds),
        sa.func.sum(sa.case((t.error.is_(None), 1), else_=0)),
        *(sa.func.sum(sa.case((priced, column), else_=0)) for column in (t.tokens_in, t.tokens_out, t.tokens_cached)),
        sa.func.sum(sa.case((t.cache.in_(("hit", "joined")), 1), else_=0)),
        sa.func.sum(t.saved),
    )
    select = sa.select(*columns).group_by(group).order_by(group)
    if query.since is not None:
        select = select.where(t.time >= query.since)
    if query.until is not None:
        select = select.where(t.time < query.until)
    if query.key_id is not None:
        select = select.where(t.key_id == query.key_id)
    return select


def _plain(row: Sequence[Any]) -> list[Any]:
    """Return whole numbers as int: PostgreSQL adds them up to Decimals."""
    group, *figures = row
    return [group, *(f if f is None or isinstance(f, float) else int(f) for f in figures)]
