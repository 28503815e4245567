"""The `polyvox` command. Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 no server answers."""

import asyncio
import atexit
import gc
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from engines.paths import StatePaths
from proxy.errors import ConfigError, NoServer, ServeError

FAILED, USAGE, UNREACHABLE = 1, 2, 3


def _state_options(command: Callable[..., Any]) -> Callable[..., Any]:
    state = click.option(
        "--state-dir",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="POLYVOX_STATE_DIR",
        help="Keep all state (environments, weights, logs, sockets) here instead of in the XDG folders.",
    )
    data = click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="POLYVOX_DATA_DIR",
        help="Keep environments and weights here; servers may share them.",
    )
    return state(data(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="polyvox", prog_name="polyvox")
def main() -> None:
    """Many models, one OpenAI API: local vLLM engines first, clouds when needed."""
    # What was imported is not searched for garbage once more at the end: that was half of the time of a server's stop.
    atexit.register(gc.freeze)


@main.command()
@click.option("--config", "-c", type=click.Path(path_type=Path), envvar="POLYVOX_CONFIG", help="Configuration file.")
@click.option("--host", help="Address to listen on [default: server.host, 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on [default: server.port, 8000].")
@click.option("--workers", type=click.IntRange(1, 256), help="Proxy processes [default: server.workers, 1].")
@_state_options
def serve(
    config: Path | None,
    host: str | None,
    port: int | None,
    workers: int | None,
    state_dir: Path | None,
    data_dir: Path | None,
) -> None:
    """Run the engines and the proxy until Ctrl-C or SIGTERM.

    Without --config: ./polyvox.yaml, then $XDG_CONFIG_HOME/polyvox/polyvox.yaml, then the embedded default,
    which runs one small model and needs no account, key or GPU.
    """
    flags = {"POLYVOX_SERVER__HOST": host, "POLYVOX_SERVER__PORT": port, "POLYVOX_SERVER__WORKERS": workers}
    environ = {**os.environ, **{name: str(value) for name, value in flags.items() if value is not None}}
    from proxy import launch

    paths = StatePaths.resolve(state_dir, data_dir)
    _finish(lambda: launch.main(config or default_config(), environ, paths))


@main.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_state_options
def check(file: Path | None, state_dir: Path | None, data_dir: Path | None) -> None:
    """Validate a configuration; show every engine's command line and the memory plan. Starts nothing."""
    from proxy.commands import checking

    paths = StatePaths.resolve(state_dir, data_dir)
    _finish(lambda: checking.main(file or default_config(), os.environ, paths))


@main.command(hidden=True)
def schema() -> None:
    """Print the JSON schema of the configuration."""
    import json

    from proxy.config import schema

    click.echo(json.dumps(schema(), indent=2))


@main.group()
def engines() -> None:
    """See and steer the engines of a running server."""


@engines.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the supervisor's report as JSON.")
@_state_options
def list_engines(as_json: bool, state_dir: Path | None, data_dir: Path | None) -> None:
    """List every engine with its state."""
    import msgspec

    fleet = _fleet(state_dir, data_dir)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(fleet), indent=2))
    else:
        _show(fleet)


def _steering(name: str, doc: str) -> None:
    @engines.command(name, help=doc)
    @click.argument("model")
    @click.option("--replica", type=click.IntRange(0), help="Only this replica [default: all of the model].")
    @click.option("--wait", is_flag=True, help="Return when it is done, not when it has begun.")
    @_state_options
    def command(model: str, replica: int | None, wait: bool, state_dir: Path | None, data_dir: Path | None) -> None:
        _show(_ask(state_dir, data_dir, lambda client: getattr(client, name)(model, replica=replica, wait=wait)))


_steering("load", "Start a model's engines.")
_steering("unload", "Let a model's engines finish what they do, then stop them and free their memory.")
_steering("restart", "Stop a model's engines and start them again; a failed one gets a fresh chance.")


