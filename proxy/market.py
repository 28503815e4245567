"""What clouds ask for their models, from the package genai-prices. Its data is its own: nobody is asked.

The package takes 30 MB of memory and a fifth of a second, so that a worker has another process look (`python -m
proxy.market`), which reads the offers as JSON and writes the tariffs of those that are known.
"""

import asyncio
import contextlib
import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec

from proxy.config import Config
from proxy.cost import Price, Tariff

if TYPE_CHECKING:
    from genai_prices.types import ModelPrice


class Offer(msgspec.Struct, frozen=True):
    """An endpoint that somebody else runs: the name we have for it, and who serves what there."""

    endpoint: str
    provider: str
    base_url: str
    model: str


def offers(config: Config) -> list[Offer]:
    """Return the endpoints whose price the configuration leaves out."""
    return [
        Offer(f"{name}/{i}", endpoint.provider, endpoint.base_url, endpoint.model or name)
        for name, model in config.models.items()
        if model.price is None
        for i, endpoint in enumerate(model.endpoints)
    ]


def tariffs(offered: list[Offer], now: datetime) -> dict[str, Tariff]:
    """Return the tariff of each endpoint that the package knows, as of a moment."""
    found = {offer.endpoint: _tariff(offer, now) for offer in offered}
    return {endpoint: tariff for endpoint, tariff in found.items() if tariff is not None}


async def ask(offered: list[Offer]) -> dict[str, Tariff]:
    """Have another process look; nothing is known where that fails."""
    if not offered:
        return {}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy.market", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        written, _ = await process.communicate(msgspec.json.encode(offered))
    except asyncio.CancelledError:
        process.kill()
        raise
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(written, type=dict[str, Tariff])
    return {}


def _tariff(offer: Offer, now: datetime) -> Tariff | None:
    from genai_prices.data_snapshot import get_snapshot

    snapshot = get_snapshot()
    # By the address first: many clouds speak OpenAI's language, and few are OpenAI.
    for by in ({"provider_api_url": offer.base_url, "provider_id": None}, _by_provider(offer)):
        with contextlib.suppress(LookupError):
            _, model = snapshot.find_provider_model(offer.model, None, **by)
            return _of(model.get_prices(now))
    return None


def _by_provider(offer: Offer) -> dict[str, Any]:
    """Who speaks OpenAI's language may be anybody, and a server of one's own has no price that others would know."""
    return {"provider_id": "" if offer.provider == "openai" else offer.provider, "provider_api_url": None}


def _of(price: "ModelPrice") -> Tariff | None:
    if price.input_mtok is None:
        return None
    kinds = price.input_mtok, price.output_mtok, price.cache_read_mtok
    steps = sorted({tier.start for kind in kinds for tier in getattr(kind, "tiers", ())})
    long = tuple((start, _price([_at(kind, start) for kind in kinds])) for start in steps)
    return Tariff(_price([_at(kind, -1) for kind in kinds]), long)


def _price(figures: list[float | None]) -> Price:
    reading, writing, cached = figures
    assert reading is not None
    return Price(input=reading, output=writing or 0.0, cached_input=cached)  # embeddings have no price for writing


def _at(kind: Any, start: int) -> float | None:
    """Return the price for prompts of more than `start` tokens."""
    if kind is None or isinstance(kind, Decimal):
        return None if kind is None else float(kind)
    return float(next((tier.price for tier in reversed(kind.tiers) if tier.start <= start), kind.base))


def main() -> None:
    """Read offers, write tariffs."""
    offered = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Offer])
    sys.stdout.buffer.write(msgspec.json.encode(tariffs(offered, datetime.now(UTC))))


if __name__ == "__main__":
    main()
