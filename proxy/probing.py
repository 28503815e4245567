"""`polyvox probe`: asks the endpoints of a model what they can do, and keeps that."""

import asyncio
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import msgspec

from engines.paths import StatePaths
from engines.spec import FleetStatus
from proxy import config, providers, registry
from proxy.app import make_transport
from proxy.capabilities import Finding, Folder
from proxy.config import Config, EndpointSettings, Loaded, ModelSettings, Secret
from proxy.errors import ConfigError, ProbeFailed, ServeError
from proxy.probe import probe
from proxy.registry import Endpoint, Model


class Wanted(msgspec.Struct, frozen=True):
    """What to ask. url: of a server that is in no configuration. key: the environment variable with its key.

    spend: tokens for trying out the context length. as_json: print findings instead of their lines.
    """

    model: str
    url: str | None = None
    key: str | None = None
    spend: int = 0
    as_json: bool = False


def main(
    file: Path, environ: Mapping[str, str], paths: StatePaths, wanted: Wanted, fleet: Callable[[], FleetStatus]
) -> None:
    """Ask, print and keep. fleet: asks the running server for its engines, where the model is one of them.

    Raises ConfigError, or ServeError where an endpoint does not answer.
    """
    loaded = _with_url(wanted, environ) if wanted.url else config.load(file, environ)
    providers.check(loaded)
    model = _model(registry.build(loaded.config, FleetStatus(version=0)), wanted.model)
    if loaded.config.models[model.name].engine:
        model = _model(registry.build(loaded.config, fleet()), model.name)
    endpoints = _each_subject(model)
    if not endpoints:
        raise ServeError(f"{model.name} is {model.state}, so it cannot be asked; see `polyvox engines list`")
    found = asyncio.run(_ask(endpoints, wanted, loaded))
    folder = Folder(paths.capabilities)
    for endpoint, finding in zip(endpoints, found, strict=True):
        folder.write(endpoint.subject, finding)
    if wanted.as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


def _model(known: registry.Registry, name: str) -> Model:
    target = known.aliases.get(name, known.models.get(name))
    if not isinstance(target, Model):
        raise ConfigError(f"there is no model {name!r}; there are {', '.join(known.models) or 'none'}")
    return target


def _each_subject(model: Model) -> list[Endpoint]:
    """Return the endpoints that are ready: of replicas, which are all the same, one."""
    return list({endpoint.subject: endpoint for endpoint in reversed(model.ready())}.values())[::-1]


async def _ask(endpoints: list[Endpoint], wanted: Wanted, loaded: Loaded) -> list[Finding]:
    return [await _ask_one(endpoint, wanted, loaded) for endpoint in endpoints]


async def _ask_one(endpoint: Endpoint, wanted: Wanted, loaded: Loaded) -> Finding:
    def say(line: str) -> None:
        click.echo(loaded.redact(f"{endpoint.name}: {line}"), err=wanted.as_json)

    transport = make_transport(endpoint.address)
    try:
        return await probe(endpoint, transport, say, spend=wanted.spend)
    except ProbeFailed as e:
        raise ServeError(loaded.redact(str(e))) from None
    finally:
        await transport.close()


def _with_url(wanted: Wanted, environ: Mapping[str, str]) -> Loaded:
    """Return a configuration of one server."""
    assert wanted.url
    if wrong := config.wrong_with_url(wanted.url):
        raise ConfigError(f"--url: {wrong}")
    if wanted.key and not environ.get(wanted.key):
        raise ConfigError(f"--key-env: the environment variable {wanted.key} is not set")
    key = Secret(environ[wanted.key]) if wanted.key else None
    only = EndpointSettings(base_url=wanted.url, api_key=key)
    hidden = ((key.reveal(), config.MASK),) if key else ()
    made = Config(models={wanted.model: ModelSettings(endpoints=(only,))})
    return Loaded(config=made, base=Path(), error=lambda _, message: ConfigError(f"--url: {message}"), secrets=hidden)
