"""Finds out what engines can do, when they are first ready with weights, flags and a version that nobody knows yet.

One worker does it for all of a server, one engine after another, and never hurries: it begins when nobody has asked the
engine anything for a while, and asks each question when it has nothing else to do. Both have an end: an engine that is
busy all day is asked all the same.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from proxy import gauging
from proxy.capabilities import Capabilities, Folder
from proxy.errors import ProbeFailed
from proxy.live import LiveRegistry
from proxy.probe import probe
from proxy.registry import Endpoint, Registry
from proxy.transport import Transport

log = logging.getLogger(__name__)


class Manners(NamedTuple):
    """Seconds. pause: between two looks for engines to ask. glance: between two looks whether an engine is idle.

    quiet: that it has been idle for before the first question, patience: that is waited for that. hold: that each
    further question waits until it is idle. longest: that all takes together.
    """

    pause: float = 2.0
    glance: float = 0.25
    quiet: float = 10.0
    patience: float = 300.0
    hold: float = 15.0
    longest: float = 1200.0


PATIENT = Manners()


class Discovery:
    """Asks the engines of one server."""

    def __init__(
        self,
        live: LiveRegistry,
        transport_to: Callable[[Endpoint], Transport],
        folder: Folder,
        manners: Manners = PATIENT,
    ) -> None:
        self._live = live
        self._transport_to = transport_to
        self._folder = folder
        self._manners = manners
        # All mutable state: the processes that were asked, by endpoint and since when they are there.
        self._asked: set[tuple[str, float]] = set()

    def __repr__(self) -> str:
        return f"<Discovery of {self._folder.path}, {len(self._asked)} asked>"

    async def run(self) -> None:
        """Ask for ever whoever is unknown. What was found reaches all workers through the folder."""
        while True:
            await asyncio.sleep(self._manners.pause)
            for endpoint in _unknown(self._live.current):
                if (endpoint.name, endpoint.since) not in self._asked:
                    self._asked.add((endpoint.name, endpoint.since))
                    await self._ask(endpoint)

    async def _ask(self, endpoint: Endpoint) -> None:
        """Ask one engine. Whatever goes wrong is no reason to stop: it is asked again when it has started anew."""
        transport, manners = self._transport_to(endpoint), self._manners
        idle = partial(self._until_idle, endpoint, transport)
        try:
            async with asyncio.timeout(manners.longest):
                await idle(manners.quiet, manners.patience)
                if endpoint.subject not in {e.subject for e in _unknown(self._live.current)}:
                    return  # somebody else has asked it, or it is gone
                finding = await probe(endpoint, transport, spend=0, ready=lambda: idle(0.0, manners.hold))
            self._folder.write(endpoint.subject, finding)
        except (ProbeFailed, TimeoutError, OSError) as e:
            log.info("%s could not be asked what it can do: %s", endpoint.name, e or type(e).__name__)

    async def _until_idle(self, endpoint: Endpoint, transport: Transport, quiet: float, patience: float) -> None:
        """Wait until an engine has had no requests for `quiet` seconds, `patience` seconds at most."""
        glance = self._manners.glance
        idle = waited = 0.0
        while waited < patience:
            said = await gauging.ask(endpoint, transport)
            if said is None or said.running + said.waiting:
                idle = 0.0  # or it does not answer at all
            elif idle >= quiet:
                return
            await asyncio.sleep(glance)
            idle, waited = idle + glance, waited + glance


def _unknown(registry: Registry) -> list[Endpoint]:
    """Return an engine of each model of which nothing is known, though it may be asked."""
    models = [m for m in registry.models.values() if m.probes and m.ready() and m.capabilities == Capabilities()]
    return [model.ready()[0] for model in models]
