"""What `polyvox` shows on a terminal: tables, the progress of engines, the lines to paste."""

import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import msgspec
from rich import box
from rich.console import Console as Terminal
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from engines.spec import EngineStatus, FleetStatus
from proxy.config import Config
from proxy.figures import Condition

_COLOURS = {"ready": "green", "starting": "cyan", "draining": "yellow", "failed": "red", "stopped": "dim"}
_BAR = 20
_WIDE = 200  # characters of a line that nobody looks at as it is printed


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: drawn and coloured on a terminal, plain aligned columns elsewhere."""
    terminal = Terminal()
    if not terminal.is_terminal:
        terminal.width = max(terminal.width, _WIDE)
    table = Table(box=box.SIMPLE_HEAD if terminal.is_terminal else None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    terminal.print(table, soft_wrap=not terminal.is_terminal)


def show_endpoints(report: bytes) -> None:
    """Print what the workers of a server say of its endpoints: figures.Condition for each, as JSON."""
    rows = [
        (c.endpoint, _breaker(c), None if c.next_trial is None else f"{c.next_trial:.0f} s", c.opened, c.failed)
        for c in msgspec.json.decode(report, type=list[Condition])
    ]
    print_table(("ENDPOINT", "BREAKER", "NEXT TRIAL", "OPENED", "FAILED"), rows)


def _breaker(condition: Condition) -> str:
    worst = next(state for state in ("open", "half_open", "closed") if condition.workers[state])
    count, workers = condition.workers[worst], sum(condition.workers.values())
    return worst if count == workers else f"{worst} ({count} of {workers} workers)"


def _cell(value: object) -> str:
    text = "-" if value is None else escape(str(value))
    return f"[{_COLOURS[text]}]{text}[/]" if text in _COLOURS else text


class Console:
    """The voice of `polyvox serve`: a live table on a terminal, one line per step elsewhere."""

    def __init__(self) -> None:
        self._terminal = Terminal(stderr=True, highlight=False)
        # All mutable state: the live table, what was last said of each engine, and whether we said we are ready.
        self._live: Live | None = None
        self._said: dict[str, str] = {}
        self._announced = False

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line."""
        self._terminal.print(text, style=style, markup=False)

    async def follow(self, fleets: AsyncIterator[FleetStatus], address: str, config: Config) -> None:
        """Show the engines as they change; when all that start by themselves are ready, say how to use them."""
        self.say(f"Polyvox listens on {address}")
        try:
            async for fleet in fleets:
                self._show(fleet)
                if not self._announced and all(e.state in ("ready", "stopped") for e in fleet.engines):
                    self._announce(address, config, fleet)
        finally:
            self._stop_live()

    def _show(self, fleet: FleetStatus) -> None:
        busy = [e for e in fleet.engines if e.state in ("starting", "draining")]
        if self._terminal.is_terminal and busy:
            if self._live is None:
                self._live = Live(console=self._terminal, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(_EngineTable(fleet.engines))
        elif self._live:
            self._stop_live()
        for engine in fleet.engines:
            self._tell(engine)

    def _tell(self, engine: EngineStatus) -> None:
        """Print a line where the state of an engine, or off a terminal its step, has changed."""
        step = engine.detail if engine.state == "failed" or not self._terminal.is_terminal else ""
        told = f"{engine.state} {_words(step)}"
        if self._said.get(engine.id) == told:
            return
        self._said[engine.id] = told
        style = _COLOURS[engine.state]
        self._terminal.print(f"{escape(engine.id)}: [{style}]{engine.state}[/] {escape(step)}".rstrip())

    def _stop_live(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _announce(self, address: str, config: Config, fleet: FleetStatus) -> None:
        self._announced = True
        ready = next((e.model for e in fleet.engines if e.state == "ready"), next(iter(config.models), None))
        if ready:
            self._terminal.print(_how_to(address, ready, bool(config.server.api_keys)), markup=False, soft_wrap=True)


class _EngineTable:
    """Renders the engines anew at every refresh, so that the seconds run."""

    def __init__(self, engines: tuple[EngineStatus, ...]) -> None:
        self._engines = engines

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for e in self._engines:
            bar = "" if e.progress is None else _bar(e.progress)
            seconds = f"{time.time() - e.since:.0f} s"
            table.add_row(escape(e.id), f"[{_COLOURS[e.state]}]{e.state}[/]", bar, escape(e.detail), seconds)
        return table


def _bar(share: float) -> str:
    full = round(share * _BAR)
    return "━" * full + f"[dim]{'━' * (_BAR - full)}[/]"


def _words(step: str) -> str:
    """Return a step without its figures, so that a count that grows is not a new step."""
    return "".join(c for c in step if not c.isdigit())


def _how_to(address: str, model: str, keyed: bool) -> str:
    key = "$POLYVOX_API_KEY" if keyed else "none"
    header = f' -H "Authorization: Bearer {key}"' if keyed else ""
    python_key = 'os.environ["POLYVOX_API_KEY"]' if keyed else '"none"'
    return f"""
Ready. Ask it something:

  curl {address}/v1/chat/completions{header} -H "Content-Type: application/json" \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

or, with the OpenAI SDK (pip install openai):

{"import os" + chr(10) if keyed else ""}from openai import OpenAI
client = OpenAI(base_url="{address}/v1", api_key={python_key})
answer = client.chat.completions.create(
    model="{model}", messages=[{{"role": "user", "content": "What is the capital of France?"}}]
)
print(answer.choices[0].message.content)

Press Ctrl-C to stop.
"""


def show_cache(report: dict[str, Any] | None) -> None:
    """Print what the cache of answers holds and has done."""
    if report is None:
        print_table(("CACHE",), [("off",)])
        return
    rate = "-" if report["hit_rate"] is None else f"{report['hit_rate']:.1%}"
    names = ("entries", "bytes", "stored", "evicted", "hit", "joined", "miss", "bypass")
    print_table(
        (*map(str.upper, names), "HIT RATE"), [(*("-" if report[n] is None else report[n] for n in names), rate)]
    )


def fail(message: str, code: int) -> "SystemExit":
    """Print an error and return the exception that ends the program with an exit code."""
    Terminal(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return SystemExit(code)


def is_terminal() -> bool:
    """Say whether a person reads standard output."""
    return sys.stdout.isatty()
