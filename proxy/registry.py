"""What can be asked for, and who answers it: name -> target -> endpoints. Frozen; replaced whole.

A name stands for a Model, for a Preset of what else a name may stand for, or for a Group of models.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import msgspec

from engines.spec import EngineStatus, FleetStatus, State
from proxy.capabilities import NOTHING, Capabilities, Findings, shared, subject_of
from proxy.config import (
    TEXT_ONLY,
    BreakerSettings,
    Config,
    EndpointSettings,
    ModelSettings,
    RetrySettings,
    Secret,
    Server,
    Timeouts,
)
from proxy.ensembles.settings import EnsembleSettings
from proxy.errors import UnknownModel
from proxy.forbidden import Policy
from proxy.naming import AUTO, AliasSettings, Prefer
from proxy.prompts import adapters, rendering
from proxy.prompts.adapters import Adapter
from proxy.routing.rules import RoutingSettings, Rule
from proxy.routing.traits import Traits


class Endpoint(msgspec.Struct, frozen=True):
    """A server that answers for a model.

    address: `unix:/path` or `scheme://host:port`. base_path: what its API's paths start with instead of /v1,
    or None for an engine of ours, which has the same paths as we have. serves: its own name for the model.
    stream_usage: whether it can be asked what a stream used. provider, api_version, options: see EndpointSettings.
    max_in_flight: requests that it gets at once, None for any number. pass_timeout: whether it is told how long the
    client still waits.
    continues: whether a chat that broke elsewhere can go on there; every engine of ours can try. since: what tells one
    process at the address from the next, its UNIX time of being ready. capabilities: what else was found out of it, and
    subject under what name that is kept. adapter: how requests are changed for it; None for not at all.
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
    capabilities: Capabilities = Capabilities()
    subject: str = ""
    adapter: Adapter | None = None

    def path(self, ours: str) -> str:
        """Translate a path of our API into the path at this endpoint."""
        return ours if self.base_path is None else _below(self.base_path, ours)


@lru_cache(maxsize=1024)
def _below(base: str, ours: str) -> str:
    return base + ours[3:] if ours.startswith("/v1/") else base.removesuffix("/v1") + ours


class Model(msgspec.Struct, frozen=True):
    """A model and its endpoints, with the state of the best of them.

    context_length: None where nobody says it. capabilities: what all endpoints can do. revision: of what gives its
    answers; another one when the configuration names other weights, or other servers. probes: its engines are asked
    what they can do when they are first ready.
    """

    name: str
    endpoints: tuple[Endpoint, ...]
    state: State
    detail: str = ""
    context_length: int | None = None
    timeouts: Timeouts = Timeouts()
    policy: Policy = Policy()
    breaker: BreakerSettings = BreakerSettings()
    retries: RetrySettings = RetrySettings()
    traits: Traits = Traits()
    capabilities: Capabilities = Capabilities()
    revision: str = ""
    probes: bool = False

    def ready(self) -> tuple[Endpoint, ...]:
        """Return the endpoints that take requests now."""
        return tuple(e for e in self.endpoints if e.state == "ready")


class Group(msgspec.Struct, frozen=True):
    """Any of some models, by their names; `auto` is any of all. prefer: None for what the rules say."""

    name: str
    members: tuple[str, ...]
    prefer: Prefer | None = None


class Preset(msgspec.Struct, frozen=True):
    """Something with a system prompt, and with defaults (fields as JSON) for what a request leaves out."""

    name: str
    of: Model | Group
    system: str | None = None
    defaults: Mapping[str, msgspec.Raw] = {}


class Ensemble(msgspec.Struct, frozen=True):
    """Models that answer together."""

    name: str
    settings: EnsembleSettings


Target = Model | Preset | Group | Ensemble


