"""`polyvox usage`: what the ledger knows."""

import asyncio
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from engines.paths import StatePaths
from proxy import config, market
from proxy.commands import console
from proxy.errors import BadRequest, ConfigError, LedgerUnavailable, ServeError
from proxy.ledger import usage
from proxy.ledger.books import Books, Place
from proxy.ledger.usage import Line, Query, Report
from proxy.prices import Prices

_COLUMNS = (
    "REQUESTS", "OK", "AVERAGE", "IN", "CACHED", "OUT", "USD", "UNPRICED", "ON DEAREST", "SAVING", "FROM CACHE",
    "SAVED BY IT",
)  # fmt: skip


def main(file: Path, environ: Mapping[str, str], paths: StatePaths, asked: dict[str, str], *, as_json: bool) -> None:
    """Print a report. Raises ConfigError or ServeError."""
    loaded = config.load(file, environ)
    settings = loaded.config.ledger_settings()
    if settings is None:
        raise ServeError(f"{file} keeps no ledger (`ledger: off`)")
    try:
        query = usage.parse(asked, time.time())
    except BadRequest as e:
        raise ConfigError(str(e)) from None
    prices = Prices(loaded.config)
    prices.learn(market.tariffs(market.offers(loaded.config), datetime.now(UTC)))
    try:
        report = asyncio.run(_ask(Books(Place(settings, paths.ledger), prices.known), query))
    except LedgerUnavailable as e:
        raise ServeError(f"the ledger's database does not answer: {loaded.redact(_reason(e))}") from None
    _print(report, as_json=as_json)


async def _ask(books: Books, query: Query) -> Report:
    try:
        return await books.report(query)
    finally:
        await books.close()


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".splitlines()[0][:200]


def _print(report: Report, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        return
    lines = [*report.data, report.total]
    console.print_table((report.group_by.upper(), *_COLUMNS), [_cells(line) for line in lines])


def _cells(line: Line) -> tuple[object, ...]:
    return (
        line.group or "-",
        line.requests,
        f"{line.success_rate:.1%}",
        f"{line.average_seconds:.2f} s",
        line.tokens_in,
        line.tokens_cached,
        line.tokens_out,
        _dollars(line.usd),
        line.unpriced,
        _dollars(line.usd_on_dearest),
        _dollars(line.saving),
        line.from_cache,
        _dollars(line.usd_saved_by_cache),
    )


def _dollars(amount: float | None) -> str | None:
    return None if amount is None else f"{amount:.6f}"
