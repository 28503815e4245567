"""How the APIs of others are spoken: one small stateless class for each, behind one protocol.

`openai`, `azure`, `anthropic` and `completions` are ours. Others come from installed distributions: an entry point in
the group `polyvox.providers`, whose name goes into an endpoint's `provider`, and whose value makes a Provider when it
is called without arguments.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import msgspec

from proxy import plugins, wire
from proxy.config import Config, EndpointSettings, Loaded
from proxy.errors import PluginError, WrongSetting
from proxy.registry import Endpoint
from proxy.transport import Answer, Headers

_OURS = {"openai": "OpenAI", "azure": "Azure", "anthropic": "Anthropic", "completions": "Completions"}


class Asked(msgspec.Struct, frozen=True, gc=False):
    """A client's request for a model.

    path, query, headers, body: as they came, or the body as it was changed to go on with an answer that broke.
    envelope: what was read of the body as it came. form: the body is multipart/form-data. salt: what keeps the client's
    part of an engine's prefix cache apart, None for nothing. plain: see limits.check. ordinary: no header of it tells
    the cache or the routing anything, so that nobody need look; it may be so without this.
    """

    path: str
    query: bytes
    headers: Headers
    body: bytes
    envelope: wire.Envelope
    request_id: bytes
    form: bool = False
    salt: str | None = None
    plain: msgspec.Raw | None = None
    ordinary: bool = False

    def with_fields(self, fields: dict[str, msgspec.Raw]) -> "Asked":
        """Write the body anew from these fields, whose values keep their bytes."""
        envelope = msgspec.structs.replace(self.envelope, fields=fields)
        return msgspec.structs.replace(self, body=wire.encode(fields), envelope=envelope)

    def without(self, name: str) -> "Asked":
        """Take out a field that only we are meant to see."""
        fields = self.envelope.fields
        if name not in fields:
            return self
        return self.with_fields({other: value for other, value in fields.items() if other != name})


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """What is sent to an endpoint, by POST. path: with its query.

    hide_usage: the stream that comes back tells what it used, though the client did not ask for that.
    """

    path: bytes
    headers: Headers
    body: bytes
    hide_usage: bool = False


class Provider(Protocol):
    """An API that endpoints speak. It keeps nothing: one object serves all endpoints and requests of a worker."""

    def check(self, settings: EndpointSettings) -> None:
        """Raise WrongSetting if an endpoint cannot be used as it is configured. `options` is the provider's own."""
        ...

    def request(self, asked: Asked, endpoint: Endpoint) -> Outgoing:
        """Translate a request. Pure.

        Raises PathNotServed for a path that the API has not, BadRequest for a field that it cannot express.
        """
        ...

    def answer(self, answer: Answer, asked: Asked, endpoint: Endpoint) -> Answer:
        """Return the answer as our API gives it: the same object, or one that translates while it passes.

        It is asked about successes and about errors of the client (4xx), before the first byte of the body is read.
        """
        ...


@cache
def named(name: str) -> Provider:
    """Return the provider of this name. Raises PluginError where there is none, or it cannot be imported."""
    if name in _OURS:
        return cast(Provider, getattr(import_module(f"{__name__}.{name}"), _OURS[name])())
    return cast(Provider, plugins.load(plugins.PROVIDERS, name))


def prepare(config: Config) -> None:
    """Import the providers of a configuration, so that no request has to wait for it."""
    for name in ("openai", *(e.provider for model in config.models.values() for e in model.endpoints)):
        named(name)


def check(loaded: Loaded) -> None:
    """Ask each endpoint's provider about its settings. Raises ConfigError with the line of what is wrong."""
    for path, endpoint in _endpoints(loaded):
        try:
            _known(endpoint.provider).check(endpoint)
        except PluginError as e:
            raise loaded.error((*path, "provider"), loaded.redact(str(e))) from None
        except WrongSetting as e:
            raise loaded.error((*path, *e.field), loaded.redact(str(e))) from None


def _endpoints(loaded: Loaded) -> Iterator[tuple[tuple[str | int, ...], EndpointSettings]]:
    for name, model in loaded.config.models.items():
        for i, endpoint in enumerate(model.endpoints):
            yield ("models", name, "endpoints", i), endpoint


def _known(name: str) -> Provider:
    if name not in _OURS and name not in (offered := plugins.names(plugins.PROVIDERS)):
        near = get_close_matches(name, (*_OURS, *offered), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PluginError(f"there is no provider {name!r}; {hint}There are {', '.join((*_OURS, *offered))}")
    return named(name)