class Registry(msgspec.Struct, frozen=True):
    """All that can be asked for, at one moment.

    aliases: what stands behind each name that is no model's, `auto` and its like included. chains: for each name that
    can be asked for, and for each `task:NAME`, the models that answer when it cannot. routing, rules, tasks: what the
    router goes by, see Config.
    """

    models: dict[str, Model]
    aliases: dict[str, Target]
    chains: dict[str, tuple[str, ...]] = {}
    routing: RoutingSettings = RoutingSettings()
    rules: tuple[Rule, ...] = ()
    tasks: Mapping[str, tuple[str, ...]] = {}

    def resolve(self, name: str, only: frozenset[str] | None = None) -> Target:
        """Return what a name stands for. Raises UnknownModel with close matches.

        only: names that may be asked for, see `permits`; another is as unknown as one that there is not.
        """
        target = self.models.get(name) or self.aliases.get(name)
        if target is None or (only is not None and not permits(only, name, target)):
            raise UnknownModel(name, difflib.get_close_matches(name, self.names(only), n=3, cutoff=0.5))
        return target

    def ready_endpoint(self, model: str, name: str) -> Endpoint | None:
        """Return an endpoint of a model, None while it takes no requests."""
        found = self.models.get(model)
        return next((e for e in found.ready() if e.name == name), None) if found else None

    def addresses(self) -> set[str]:
        """Return the addresses of all endpoints."""
        return {endpoint.address for model in self.models.values() for endpoint in model.endpoints}

    def names(self, only: frozenset[str] | None = None) -> list[str]:
        """Return every name that can be asked for, or those of them that `only` permits: models first.

        The virtual models are among them where there is a choice.
        """
        every: dict[str, Target] = {**self.models, **self.aliases}
        shown = [name for name in every if name not in AUTO or len(self.models) > 1]
        return shown if only is None else [name for name in shown if permits(only, name, every[name])]


def permits(only: frozenset[str], name: str, target: Target) -> bool:
    """Say whether a name is allowed: it is itself, what it stands for is, one of a group is, or all of an ensemble."""
    if name in only:
        return True
    if isinstance(target, Ensemble):
        return only.issuperset(target.settings.names())
    if isinstance(target, Preset):
        return permits(only, target.of.name, target.of)
    return not only.isdisjoint(target.members) if isinstance(target, Group) else target.name in only


BEST_FIRST: tuple[State, ...] = ("ready", "starting", "draining", "failed", "stopped")


def build(config: Config, fleet: FleetStatus, findings: Findings = NOTHING) -> Registry:
    """Make the registry of a configuration, what the supervisor says of its engines, and what was found out."""
    engines: dict[str, list[EngineStatus]] = {name: [] for name in config.models}
    for status in fleet.engines:
        if status.model in engines:
            engines[status.model].append(status)
    models = {
        name: _local(name, model, engines[name], config.server, findings)
        if model.engine
        else _remote(name, model, findings)
        for name, model in config.models.items()
    }
    return Registry(
        models=models,
        aliases=_targets(config, models),
        chains=_chains(config),
        routing=config.routing,
        rules=config.rules,
        tasks=config.tasks,
    )


def _targets(config: Config, models: dict[str, Model]) -> dict[str, Target]:
    """Return what the aliases of a configuration stand for, and the virtual models."""
    names = config.names()
    auto: dict[str, Model | Group] = {name: Group(name, tuple(models), prefer) for name, prefer in AUTO.items()}
    plain = {a: (models | auto)[t] for a, t in config.aliases.items() if isinstance(t, str)}
    settings = {a: t for a, t in config.aliases.items() if isinstance(t, AliasSettings)}
    groups: dict[str, Model | Group] = {
        name: Group(name, tuple(map(names.model, group.any_of)), group.prefer)
        for name, group in settings.items()
        if group.any_of is not None
    }
    known = {**models, **plain, **groups, **auto}
    presets = {name: _preset(name, preset, known[preset.model]) for name, preset in settings.items() if preset.model}
    found: dict[str, Target] = {**plain, **groups, **presets}
    ensembles: dict[str, Target] = {name: Ensemble(name, settings) for name, settings in config.ensembles.items()}
    return {name: found[name] for name in config.aliases} | auto | ensembles


def _preset(name: str, settings: AliasSettings, of: Model | Group) -> Preset:
    defaults = {field: msgspec.Raw(msgspec.json.encode(value)) for field, value in settings.defaults.items()}
    return Preset(name, of, settings.system, defaults)


