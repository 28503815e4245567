"""Where a request may go: which model and endpoints come next, after those that were tried. Decides; sends nothing."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import msgspec

from proxy import forbidden
from proxy.admission import Admission
from proxy.endpoints import Endpoints, Standing
from proxy.errors import EngineStopped, NotReady, RequestError, Unavailable
from proxy.length import Length
from proxy.limits import Limits
from proxy.live import LiveRegistry
from proxy.registry import Endpoint, Model
from proxy.retries import ROUNDS, backoff
from proxy.transport import Transport

Key = tuple[str, float]  # of a process at an endpoint: its name, and since when it is there

_NONE: frozenset[Key] = frozenset()


class Ways(NamedTuple):
    """What all requests share. start_wait: seconds for an engine to start."""

    live: LiveRegistry
    endpoints: Endpoints
    transport_to: Callable[[Endpoint], Transport]
    start_wait: float
    limits: Limits
    admission: Admission


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where an attempt may be made: one of some endpoints. level: how many models of the chain were passed over."""

    level: int
    model: Model
    candidates: list[Standing]


class Route:
    """The way of one request through the endpoints of its model and of the models of its chain."""

    __slots__ = (
        "_again", "_chain", "_context", "_fields", "_length", "_rounds", "_tried", "_waited", "_ways", "model",
        "must_continue",
    )  # fmt: skip

    def __init__(self, ways: Ways, fields: Mapping[str, msgspec.Raw], model: Model, chain: Sequence[str]) -> None:
        """fields: of the request's body. chain: names of models."""
        self._ways = ways
        self._fields = fields
        self._chain = chain
        # All mutable state: the model as the newest registry has it.
        self.model = model
        # What was tried; of that, what may be asked again in a moment (None: often enough), and how often that was;
        # whether an engine was waited for.
        self._tried: frozenset[Key] = _NONE
        self._again: frozenset[Key] | None = _NONE
        self._rounds = 0
        self._waited = False
        # What an endpoint must have: a longer context than this, the ability to continue. How long the prompt is.
        self._context = 0
        self.must_continue = False
        self._length: Length | None = None

    def __repr__(self) -> str:
        return f"<Route of {self.model.name} and {list(self._chain)}, tried {sorted(self._tried)}>"

    def leads_elsewhere(self, model: Model) -> bool:
        """Say whether there is any endpoint beside one of this model."""
        return bool(self._chain) or len(model.endpoints) > 1

    def find(self) -> Place | None:
        """Return the first model with endpoints that may be asked now; one where all have too much to do comes last."""
        endpoints = self._ways.endpoints
        now = endpoints.clock()
        busy = None
        for level, model in self._models():
            allowed = self._allowed(model, now)
            if not allowed:
                continue
            preferred = endpoints.preferred(allowed, now)
            if preferred and (not self._chain or self._ways.admission.has_room(model.name, preferred)):
                return Place(level, model, preferred)
            busy = busy or Place(level, model, allowed)
        return busy

    async def later(self) -> Place | None:
        """Nothing may be asked now. Wait where that can help, and look again."""
        place = None
        if self._again:
            self._rounds += 1
            await asyncio.sleep(backoff(self._rounds, self._ways.endpoints.chance()))
            self._tried -= self._again
            self._again = _NONE if self._rounds < ROUNDS else None
            place = self._look_again()
        if place is None and not self._waited and self._is_starting():
            self._waited = True
            await self._ways.live.until(
                lambda _: bool(self._look_again()) or not self._is_starting(), self._ways.start_wait
            )
            place = self._look_again()
        return place

    def still_there(self, name: str) -> list[Standing]:
        """Return the endpoints of a model that a request in its queue may go to now. Raises what to tell if none."""
        known = self._ways.live.current.models
        model = known.get(name) or (self.model if name == self.model.name else None)
        allowed = self._allowed(model, self._ways.endpoints.clock()) if model else []
        if not allowed:
            raise self.unavailable()
        return allowed

    def pass_over(self, tried: Iterable[Endpoint], *, again: bool = False) -> None:
        """Some endpoints were tried in vain. again: what was wrong may pass in a moment."""
        keys = frozenset(map(_key, tried))
        self._tried |= keys
        self._renew()
        if again and self._again is not None:
            self._again |= keys

    def begin_anew(self, broken: Endpoint, *, again: bool) -> None:
        """What was tried before is as good as any, but for one that has just broken. again: so may that be, later."""
        self._renew()
        self._tried, self._waited = frozenset((_key(broken),)), False
        self._again = self._tried if again else _NONE
        self._rounds = ROUNDS - 1  # a client is reading: it is asked once

    def is_too_long_for(self, model: Model) -> bool:
        """Say whether the prompt may be too long for a model; if so, only longer ones are found from now on."""
        context = model.context_length
        if context is None or self._measured().most <= context:
            return False
        self._context = max(self._context, context)
        return True

    def unavailable(self) -> RequestError:
        """Return why nothing may be asked."""
        model, endpoints = self.model, self._ways.endpoints
        if not model.ready() and model.state == "starting":
            return NotReady(model.name, model.state, model.detail)
        if not model.ready():
            # Why it failed is for whoever runs the server (`polyvox engines list`): a log's tail may hold paths.
            return EngineStopped(model.name, model.state)
        return Unavailable(model.name, endpoints.wait([m for _, m in self._models()], endpoints.clock()))

    def _models(self) -> Iterable[tuple[int, Model]]:
        own = () if self._context else ((0, self.model),)
        return chain(own, self._others()) if self._chain else own

    def _others(self) -> Iterator[tuple[int, Model]]:
        models = self._ways.live.current.models
        for level, name in enumerate(self._chain, 1):
            model = models.get(name)
            if model and self._suits(model):  # None: a new configuration has it no more
                yield level, model

    def _suits(self, model: Model) -> bool:
        """Say whether a model of the chain may be asked this at all."""
        context = model.context_length
        if context is not None and (context <= self._context or self._measured().least > context):
            return False
        try:
            forbidden.check(self._fields, model.policy, self._ways.limits)
        except RequestError:
            return False
        return True

    def _measured(self) -> Length:
        if self._length is None:
            self._length = Length.of(self._fields)
        return self._length

    def _allowed(self, model: Model, now: float) -> list[Standing]:
        allowed = self._ways.endpoints.allowed(model, now)
        if self._tried:
            allowed = [s for s in allowed if _key(s.endpoint) not in self._tried]
        return [s for s in allowed if s.endpoint.continues] if self.must_continue else allowed

    def _look_again(self) -> Place | None:
        self._renew()
        return self.find()

    def _renew(self) -> None:
        """Take the model from the newest registry; one that a new configuration has no more stays as it was."""
        self.model = self._ways.live.current.models.get(self.model.name, self.model)

    def _is_starting(self) -> bool:
        """Say whether an engine that could answer is about to."""
        return any(
            model.state in ("starting", "draining") or any(e.state == "starting" for e in model.endpoints)
            for _, model in self._models()
        )


def _key(endpoint: Endpoint) -> Key:
    return endpoint.name, endpoint.since
