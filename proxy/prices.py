"""The price of each endpoint, as far as it is known."""

from collections.abc import Callable, Mapping

from proxy.accounting import Usage
from proxy.config import Config
from proxy.cost import HOSTED_WORK, Price, Tariff, cost, hosted, work

Throughput = Callable[[str, str], tuple[float, float]]  # model, endpoint -> seconds busy, work done in them


def _nothing(model: str, endpoint: str) -> tuple[float, float]:
    return 0.0, 0.0


class Prices:
    """What the configuration says; what is learned of clouds; what is worked out for engines."""

    def __init__(self, config: Config, throughput: Throughput = _nothing) -> None:
        self._throughput = throughput
        self._hosting = {name: m.hosting.usd_per_hour for name, m in config.models.items() if m.hosting}
        self._endpoints = config.endpoint_names()
        self._engines = [(name, config.models[name].endpoint_names(name)) for name in self._hosting]
        # All mutable state: the tariff of each endpoint that has one.
        self._tariffs = {
            endpoint: Tariff(model.price)
            for name, model in config.models.items()
            if model.price
            for endpoint in model.endpoint_names(name)
        }

    def __repr__(self) -> str:
        return f"<Prices of {len(self._tariffs)} endpoints, {len(self._hosting)} models to work out>"

    def learn(self, tariffs: Mapping[str, Tariff]) -> None:
        """Add tariffs by the names of endpoints. The configuration's stay."""
        self._tariffs = {**tariffs, **self._tariffs}

    def cost(self, model: str, endpoint: str, usage: Usage, seconds: float = 0.0) -> float | None:
        """Return the USD that tokens cost at an endpoint, None if the price is not known.

        seconds: that the request has taken there. They are what an engine is measured by that has answered none before.
        """
        tariff = self._tariffs.get(endpoint)
        if tariff is not None:
            return cost(tariff.at(usage.tokens_in) if tariff.long else tariff.base, usage)
        if model not in self._hosting:
            return None
        price = self._hosted(model, endpoint) or hosted(self._hosting[model], seconds, work(usage))
        return None if price is None else cost(price, usage)

    def dearest(self, model: str, tokens_in: int) -> Price | None:
        """Return the price of a model for a prompt of some tokens, wherever it is sent; None if any of it is unknown.

        An engine that has not done anything yet has what it would cost if it were slow: see cost.HOSTED_WORK.
        """
        prices = [self._price(model, endpoint, tokens_in) for endpoint in self._endpoints.get(model, ())]
        known = [price for price in prices if price is not None]
        return max(known, key=lambda p: (p.output, p.input)) if known and len(known) == len(prices) else None

    def _price(self, model: str, endpoint: str, tokens_in: int) -> Price | None:
        if (tariff := self._tariffs.get(endpoint)) is not None:
            return tariff.at(tokens_in)
        if model not in self._hosting:
            return None
        return self._hosted(model, endpoint) or hosted(self._hosting[model], 1.0, HOSTED_WORK)

    def _hosted(self, model: str, endpoint: str) -> Price | None:
        """Return the price that is worked out for an engine, None before it has done anything, and for others."""
        if model not in self._hosting:
            return None
        return hosted(self._hosting[model], *self._throughput(model, endpoint))

    def known(self) -> list[Price]:
        """Return the prices as they are now, those of long prompts aside."""
        now = [self._hosted(model, endpoint) for model, endpoints in self._engines for endpoint in endpoints]
        return [*(tariff.base for tariff in self._tariffs.values()), *(price for price in now if price)]
