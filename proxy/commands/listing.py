"""`polyvox models`: what there is to be asked for, and what is known of it."""

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from engines.paths import StatePaths
from engines.spec import FleetStatus
from proxy import config, market, registry
from proxy.capabilities import Capabilities, Folder
from proxy.commands import console
from proxy.config import ModelSettings
from proxy.cost import Price
from proxy.prices import Prices
from proxy.registry import Model

_SHORT = {
    "json_mode": "json", "json_schema": "schema", "tools": "tools", "logprobs": "logprobs", "system_role": "system",
    "stream_usage": "usage", "continues": "continues",
}  # fmt: skip
_COLUMNS = ("MODEL", "KIND", "STATE", "CONTEXT", "TAKES", "CAN", "CANNOT", "FOLLOWS", "TOKENS/S", "USD/M IN", "OUT")


class Listed(msgspec.Struct, frozen=True):
    """A model. local: it runs here. price: USD per million tokens, None where it is not known.

    usd_per_hour: of an engine whose price follows from what its machine costs and how much it does.
    """

    model: str
    kind: str
    local: bool
    state: str
    context: int | None
    capabilities: Capabilities
    price: Price | None
    usd_per_hour: float | None = None
    aliases: tuple[str, ...] = ()


def main(
    file: Path, environ: Mapping[str, str], paths: StatePaths, fleet: FleetStatus | None, *, as_json: bool
) -> None:
    """Print all models. fleet: the engines, None where no server runs. Raises ConfigError."""
    loaded = config.load(file, environ)
    prices = Prices(loaded.config)
    prices.learn(market.tariffs(market.offers(loaded.config), datetime.now(UTC)))
    known = registry.build(loaded.config, fleet or FleetStatus(version=0), Folder(paths.capabilities).read())
    rows = [
        _listed(known, known.models[name], settings, prices, runs=fleet is not None)
        for name, settings in loaded.config.models.items()
    ]
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")
    else:
        console.print_table(_COLUMNS, [_cells(row) for row in rows])


def _listed(known: registry.Registry, model: Model, settings: ModelSettings, prices: Prices, *, runs: bool) -> Listed:
    local = settings.engine is not None
    return Listed(
        model=model.name,
        kind=model.traits.kind,
        local=local,
        state=model.state if runs or not local else "not running",
        context=model.traits.context or model.context_length or model.capabilities.context_length,
        capabilities=model.capabilities,
        price=None if settings.hosting else prices.dearest(model.name, 0),
        usd_per_hour=settings.hosting.usd_per_hour if settings.hosting else None,
        aliases=tuple(name for name, target in known.aliases.items() if target is model),
    )


def _cells(row: Listed) -> tuple[Any, ...]:
    can = row.capabilities
    follows = None if can.instruction_score is None else f"{can.instruction_score:.0%}"
    return (
        row.model, row.kind, row.state, row.context, _words(can.modalities or ()),
        _words(_those(can, True)), _words(_those(can, False)), follows, can.tokens_per_second,
        *_prices(row),
    )  # fmt: skip


def _prices(row: Listed) -> tuple[str | None, str | None]:
    if row.usd_per_hour is not None:
        return f"{row.usd_per_hour:g} an hour", None
    return (f"{row.price.input:g}", f"{row.price.output:g}") if row.price else (None, None)


def _those(can: Capabilities, value: bool) -> list[str]:
    return [word for name, word in _SHORT.items() if getattr(can, name) is value]


def _words(words: Any) -> str | None:
    return " ".join(words) or None
