"""`polyvox probe`: asks the endpoints of a model what they can do, and keeps that."""

import asyncio
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import msgspec
import yaml

from engines.paths import StatePaths
from engines.spec import FleetStatus
from proxy import config, providers, registry
from proxy.app import make_transport
from proxy.capabilities import Capabilities, Finding, Folder
from proxy.commands.noting import noted
from proxy.config import Config, EndpointSettings, Loaded, ModelSettings, Secret
from proxy.errors import ConfigError, ProbeFailed, ServeError
from proxy.probe import probe
from proxy.registry import Endpoint, Model, Preset


class Wanted(msgspec.Struct, frozen=True):
    """What to ask. url: of a server that is in no configuration. key: the environment variable with its key.

    spend: tokens for trying out the context length. as_json: print findings instead of their lines. write: put what was
    found into the configuration's file.
    """

    model: str
    url: str | None = None
    key: str | None = None
    spend: int = 0
    as_json: bool = False
    write: bool = False


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
    _keep(Folder(paths.capabilities), found)
    if wanted.write:
        lines = _write(file, environ, model.name, [found[e.subject].capabilities for e in model.ready()])
        click.echo("\n".join(f"{file}: {line}" for line in lines), err=wanted.as_json)
    if wanted.as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(list(found.values())), indent=2) + b"\n")


def _model(known: registry.Registry, name: str) -> Model:
    target = known.aliases.get(name, known.models.get(name))
    model = target.of if isinstance(target, Preset) else target
    if not isinstance(model, Model):
        raise ConfigError(f"there is no model {name!r}; there are {', '.join(known.models) or 'none'}")
    return model


def _each_subject(model: Model) -> list[Endpoint]:
    """Return the endpoints that are ready: of replicas, which are all the same, one."""
    return list({endpoint.subject: endpoint for endpoint in reversed(model.ready())}.values())[::-1]


def _write(file: Path, environ: Mapping[str, str], name: str, found: list[Capabilities]) -> list[str]:
    """Put what was found of the endpoints of a model into the file; return what to tell of it.

    Raises ConfigError where the file cannot have it, or is not to be written.
    """
    from proxy import editing  # it takes a while to import

    text = config.read(file)
    models = (yaml.safe_load(text) or {}).get("models") or {}
    if name not in models:
        raise ConfigError(f"{file}: there is no models.{name} in it to write to")
    settings, lines = noted(models[name], found)
    if not lines:
        return ["nothing is new"]
    changed = editing.put_model(text, name, settings)
    config.parse(changed, file, environ)
    editing.write(file, changed)
    return [f"models.{name}.{line}" for line in lines]


def _keep(folder: Folder, found: Mapping[str, Finding]) -> None:
    try:
        for subject, finding in found.items():
            folder.write(subject, finding)
    except OSError as e:
        raise ServeError(f"cannot write state to {e.filename}: {e.strerror}; give another --state-dir") from None


async def _ask(endpoints: list[Endpoint], wanted: Wanted, loaded: Loaded) -> dict[str, Finding]:
    """Return what was found, by subject."""
    return {endpoint.subject: await _ask_one(endpoint, wanted, loaded) for endpoint in endpoints}


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
