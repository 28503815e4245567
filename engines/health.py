"""Asking an engine how it is, and reading its answers: readiness, gauges, and the lines it logs while it loads."""

import asyncio
import contextlib
import re
from collections.abc import Iterable
from typing import Final

import httpx2
import msgspec

# The host name means nothing on a unix socket, but HTTP wants one.
_UNIX_BASE: Final = "http://engine"


class Answer(msgspec.Struct, frozen=True):
    """What a ready engine says of itself. dead: its own /health says that it cannot go on."""

    answered: bool
    dead: bool = False
    in_flight: float = 0.0
    iterations: float = 0.0


class Step(msgspec.Struct, frozen=True):
    """A step of loading, for a person. progress: share of this step done, 0 to 1, where the engine tells."""

    detail: str
    progress: float | None = None


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class _About(msgspec.Struct):
    version: str | None = None


class Probe:
    """Asks one engine. Nothing here raises for an engine that does not answer."""

    def __init__(self, address: str, model: str, timeout: float = 5.0) -> None:
        # Mutable: the connection pool of the client.
        self._address, self._model = address, model
        path = address.removeprefix("unix:") if address.startswith("unix:") else None
        transport = httpx2.AsyncHTTPTransport(uds=path, verify=False)  # no TLS to set up
        base = _UNIX_BASE if path else address
        self._client = httpx2.AsyncClient(transport=transport, base_url=base, timeout=timeout, trust_env=False)

    def __repr__(self) -> str:
        return f"Probe({self._address!r}, model={self._model!r})"

    async def aclose(self) -> None:
        await self._client.aclose()

    async def card(self) -> _Card | None:
        """Return the engine's entry for the model if it is ready: healthy, and the model is listed."""
        with contextlib.suppress(httpx2.HTTPError, msgspec.DecodeError):
            if (await self._client.get("/health")).status_code == 200:
                cards = msgspec.json.decode((await self._client.get("/v1/models")).content, type=_Cards)
                return next((card for card in cards.data if card.id == self._model), None)
        return None

    async def version(self) -> str | None:
        """Return the version of the engine's server, None where it does not tell."""
        with contextlib.suppress(httpx2.HTTPError, msgspec.DecodeError):
            return msgspec.json.decode((await self._client.get("/version")).content, type=_About).version
        return None

    async def look(self) -> Answer:
        """Return how a ready engine is now."""
        try:
            health, metrics = await asyncio.gather(self._client.get("/health"), self._client.get("/metrics"))
        except httpx2.HTTPError:
            return Answer(answered=False)
        if health.status_code == 503:
            return Answer(answered=True, dead=True)
        if metrics.status_code != 200:
            return Answer(answered=False)
        return read_metrics(metrics.text)

    async def generate(self, timeout: float) -> bool:
        """Have the engine generate one token; False where it does not do such a thing.

        A hung engine does not answer: this returns after `timeout` seconds at the latest.
        """
        body = {"model": self._model, "prompt": "a", "max_tokens": 1}
        try:
            answer = await self._client.post("/v1/completions", json=body, timeout=timeout)
        except httpx2.HTTPError:
            return True
        return not 400 <= answer.status_code < 500


def read_metrics(text: str) -> Answer:
    """Read the figures that matter from a /metrics page, summed over the engine's ranks."""
    values = dict.fromkeys(_METRICS, 0.0)
    for line in text.splitlines():
        if line.startswith(_METRICS):
            name = re.split(r"[{ ]", line, maxsplit=1)[0]
            if name in values:
                values[name] += _number(line.rpartition(" ")[2])
    running, waiting, count, total = (values[name] for name in _METRICS)
    return Answer(answered=True, in_flight=running + waiting, iterations=count + total)


_METRICS: Final = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:iteration_tokens_total_count",
    "vllm:iteration_tokens_total_sum",
)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


# What vLLM logs as it loads, in order, and what to call it. The last line that matches tells where it is.
_STEPS: Final = tuple(
    (re.compile(pattern), detail)
    for pattern, detail in (
        (r"==== polyvox: engine starts", "starting Python"),
        (r"non-default args", "reading the model's configuration"),
        (r"Resolved architecture", "starting the engine core"),
        (r"Starting to load model", "loading weights"),
        (r"Loading \S+ checkpoint shards: +(?P<percent>\d+)%", "loading weights"),
        (r"Loading weights took|[Mm]odel loading took", "weights loaded"),
        (r"Dynamo bytecode|Compiling a graph", "compiling"),
        (r"KV cache (size|memory)|for KV cache", "making the KV cache, warming up"),
        (r"Capturing CUDA graphs[^%]*?(?P<percent>\d+)%|[Cc]apturing CUDA graphs", "capturing CUDA graphs"),
        (r"init engine .* took", "warmed up"),
        (r"Starting vLLM", "opening its socket"),
    )
)


def loading_step(lines: Iterable[str]) -> Step:
    """Tell from the lines of an engine's log what it is doing."""
    step = Step("starting Python")
    for line in lines:
        for pattern, detail in _STEPS:
            if match := pattern.search(line):
                percent = match.groupdict().get("percent")
                step = Step(detail, None if percent is None else int(percent) / 100)
    return step