@engines.command()
@click.argument("engine")
@click.option("--lines", "-n", type=click.IntRange(0), default=200, show_default=True, help="Last lines to print.")
@click.option("--follow", "-f", is_flag=True, help="Go on with new lines as they come.")
@_state_options
def logs(engine: str, lines: int, follow: bool, state_dir: Path | None, data_dir: Path | None) -> None:
    """Print the log of ENGINE: MODEL/REPLICA, or a model, which means its first replica."""

    async def print_log(client: Any) -> None:
        ids = [e.id for e in (await client.fleet()).engines if engine == e.model]
        async for text in client.logs(ids[0] if ids else engine, lines=lines, follow=follow):
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()

    _ask(state_dir, data_dir, print_log)


@main.command()
@_state_options
def reload(state_dir: Path | None, data_dir: Path | None) -> None:
    """Have a running server follow its configuration file as it is now, without dropping a request.

    Prints what has changed. A file with an error is refused (exit status 2), and the server goes on as it was.
    """
    import msgspec

    from proxy.reloading import Applied

    applied = msgspec.json.decode(_ask(state_dir, data_dir, lambda client: client.service("reload")), type=Applied)
    click.echo(f"configuration {applied.generation}: {applied.changes}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_state_options
def endpoints(as_json: bool, state_dir: Path | None, data_dir: Path | None) -> None:
    """List every endpoint of a running server with its circuit breaker.

    Each worker has a breaker of its own: the state is that of most concern, with the number of workers that have it.
    """
    report = _ask(state_dir, data_dir, lambda client: client.report("endpoints"))
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(report, indent=2))
    else:
        from proxy.commands.console import show_endpoints

        show_endpoints(report)


@main.command()
@click.argument("model")
@click.option("--config", "-c", type=click.Path(path_type=Path), envvar="POLYVOX_CONFIG", help="Configuration file.")
@click.option(
    "--url", help="Ask the server at this URL, as http://HOST:PORT/v1, where MODEL is its name for the model."
)
@click.option("--key-env", metavar="NAME", help="The environment variable with the key for --url.")
@click.option(
    "--context-spend",
    type=click.IntRange(0),
    default=100_000,
    show_default=True,
    help="Tokens for trying out the context length of a server that does not say it; 0: do not.",
)
@click.option("--write", is_flag=True, help="Put into the configuration's file what it does not say of that yet.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON; progress goes to stderr.")
@_state_options
def probe(  # noqa: PLR0913
    model: str,
    config: Path | None,
    url: str | None,
    key_env: str | None,
    context_spend: int,
    write: bool,
    as_json: bool,
    state_dir: Path | None,
    data_dir: Path | None,
) -> None:
    """Ask what MODEL's server can do with it, and keep that.

    MODEL is a model or alias of the configuration. Its endpoints are asked some twenty short questions, past the
    proxy. Engines must run. A running server uses what is found within a second or two; see `polyvox models`.
    """
    from proxy.commands import probing

    if key_env and not url:
        raise click.UsageError("--key-env goes with --url")
    if url and write:
        raise click.UsageError("--write does not go with --url: the server is in no configuration")
    wanted = probing.Wanted(model, url, key_env, context_spend, as_json, write)
    paths = StatePaths.resolve(state_dir, data_dir)
    file = config or default_config()
    _finish(lambda: probing.main(file, os.environ, paths, wanted, lambda: _fleet(state_dir, data_dir)))


@main.command()
@click.option("--config", "-c", type=click.Path(path_type=Path), envvar="POLYVOX_CONFIG", help="Configuration file.")
@click.option("--json", "as_json", is_flag=True, help="Print the models as JSON.")
@_state_options
def models(config: Path | None, as_json: bool, state_dir: Path | None, data_dir: Path | None) -> None:
    """List the models of a configuration: kind, context, what they can do as far as it was found out, price.

    The server need not run; if it does, its engines are asked for their state.
    """
    from engines.control_client import ControlUnreachable
    from proxy.commands import listing

    paths = StatePaths.resolve(state_dir, data_dir)

    def show() -> None:
        try:
            fleet = asyncio.run(_put(state_dir, data_dir, lambda client: client.fleet()))
        except ControlUnreachable:
            fleet = None
        listing.main(config or default_config(), os.environ, paths, fleet, as_json=as_json)

    _finish(show)


