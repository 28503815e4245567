"""The ledger's database, SQLite and a real PostgreSQL alike: each row is there once, and adds up."""

import asyncio
import shutil

import pytest

from proxy.ledger import journal
from proxy.ledger.delivery import Delivery
from proxy.ledger.journal import Writer
from proxy.ledger.usage import Query
from tests.ledger.postgres import PASSWORD
from tests.ledger.rows import row

GENEROUS = 1024 * 1024 * 1024


def sums(open_store, query=Query()):  # noqa: B008 - frozen
    async def ask():
        store = open_store()
        try:
            return await store.sums(query)
        finally:
            await store.close()

    return asyncio.run(ask())


def counted(open_store) -> int:
    return sum(group.requests for group in sums(open_store))


def add(open_store, *rows):
    async def ask():
        store = open_store()
        await store.add(rows)
        await store.close()

    asyncio.run(ask())


def test_an_empty_ledger_has_no_groups(open_store):
    assert sums(open_store) == []


def test_a_row_that_comes_twice_is_there_once_as_it_came_first(open_store):
    add(open_store, row(1), row(2))
    add(open_store, row(2, tokens_in=99), row(3))
    (group,) = sums(open_store)
    assert (group.requests, group.tokens_in) == (3, 30)


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        ("model", {"large": 1, "small": 3}),
        ("key", {"0123456789abcdef": 3, "fedcba9876543210": 1}),
        ("alias", {"gpt": 3, "модель": 1}),
        ("day", {"2027-01-15": 3, "2027-01-16": 1}),
    ],
)
def test_rows_add_up_by(open_store, group_by, expected):
    add(
        open_store,
        row(1),
        row(2, model="large"),
        row(3, key_id="fedcba9876543210", alias="модель"),
        row(4, day="2027-01-16"),
    )
    assert {group.group: group.requests for group in sums(open_store, Query(group_by))} == expected


def test_what_has_no_known_cost_is_counted_apart(open_store):
    add(open_store, row(1), row(2, usd=None, tokens_in=1000, error="connect_failed"), row(3, usd=0.0))
    (group,) = sums(open_store)
    assert (group.usd, group.unpriced, group.good) == (0.5, 1, 2)
    assert (group.priced_in, group.priced_out, group.priced_cached) == (20, 40, 8)
    add(open_store, row(4, model="unknown", usd=None))
    assert sums(open_store)[1].usd is None


def test_a_query_is_for_a_time_and_a_key(open_store):
    add(open_store, *(row(number, key_id="mine" if number % 2 else "other") for number in range(10)))
    first = 1_800_000_000.0
    (group,) = sums(open_store, Query(since=first + 2, until=first + 8, key_id="mine"))
    assert group.requests == 3


def test_what_the_journal_has_is_brought_once_and_taken_out(tmp_path, open_store):
    writer = Writer(tmp_path / "journal", GENEROUS)
    copy = tmp_path / "copy"

    async def scenario():
        delivery = Delivery(tmp_path / "journal", open_store)
        writer.append([row(n) for n in range(1200)])
        assert await delivery.attempt()
        writer.append([row(n) for n in range(1200, 1300)])
        shutil.copytree(tmp_path / "journal", copy)
        assert await delivery.attempt()
        writer.close()
        assert await delivery.attempt()
        again = Delivery(copy, open_store)  # as after an end between bringing and taking out
        assert await again.attempt()
        await asyncio.gather(delivery.close(), again.close())

    asyncio.run(scenario())
    assert counted(open_store) == 1300
    assert journal.segments(tmp_path / "journal") == journal.segments(copy) == []


def test_while_the_database_is_down_rows_wait_and_then_all_are_there(tmp_path, database, open_store, caplog):
    add(open_store, row(0))
    writer = Writer(tmp_path / "journal", GENEROUS)

    async def scenario():
        delivery = Delivery(tmp_path / "journal", open_store)
        writer.append([row(1)])
        assert await delivery.attempt()
        database.stop()
        try:
            for number in (2, 3):
                writer.append([row(number)])
                assert not await delivery.attempt()
        finally:
            database.start()
        assert await delivery.attempt()
        await delivery.close()

    asyncio.run(scenario())
    writer.close()
    assert counted(open_store) == 4
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2, "that it is away is told once, and that it is back"
    assert not any("sentinel" in text or PASSWORD in text for text in told)


def test_two_servers_may_write_to_one_ledger(tmp_path, open_store):
    async def scenario():
        deliveries = []
        for name in ("one", "two"):
            writer = Writer(tmp_path / name, GENEROUS)
            writer.append([row(n, id=f"{name}-{n}") for n in range(200)])
            writer.close()
            deliveries.append(Delivery(tmp_path / name, open_store))
        async with asyncio.timeout(60):  # one may find the table half made or the file locked, and comes again
            while not all(await asyncio.gather(*(delivery.attempt() for delivery in deliveries))):
                pass
        await asyncio.gather(*(delivery.close() for delivery in deliveries))

    asyncio.run(scenario())
    assert counted(open_store) == 400


def test_what_the_cache_has_saved_adds_up(open_store):
    add(open_store, row(1), row(2, cache="hit", saved=0.5, usd=0.0), row(3, cache="joined", usd=0.0))
    add(open_store, row(4, cache="miss", model="large"))
    large, small = sums(open_store)
    assert (large.from_cache, large.saved) == (0, None)
    assert (small.from_cache, small.saved) == (2, 0.5)


def test_a_table_of_an_earlier_version_gets_the_columns_that_it_lacks(open_store):
    add(open_store, row(1))

    async def take_out():
        store = open_store()
        async with store._engine.begin() as connection:
            for column in ("cache", "saved"):
                await connection.exec_driver_sql(f"ALTER TABLE polyvox_requests DROP COLUMN {column}")
        await store.close()

    asyncio.run(take_out())
    add(open_store, row(2, cache="hit", saved=0.25))
    (group,) = sums(open_store)
    assert (group.requests, group.from_cache, group.saved) == (2, 1, 0.25)
