"""The ledger: one row for each request, written behind, in a database that may be down.

Each worker notes its rows in a journal on disk, at least once a second. The parent process brings them from there into
the database, and takes them out of the journal when they are safe. A row has an id of its own, so that it may be
brought twice and is there once.
"""

import msgspec

from proxy.telemetry import RequestFinished


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request. time: of its end, in seconds since 1970; day: the same in UTC, as 2026-01-31.

    alias: the name it was asked under. key_id: of the key that asked, from which nobody learns the key; "" for none.
    usd: None where the price or the tokens are not known. error: why it failed, None if it did not. attempts: how often
    it was sent to an endpoint. cache: what the cache did, see telemetry.CACHE_RESULTS. saved: what its answer would
    have cost without it, in USD.
    """

    id: str
    time: float
    day: str
    request_id: str
    alias: str
    model: str
    endpoint: str
    key_id: str
    operation: str
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    usd: float | None
    seconds: float
    status: int
    error: str | None
    finish_reason: str
    attempts: int
    cache: str = ""
    saved: float | None = None


def row(name: str, ended: float, day: str, event: RequestFinished) -> Row:
    """Make the row of a request. name: its id."""
    return Row(
        name, ended, day, event.request_id.decode("latin-1"), event.alias, event.model, event.endpoint, event.key_id,
        event.operation, event.tokens_in, event.tokens_out, event.tokens_cached, event.usd, event.seconds,
        event.status, event.error, event.finish_reason, event.attempts, event.cache, event.saved,
    )  # fmt: skip