def _chains(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the chains with their aliases resolved; an alias without one of its own has that of its model."""
    names = config.names()
    own = {
        key: tuple(dict.fromkeys(model for step in chain for model in names.models_of(step)))
        for key, chain in config.fallbacks.items()
    }
    return {alias: own[model] for alias in config.aliases if (model := names.model(alias)) in own} | own


def _local(
    name: str, model: ModelSettings, engines: Iterable[EngineStatus], server: Server, findings: Findings
) -> Model:
    assert model.engine
    most = model.engine.max_in_flight
    ranked = sorted(engines, key=lambda status: BEST_FIRST.index(status.state))
    best = ranked[0] if ranked else None
    subject = subject_of(model.engine, name)
    found = _found(findings, subject, best.version if best else None)
    adapter = adapters.for_chats(model.adapter, None, system_role=found.system_role)
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
                capabilities=found,
                subject=subject,
                adapter=adapter,
            )
            for s in ranked
            if s.address
        ),
        state=best.state if best else "starting",
        detail=best.detail if best else "",
        context_length=model.context or next((s.context_length for s in ranked if s.context_length), None),
        timeouts=model.timeouts,
        policy=Policy(frozenset(model.allow), frozenset(server.media_domains)),
        breaker=model.breaker,
        retries=model.retries,
        traits=model.traits(),
        capabilities=found,
        revision=_revision(model),
        probes=model.probe and model.engine.simulator is None,
    )


def _found(findings: Findings, subject: str, version: str | None = None) -> Capabilities:
    """Return what was found out of a subject, if that was of this version of its server."""
    finding = findings.get(subject)
    if finding is None or (version is not None and finding.version != version):
        return Capabilities()
    return finding.capabilities


def _remote(name: str, model: ModelSettings, findings: Findings) -> Model:
    endpoints = tuple(_endpoint(name, i, settings, model, findings) for i, settings in enumerate(model.endpoints))
    capabilities = shared(e.capabilities for e in endpoints)
    policy = Policy(frozenset(model.allow), None)
    return Model(
        name=name,
        endpoints=endpoints,
        state="ready",
        context_length=model.context or capabilities.context_length,
        timeouts=model.timeouts,
        policy=policy,
        breaker=model.breaker,
        retries=model.retries,
        traits=model.traits(),
        capabilities=capabilities,
        revision=_revision(model),
    )


def _revision(model: ModelSettings) -> str:
    """Return what differs where a model may give other answers, however many there are who give them."""
    engine = model.engine
    if engine:
        parts: Sequence[object] = [engine.weights, engine.quantization, engine.dtype, engine.max_model_len, engine.args]
    else:
        parts = sorted({(e.provider, e.base_url, e.model or "") for e in model.endpoints})
    return hashlib.sha256(msgspec.json.encode([parts, model.adapter], order="sorted")).hexdigest()[:16]


def _endpoint(model: str, index: int, settings: EndpointSettings, of: ModelSettings, findings: Findings) -> Endpoint:
    subject = subject_of(settings, model)
    found = _found(findings, subject)
    parts = urlsplit(settings.base_url)
    return Endpoint(
        name=f"{model}/{index}",
        model=model,
        address=f"{parts.scheme}://{parts.netloc}",
        serves=settings.model or model,
        base_path=parts.path.rstrip("/"),
        api_key=settings.api_key,
        weight=settings.weight,
        stream_usage=_first(settings.stream_usage, found.stream_usage, True),
        continues=_first(settings.continues, found.continues, settings.provider in _CONTINUES),
        provider=settings.provider,
        api_version=settings.api_version,
        options=settings.options,
        max_in_flight=settings.max_in_flight,
        pass_timeout=settings.pass_timeout,
        capabilities=found,
        subject=subject,
        adapter=_adapter(settings, of, found, settings.model or model),
    )


_CONTINUES = ("anthropic", TEXT_ONLY)


def _adapter(settings: EndpointSettings, of: ModelSettings, found: Capabilities, name: str) -> Adapter | None:
    if settings.provider == TEXT_ONLY:
        template = adapters.template_name(of.adapter, name)
        return adapters.for_text(of.adapter, name, rendering.shipped(template) if template else "")
    modalities = of.modalities or found.modalities
    images = None if modalities is None else "image" in modalities
    return adapters.for_chats(of.adapter, name, system_role=found.system_role, images=images)


def _first(configured: bool | None, found: bool | None, otherwise: bool) -> bool:
    """Return what is configured, else what was found out, else what is likely."""
    return next((said for said in (configured, found) if said is not None), otherwise)
