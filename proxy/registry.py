"""What can be asked for, and who answers it: alias -> model -> endpoints. Frozen; replaced whole."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from engines.spec import EngineStatus, FleetStatus, State
from proxy.config import (
    BreakerSettings,
    Config,
    EndpointSettings,
    ModelSettings,
    RetrySettings,
    Secret,
    Server,
    Timeouts,
)
from proxy.errors import UnknownModel
from proxy.forbidden import Policy


class Endpoint(msgspec.Struct, frozen=True):
    """A server that answers for a model.

    address: `unix:/path` or `scheme://host:port`. base_path: what its API's paths start with instead of /v1,
    or None for an engine of ours, which has the same paths as we have. serves: its own name for the model.
    stream_usage: whether it can be asked what a stream used. provider, api_version, options: see EndpointSettings.
    max_in_flight: requests that it gets at once, None for any number. pass_timeout: whether it is told how long the
    client still waits.
    continues: whether a chat that broke elsewhere can go on there. since: what tells one process at the address from
    the next, its UNIX time of being ready.
    """

    name: str
    model: str
    address: str
    serves: str
    state: State = "ready"
    base_path: str | None = None
    api_key: Secret | None = None
    weight: float = 1.0
    stream_usage: bool = True
    continues: bool = True
    since: float = 0.0
    provider: str = "openai"
    api_version: str | None = None
    options: Mapping[str, Any] = {}
    max_in_flight: int | None = None
    pass_timeout: bool = True

    def path(self, ours: str) -> str:
        """Translate a path of our API into the path at this endpoint."""
        if self.base_path is None:
            return ours
        if ours.startswith("/v1/"):
            return self.base_path + ours[3:]
        return self.base_path.removesuffix("/v1") + ours


class Model(msgspec.Struct, frozen=True):
    """A model and its endpoints, with the state of the best of them."""

    name: str
    endpoints: tuple[Endpoint, ...]
    state: State
    detail: str = ""
    context_length: int | None = None
    timeouts: Timeouts = Timeouts()
    policy: Policy = Policy()
    breaker: BreakerSettings = BreakerSettings()
    retries: RetrySettings = RetrySettings()

    def ready(self) -> tuple[Endpoint, ...]:
        """Return the endpoints that take requests now."""
        return tuple(e for e in self.endpoints if e.state == "ready")


class Registry(msgspec.Struct, frozen=True):
    """All models and aliases at one moment.

    chains: for each name that can be asked for, and for each `task:NAME`, the models that answer when it cannot.
    """

    models: dict[str, Model]
    aliases: dict[str, str]
    chains: dict[str, tuple[str, ...]] = {}

    def resolve(self, name: str) -> Model:
        """Return the model that a name or alias stands for. Raises UnknownModel with close matches."""
        model = self.models.get(self.aliases.get(name, name))
        if model is None:
            raise UnknownModel(name, difflib.get_close_matches(name, self.names(), n=3, cutoff=0.5))
        return model

    def ready_endpoint(self, model: str, name: str) -> Endpoint | None:
        """Return an endpoint of a model, None while it takes no requests."""
        found = self.models.get(model)
        return next((e for e in found.ready() if e.name == name), None) if found else None

    def addresses(self) -> set[str]:
        """Return the addresses of all endpoints."""
        return {endpoint.address for model in self.models.values() for endpoint in model.endpoints}

    def names(self) -> list[str]:
        """Return every name that can be asked for: models first, then aliases."""
        return [*self.models, *self.aliases]


_BEST_FIRST: tuple[State, ...] = ("ready", "starting", "draining", "failed", "stopped")


def build(config: Config, fleet: FleetStatus) -> Registry:
    """Make the registry of a configuration and what the supervisor says of its engines."""
    engines: dict[str, list[EngineStatus]] = {name: [] for name in config.models}
    for status in fleet.engines:
        if status.model in engines:
            engines[status.model].append(status)
    models = {
        name: _local(name, model, engines[name], config.server) if model.engine else _remote(name, model)
        for name, model in config.models.items()
    }
    return Registry(models=models, aliases=config.aliases, chains=_chains(config))


def _chains(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the chains with their aliases resolved; an alias without one of its own has that of its model."""
    own = {key: tuple(config.aliases.get(step, step) for step in chain) for key, chain in config.fallbacks.items()}
    return {alias: own[model] for alias, model in config.aliases.items() if model in own} | own


def _local(name: str, model: ModelSettings, engines: Iterable[EngineStatus], server: Server) -> Model:
    assert model.engine
    most = model.engine.max_in_flight
    ranked = sorted(engines, key=lambda status: _BEST_FIRST.index(status.state))
    best = ranked[0] if ranked else None
    return Model(
        name=name,
        endpoints=tuple(
            Endpoint(
                name=s.id,
                model=name,
                address=s.address,
                serves=name,
                state=s.state,
                max_in_flight=most,
                since=s.since,
            )
            for s in ranked
            if s.address
        ),
        state=best.state if best else "starting",
        detail=best.detail if best else "",
        context_length=next((s.context_length for s in ranked if s.context_length), None),
        timeouts=model.timeouts,
        policy=Policy(frozenset(model.allow), frozenset(server.media_domains)),
        breaker=model.breaker,
        retries=model.retries,
    )


def _remote(name: str, model: ModelSettings) -> Model:
    endpoints = tuple(_endpoint(name, i, settings) for i, settings in enumerate(model.endpoints))
    policy = Policy(frozenset(model.allow), None)
    return Model(
        name=name,
        endpoints=endpoints,
        state="ready",
        timeouts=model.timeouts,
        policy=policy,
        breaker=model.breaker,
        retries=model.retries,
    )


def _endpoint(model: str, index: int, settings: EndpointSettings) -> Endpoint:
    parts = urlsplit(settings.base_url)
    return Endpoint(
        name=f"{model}/{index}",
        model=model,
        address=f"{parts.scheme}://{parts.netloc}",
        serves=settings.model or model,
        base_path=parts.path.rstrip("/"),
        api_key=settings.api_key,
        weight=settings.weight,
        stream_usage=settings.stream_usage,
        continues=settings.provider == "anthropic" if settings.continues is None else settings.continues,
        provider=settings.provider,
        api_version=settings.api_version,
        options=settings.options,
        max_in_flight=settings.max_in_flight,
        pass_timeout=settings.pass_timeout,
    )
