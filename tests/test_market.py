"""What clouds ask for their models, as the package genai-prices knows it."""

import asyncio
from datetime import UTC, datetime

from proxy import market
from proxy.config import Config, EndpointSettings, ModelSettings
from proxy.cost import Price
from proxy.market import Offer

NOW = datetime(2026, 6, 1, tzinfo=UTC)
CONFIG = Config(
    models={
        "gpt-4o-mini": ModelSettings(endpoints=(EndpointSettings("https://api.openai.com/v1"),)),
        "agreed": ModelSettings(
            endpoints=(EndpointSettings("https://api.openai.com/v1", model="gpt-4o-mini"),), price=Price(1, 2)
        ),
    }
)


def test_only_what_the_configuration_leaves_out_is_looked_up():
    assert market.offers(CONFIG) == [Offer("gpt-4o-mini/0", "openai", "https://api.openai.com/v1", "gpt-4o-mini")]


def test_a_model_of_a_cloud_has_its_price_by_address_or_provider():
    offered = [
        *market.offers(CONFIG),
        Offer("a/0", "anthropic", "https://proxy.example.com", "claude-sonnet-4-5"),
        Offer("g/0", "openai", "https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-pro"),
    ]
    found = market.tariffs(offered, NOW)
    assert found["gpt-4o-mini/0"].base == Price(input=0.15, output=0.6, cached_input=0.075)
    assert found["a/0"].base.output == 15
    assert found["g/0"].at(1000).input == 1.25
    assert found["g/0"].at(300_000).input == 2.5


def test_what_is_not_known_has_no_price():
    offered = [
        Offer("x/0", "openai", "http://127.0.0.1:9/v1", "gpt-4o"),
        Offer("y/0", "openai", "https://api.openai.com/v1", "gpt-of-nobody"),
        Offer("z/0", "plugin", "https://x.example.com", "gpt-4o"),
    ]
    assert market.tariffs(offered, NOW) == {}


def test_another_process_finds_the_same():
    found = asyncio.run(market.ask(market.offers(CONFIG)))
    assert found == market.tariffs(market.offers(CONFIG), datetime.now(UTC))