class _Route(click.Group):
    """A group whose first word may be a prompt instead of a command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = args and args[0] in self.commands
        return super().resolve_command(ctx, args if known else ["explain", *args])


@main.group(
    cls=_Route,
    invoke_without_command=True,
    subcommand_metavar="[PROMPT | fit LABELS]",
    context_settings={"ignore_unknown_options": True},  # those of PROMPT may stand before it
)
@click.option(
    "--score", metavar="PROMPTS", help="Print the complexity, 0 to 1, of each prompt of this file; - for stdin."
)
@click.option("--model", help="With --score: a file made by `fit`. With PROMPT: the name to ask for [default: auto].")
@click.pass_context
def route(context: click.Context, score: str | None, model: str | None) -> None:
    """Ask the running server how it would route PROMPT; see how hard prompts are; learn that from your own labels.

    PROMPTS has a JSON object a line, with the text under `prompt`. It needs no server, and neither does `fit`.
    """
    if context.invoked_subcommand is not None:
        if score is not None or (model is not None and context.invoked_subcommand != "explain"):
            raise click.UsageError("--score and --model do not go with a subcommand")
        context.obj = model
        return
    if score is None:
        raise click.UsageError("give a PROMPT, --score PROMPTS, or a subcommand")
    from proxy.commands import scoring

    _finish(lambda: scoring.print_scores(score, Path(model) if model else None))


@route.command("explain")
@click.argument("prompt")
@click.option("--model", help="The name to ask for [default: auto].")
@click.option("--task", help="The task, instead of the one that is read from the prompt.")
@click.option("--complexity", help="0 to 1, or simple, medium, complex, instead of what is read from the prompt.")
@click.option("--budget", type=float, help="USD that the answer may cost.")
@click.option("--region", help="Where the model must run.")
@click.option("--prefer", help="balanced, cost, quality, speed or order.")
@click.option("--json", "as_json", is_flag=True, help="Print the explanation as JSON, as POST /v1/route does.")
@click.option("--url", envvar="POLYVOX_URL", help="Address of the server [default: the one that runs here].")
@click.option("--api-key", envvar="POLYVOX_API_KEY", help="One of its keys [default: the first of the configuration].")
@click.option("--config", "-c", type=click.Path(path_type=Path), envvar="POLYVOX_CONFIG", help="Configuration file.")
@_state_options
@click.pass_obj
def explain_route(
    given: str | None,
    /,
    prompt: str,
    model: str | None,
    as_json: bool,
    config: Path | None,
    state_dir: Path | None,
    data_dir: Path | None,
    **said: Any,
) -> None:
    """Show which model of the running server would answer PROMPT, every candidate, its score, why it was dropped."""
    from proxy.commands import explaining

    address = said.pop("url") or _address(state_dir, data_dir)
    key = said.pop("api_key") or explaining.first_key(config or default_config())
    question = explaining.Question(address, key, prompt, model or given or "auto", explaining.routing(**said))
    _finish(lambda: explaining.show(explaining.ask(question), as_json=as_json))


def _address(state_dir: Path | None, data_dir: Path | None) -> str:
    """Return where the server listens that runs here."""
    import msgspec

    return str(msgspec.json.decode(_ask(state_dir, data_dir, lambda client: client.report("address"))))


@route.command("fit")
@click.argument("labels", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="complexity.json", show_default=True)
@click.option(
    "--strong-share", type=click.FloatRange(0, 1), help="Share of strong calls to calibrate for [default: 0.5]."
)
@click.option("--cost", type=float, help="Or what a call may cost in the mean; needs --prices.")
@click.option("--prices", type=(float, float), metavar="WEAK STRONG", help="What a call of each model costs.")
def fit_route(
    labels: Path, out: Path, strong_share: float | None, cost: float | None, prices: tuple[float, float] | None
) -> None:
    """Fit the model of complexity to your LABELS, and calibrate the threshold for strong calls.

    LABELS has a JSON object a line: `prompt`, and `weak` and `strong`, 1 where that model was right and 0 where not.
    """
    from proxy.commands import scoring

    _finish(lambda: scoring.fit(labels, out, scoring.Target(strong_share, cost, prices)))


@main.group()
def cache() -> None:
    """See and empty the cache of answers of a running server."""


@cache.command("stats")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@_state_options
def cache_stats(as_json: bool, state_dir: Path | None, data_dir: Path | None) -> None:
    """Show what all workers keep, and how often they answered from it."""
    import msgspec

    report = _ask(state_dir, data_dir, lambda client: client.service("cache"))
    if as_json:
        click.echo(msgspec.json.format(report, indent=2))
    else:
        from proxy.commands.console import show_cache

        show_cache(msgspec.json.decode(report))


@cache.command("purge")
@click.option("--model", default="", help="Only answers of this model [default: of all].")
@click.option("--key-prefix", default="", help="Only answers whose x-polyvox-cache-key begins like this.")
@_state_options
def purge_cache(model: str, key_prefix: str, state_dir: Path | None, data_dir: Path | None) -> None:
    """Drop answers, also those that are being made. The first 16 digits of a key are the id of an API key."""
    import msgspec

    asked = {"model": model, "key_prefix": key_prefix}
    answer = _ask(state_dir, data_dir, lambda client: client.service("purge-cache", asked))
    click.echo(f"{msgspec.json.decode(answer)['purged']} answers dropped")


@main.command()
@click.option("--config", "-c", type=click.Path(path_type=Path), envvar="POLYVOX_CONFIG", help="Configuration file.")
@click.option("--since", default="", help="A day (2026-01-31), a time, or how long ago (24h, 7d).")
@click.option("--until", default="", help="The same; what is later is left out.")
@click.option("--by", default="model", type=click.Choice(("model", "key", "alias", "day")), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, as GET /v1/usage does.")
@_state_options
def usage(
    config: Path | None,
    since: str,
    until: str,
    by: str,
    as_json: bool,
    state_dir: Path | None,
    data_dir: Path | None,
) -> None:
    """Report requests, tokens and USD from the ledger, and what they would have cost on the most expensive model.

    The server need not run. Requests reach the ledger within a few seconds.
    """
    from proxy.commands import reporting

    asked = {"since": since, "until": until, "group_by": by}
    paths = StatePaths.resolve(state_dir, data_dir)
    _finish(lambda: reporting.main(config or default_config(), os.environ, paths, asked, as_json=as_json))


def default_config() -> Path:
    """Return the configuration to use when none is named."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    here = Path(__file__).parent
    embedded = [here / "shipped/polyvox.yaml", here.parent / "config/polyvox.yaml"]
    candidates = [Path("polyvox.yaml"), home / "polyvox/polyvox.yaml", *embedded]
    return next((path for path in candidates if path.is_file()), embedded[-1])


