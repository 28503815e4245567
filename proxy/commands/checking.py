"""`polyvox check`: what a configuration would do, without doing it."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import click

from engines.launcher import Launcher
from engines.memory import GIB, Plan, PlanRefused
from engines.paths import StatePaths
from engines.weights import WeightsSourceError
from proxy import config, providers
from proxy.cache import needs
from proxy.commands.console import print_table
from proxy.config import Loaded
from proxy.ensembles.settings import EnsembleSettings
from proxy.errors import ConfigError, ServeError
from proxy.naming import AliasSettings


def main(file: Path, environ: Mapping[str, str], paths: StatePaths) -> None:
    """Print the plan of a configuration. Raises ConfigError where it is wrong, ServeError where it does not fit."""
    loaded = config.load(file, environ)
    providers.check(loaded)
    needs.check(loaded)
    launcher = Launcher(paths, loaded.base)
    try:
        plan = launcher.plan(loaded.config.engines())
    except WeightsSourceError as e:
        raise ConfigError(f"{file}: {loaded.redact(str(e))}") from None
    except PlanRefused as e:
        raise ServeError(f"the engines do not fit on this machine:\n{loaded.redact(str(e))}") from None
    click.echo(f"{file}: valid")
    _print_remote(loaded)
    _print_engines(loaded, launcher)
    _print_memory(plan)


def _print_remote(loaded: Loaded) -> None:
    rows = [
        (name, e.provider, loaded.redact(e.base_url), e.model or name, "a key" if e.api_key else "no key")
        for name, model in loaded.config.models.items()
        for e in model.endpoints
    ]
    if rows:
        click.echo("\nEndpoints")
        print_table(("MODEL", "PROVIDER", "URL", "ITS NAME THERE", "WITH"), rows)
    if loaded.config.aliases:
        click.echo("\nAliases")
        print_table(("ALIAS", "MODEL"), [(name, _target(to)) for name, to in loaded.config.aliases.items()])
    if ensembles := loaded.config.ensembles:
        click.echo("\nEnsembles")
        told = [(name, e.strategy, _members(e), f"{e.quorum} of {len(e.members)}") for name, e in ensembles.items()]
        print_table(("ENSEMBLE", "STRATEGY", "MEMBERS", "QUORUM"), told)


def _target(to: str | AliasSettings) -> str:
    if isinstance(to, str):
        return to
    return f"{to.model}, as a preset" if to.any_of is None else f"any of {', '.join(to.any_of)}"


def _members(ensemble: EnsembleSettings) -> str:
    return ", ".join(f"{name} x {weight:g}" for name, weight in ensemble.members.items())


def _print_engines(loaded: Loaded, launcher: Launcher) -> None:
    for spec in loaded.config.engines():
        launch = launcher.preview(spec)
        environment = [f"{name}={shlex.quote(value)}" for name, value in launch.environment.items()]
        click.echo(f"\n{spec.id}")
        click.echo(loaded.redact("  " + " \\\n    ".join([*environment, *_flags_apart(launch.argv)])))


def _flags_apart(argv: tuple[str, ...]) -> list[str]:
    """Return a command line as lines, each flag with its values on one."""
    lines: list[str] = []
    for word in argv:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return lines


def _print_memory(plan: Plan) -> None:
    if not plan.rows:
        return
    click.echo("\nMemory (GiB)")
    rows = [
        (r.engine, r.device, _gib(r.weights), _gib(r.kv), _gib(r.overhead), _gib(r.total), f"{r.share:.0%}")
        for r in plan.rows
    ]
    print_table(("ENGINE", "DEVICE", "WEIGHTS", "KV CACHE", "OVERHEAD", "TOTAL", "OF WHAT THERE IS"), rows)


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f}"
