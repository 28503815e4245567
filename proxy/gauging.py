"""Asks engines for their gauges: what they have to do, how full their caches are, and what is found there.

Only where there is a choice: of models with several endpoints. An engine makes its page of metrics in Python, in the
process that serves its requests, so each is asked by one worker, which tells the others through the board.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from random import random

from proxy.balancer import Balancer, gauges
from proxy.balancer.gauges import Gauges
from proxy.balancer.policies import Chance
from proxy.errors import UpstreamError
from proxy.live import LiveRegistry
from proxy.providers.headers import authorization
from proxy.registry import Endpoint
from proxy.transport import Timeouts, Transport

_PAUSE = 1.0  # seconds between two looks
_LONG_PAUSE = 60.0  # the same at a server that has no gauges of vLLM's
_TIMEOUTS = Timeouts(connect=1.0, first_byte=2.0, between_bytes=2.0)
_LONGEST = 4 * 1024 * 1024  # bytes of a page


async def follow(
    names: Mapping[str, Sequence[str]],
    live: LiveRegistry,
    transport_to: Callable[[Endpoint], Transport],
    balancer: Balancer,
    pause: float = _PAUSE,
    chance: Chance = random,
) -> None:
    """Ask the endpoints of models for their gauges, for ever. names: those this worker asks, by model."""
    async with asyncio.TaskGroup() as group:
        for model, endpoints in names.items():
            for name in endpoints:
                group.create_task(_follow_one(model, name, live, transport_to, balancer, pause, chance))


async def _follow_one(
    model: str,
    name: str,
    live: LiveRegistry,
    transport_to: Callable[[Endpoint], Transport],
    balancer: Balancer,
    pause: float,
    chance: Chance,
) -> None:
    while True:
        endpoint = live.current.ready_endpoint(model, name)
        said = await ask(endpoint, transport_to(endpoint)) if endpoint and endpoint.provider == "openai" else None
        balancer.told(model, name, said)
        unknown = said is None and endpoint is not None and endpoint.base_path is not None
        await asyncio.sleep((_LONG_PAUSE if unknown else pause) * (0.75 + 0.5 * chance()))  # not all at once


async def ask(endpoint: Endpoint, transport: Transport) -> Gauges | None:
    """Return the gauges of an endpoint, None where it has none of vLLM's or does not answer."""
    try:
        answer = await transport.send(
            b"GET", endpoint.path("/metrics").encode(), authorization(endpoint), b"", _TIMEOUTS
        )
        try:
            page = await answer.read(_LONGEST) if answer.status == 200 else b""
        finally:
            await answer.close()
    except UpstreamError:
        return None
    return gauges.read(page.decode("utf-8", "replace"))
