"""`polyvox route PROMPT`: has a running server say how it would route a prompt, without running it."""

import sys
from pathlib import Path
from typing import Any

import click
import httpx2
import msgspec

from proxy import config
from proxy.commands.console import print_table
from proxy.errors import ConfigError, NoServer, ServeError

_TIMEOUT = 30.0  # seconds


class Question(msgspec.Struct, frozen=True):
    """What is asked, of which server. key: of a client, None for a server without keys. routing: see wishes.Wishes."""

    address: str
    key: str | None
    prompt: str
    model: str = "auto"
    routing: dict[str, Any] = {}


def first_key(file: Path) -> str | None:
    """Return a key that a configuration has for everything, None if it has none, or cannot be read."""
    try:
        keys = config.load(file).config.server.api_keys
    except ConfigError:
        return None
    return next((key.reveal() for key in keys if key.models is None), None)


def routing(
    task: str | None, complexity: str | None, budget: float | None, region: str | None, prefer: str | None
) -> dict[str, Any]:
    """Return the field `routing` of a body; what is wrong with it the server says."""
    said = {
        "task_type": task,
        "complexity": complexity and _number(complexity),
        "budget_limit": budget,
        "prefer": prefer,
        "requirements": {"region": region} if region else None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def ask(question: Question) -> dict[str, Any]:
    """Return the server's explanation. Raises ServeError with what it says where it refuses, NoServer."""
    body: dict[str, Any] = {"model": question.model, "messages": [{"role": "user", "content": question.prompt}]}
    if question.routing:
        body["routing"] = question.routing
    headers = {"authorization": f"Bearer {question.key}"} if question.key else {}
    url = f"{question.address.rstrip('/')}/v1/route"
    try:
        answer = httpx2.post(url, json=body, headers=headers, timeout=_TIMEOUT, trust_env=False)
    except (httpx2.HTTPError, httpx2.InvalidURL) as e:
        raise NoServer(f"no answer from {url}: {e}") from None
    if answer.status_code != 200:
        raise ServeError(f"the server refuses it: {_said(answer)}")
    found: dict[str, Any] = answer.json()
    return found


def _said(answer: httpx2.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def show(explained: dict[str, Any], *, as_json: bool) -> None:
    """Print an explanation."""
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(explained), indent=2) + b"\n")
        return
    needs = "; ".join(f"{name}: {_words(value)}" for name, value in explained["requirements"].items())
    click.echo(f"{explained['model'] or 'no model'}  ({explained['reason']})" + (f"; needs {needs}" if needs else ""))
    print_table(("MODEL", "SCORE", "USD", "HEALTH", "DROPPED"), [_cells(c) for c in explained["candidates"]])
    if explained["fallbacks"]:
        click.echo(f"if it fails: {', '.join(explained['fallbacks'])}")


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cells(candidate: dict[str, Any]) -> tuple[object, ...]:
    score, usd = candidate["score"], candidate["usd"]
    return (
        candidate["model"],
        None if score is None else f"{score:.3f}",
        None if usd is None else f"{usd:.6f}",
        candidate["health"],
        candidate["dropped"],
    )