def _ask(state_dir: Path | None, data_dir: Path | None, question: Callable[[Any], Awaitable[Any]]) -> Any:
    """Put a question to the running server's supervisor; say so where there is none."""
    from engines.control_client import ControlRefused, ControlUnreachable
    from proxy.commands.console import fail

    try:
        return asyncio.run(_put(state_dir, data_dir, question))
    except ControlUnreachable as e:
        raise fail(str(e), UNREACHABLE) from None
    except ControlRefused as e:
        raise fail(str(e), USAGE if e.code == "invalid_configuration" else FAILED) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


async def _put(state_dir: Path | None, data_dir: Path | None, question: Callable[[Any], Awaitable[Any]]) -> Any:
    from engines.control_client import ControlClient

    async with ControlClient(StatePaths.resolve(state_dir, data_dir).control_socket) as client:
        return await question(client)


def _fleet(state_dir: Path | None, data_dir: Path | None) -> Any:
    return _ask(state_dir, data_dir, lambda client: client.fleet())


def _show(fleet: Any) -> None:
    import time

    from proxy.commands.console import print_table

    rows = [
        (e.id, e.state, f"{time.time() - e.since:.0f} s", e.restarts, e.context_length, e.pid, e.detail)
        for e in fleet.engines
    ]
    print_table(("ENGINE", "STATE", "FOR", "RESTARTS", "CONTEXT", "PID", "DETAIL"), rows)


def _finish(run: Callable[[], None]) -> None:
    from proxy.commands.console import fail

    try:
        run()
    except ConfigError as e:
        raise fail(str(e), USAGE) from None
    except NoServer as e:
        raise fail(str(e), UNREACHABLE) from None
    except ServeError as e:
        raise fail(str(e), FAILED) from None


if __name__ == "__main__":
    main()
