"""What tokens cost, in USD. Pure; an unknown price is None, and so is what it would have made, never 0."""

from typing import Annotated

import msgspec
from msgspec import Meta

from proxy.accounting import Usage

_MILLION = 1e6
_HOUR = 3600.0
# The time that a token written takes of an engine, in tokens read that no cache had. What clouds ask for the two
# differs by 4 to 5, and follows what they cost them.
_WRITTEN = 4.0
# The `work` that an engine is taken to do in a second until it has shown what it does: a hundred tokens written, as
# with one request at a time. With several it does more, so that its price is rather less.
HOSTED_WORK = 100 * _WRITTEN
_FADE = 0.999  # of what was seen before, with each request: the last thousand or so count

Usd = Annotated[float, Meta(ge=0, le=1e9)]  # YAML has a word for the infinite, JSON has none


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """USD per million tokens. cached_input: of those of a prompt that the server's cache had; as input if left out."""

    input: Usd
    output: Usd
    cached_input: Usd | None = None


class Hosting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the machine of one engine costs, from which the price of a token is worked out."""

    usd_per_hour: Annotated[float, Meta(gt=0, le=1e9)]


class Tariff(msgspec.Struct, frozen=True):
    """The price of an endpoint. long: from so many tokens in a prompt on, another price for all of its request."""

    base: Price
    long: tuple[tuple[int, Price], ...] = ()

    def at(self, tokens_in: int) -> Price:
        """Return the price for a request with a prompt of this length."""
        return max(((above, price) for above, price in self.long if tokens_in > above),
                   key=lambda step: step[0], default=(0, self.base))[1]  # fmt: skip


def cost(price: Price, usage: Usage) -> float:
    """Return what tokens cost."""
    dollars = usage.tokens_in * price.input + usage.tokens_out * price.output
    if usage.cached and price.cached_input is not None:
        dollars -= min(usage.cached, usage.tokens_in) * (price.input - price.cached_input)
    return dollars / _MILLION


def estimate(price: Price, tokens_in: int, tokens_out: int) -> float:
    """Return what a request may cost that is yet to be made: without any luck with caches."""
    return cost(price, Usage(tokens_in, tokens_out))


def work(usage: Usage) -> float:
    """Return what an engine has done for tokens, in tokens read: those that its cache had took it nothing."""
    return max(usage.tokens_in - usage.cached, 0) + _WRITTEN * usage.tokens_out


def faded(seen: float, new: float) -> float:
    """Return a sum of what was seen of the requests of late, after one more."""
    return seen * _FADE + new


def hosted(usd_per_hour: float, busy: float, done: float) -> Price | None:
    """Return what the tokens of an engine cost, None before it has done anything.

    busy: the seconds in which it had something to do; done: the `work` that it did in them. While an engine is idle
    its machine costs as much, which no request is charged with.
    """
    if done <= 0 or busy <= 0:
        return None
    each = usd_per_hour / _HOUR * busy / done * _MILLION
    return Price(input=each, output=each * _WRITTEN, cached_input=0.0)


def dearest(tariffs: list[Price], usage: Usage) -> float | None:
    """Return what tokens would have cost at the worst of some prices; None without any."""
    return max((cost(price, usage) for price in tariffs), default=None)
