"""One way to ask an endpoint: through its provider, as clients' requests go, and past everything that counts those."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from proxy import prompts, providers, sse, wire
from proxy.errors import RequestError, UpstreamError
from proxy.providers import Asked
from proxy.providers.headers import authorization
from proxy.registry import Endpoint
from proxy.transport import Answer, Headers, Timeouts, Transport, content_type

_TIMEOUTS = Timeouts(connect=5.0, first_byte=300.0, between_bytes=60.0)  # some load a model when it is first asked for
_TOO_MANY = 429
_LARGEST = 4 * 1024 * 1024  # bytes of an answer
_CHAT = "/v1/chat/completions"
_REQUEST_ID = b"polyvox-probe"
_TRIES = 3  # of a question that the server failed at, or was too busy for
_LONGEST_WAIT = 20.0  # seconds, whatever a server that is too busy says

# How a request may be limited. Models that reason have other names for it, and one temperature.
_MANNERS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 24, "temperature": 0},
    {"max_completion_tokens": 2048},
    {"max_tokens": 24},
)


class Said(msgspec.Struct, frozen=True):
    """An answer. status: 0 where there was none. problem: what went wrong, for a person. wait: seconds, if it was busy.

    events: those of a stream, with the time of each, by the monotonic clock.
    """

    status: int
    body: dict[str, Any] = {}
    events: tuple[tuple[float, dict[str, Any]], ...] = ()
    problem: str = ""
    wait: float = 0.0

    @property
    def taken(self) -> bool:
        return self.status == 200

    @property
    def refused(self) -> bool:
        """Whether the server knows that it does not do this; not whether it was busy, or gone."""
        return 400 <= self.status < 500 and self.status not in (408, 429)

    @property
    def failed(self) -> bool:
        """Whether the server broke at it, though it is there."""
        return self.status in (500, 501, 505)

    @property
    def choice(self) -> dict[str, Any]:
        match self.body:
            case {"choices": [dict(choice), *_]}:
                return choice
        return {}

    @property
    def message(self) -> dict[str, Any]:
        match self.choice:
            case {"message": dict(message)}:
                return message
        return {}

    @property
    def text(self) -> str:
        content = self.message.get("content")
        return content if isinstance(content, str) else ""

    @property
    def prompt_tokens(self) -> int | None:
        match self.body:
            case {"usage": {"prompt_tokens": int(tokens)}} if tokens > 0:
                return tokens
        return None


class Asker:
    """Puts questions to one endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        transport: Transport,
        ready: Callable[[], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        """ready: awaited before each request."""
        self.endpoint = endpoint
        self._transport = transport
        self._ready = ready
        self._clock = clock
        self._provider = providers.named(endpoint.provider)
        # All mutable state: how its requests are limited, and what it answered to the first.
        self._manners = _MANNERS[0]
        self.first = Said(0)

    def __repr__(self) -> str:
        return f"<Asker of {self.endpoint.name}>"

    async def introduce(self) -> Said:
        """Ask something plain, in each of the ways to limit it until one is taken; return the answer to the last."""
        for manners in _MANNERS:
            self._manners = manners
            self.first = await self.chat(user("Say hello."))
            if not self.first.refused or self.first.status in (401, 403, 404):
                break
        return self.first

    async def chat(self, *messages: dict[str, Any], longest: int | None = None, **fields: Any) -> Said:
        """Ask for an answer. longest: tokens that it may have. fields: of the request, beside the usual."""
        limits = dict(self._manners)
        if longest is not None and "max_tokens" in limits:
            limits["max_tokens"] = longest
        body = {"model": self.endpoint.serves, "messages": messages, **limits, **fields}
        said = Said(0)
        for _ in range(_TRIES):
            said = await self._post(_CHAT, wire.encode(body))
            if not said.failed and said.status != _TOO_MANY:
                break
            await asyncio.sleep(said.wait)
        return said

    async def get(self, path: str) -> Said:
        """Ask for a document of the server, by its own path."""
        return await self._exchange(b"GET", path.encode(), authorization(self.endpoint), b"", None)

    async def _post(self, path: str, body: bytes) -> Said:
        headers = [(b"content-type", b"application/json"), (b"accept", b"application/json")]
        asked = Asked(path, b"", headers, body, wire.read_json(body), _REQUEST_ID)
        try:
            sent = self._provider.request(self._adapted(asked), self.endpoint)
        except RequestError as e:
            return Said(e.status, problem=str(e))
        return await self._exchange(b"POST", sent.path, sent.headers, sent.body, asked)

    def _adapted(self, asked: Asked) -> Asked:
        """Keep to the ranges of the model, and leave the rest of its adapter out: that is what is to be found."""
        if self.endpoint.adapter is None:
            return asked
        plain = msgspec.structs.replace(self.endpoint.adapter, merge_system=False, alternate=False, images=True)
        return msgspec.structs.replace(asked, body=prompts.adapt(asked.path, asked.body, plain).body)

    async def _exchange(self, method: bytes, path: bytes, headers: Headers, body: bytes, asked: Asked | None) -> Said:
        await self._ready()
        try:
            answer = await self._transport.send(method, path, headers, body, _TIMEOUTS)
            try:
                translated = self._provider.answer(answer, asked, self.endpoint) if asked else answer
                return await self._read(translated)
            finally:
                await answer.close()
        except RequestError as e:
            return Said(e.status, problem=str(e))
        except UpstreamError as e:
            return Said(0, problem=f"{type(e).__name__}: {e}")

    async def _read(self, answer: Answer) -> Said:
        if answer.status == 200 and content_type(answer.headers).lower().startswith(b"text/event-stream"):
            return Said(200, events=await self._events(answer))
        body = _object(await answer.read(_LARGEST))
        problem = "" if answer.status == 200 else _problem(answer.status, body)
        wait = _wait(answer.headers) if answer.status == _TOO_MANY else 0.0
        return Said(answer.status, body, problem=problem, wait=wait)

    async def _events(self, answer: Answer) -> tuple[tuple[float, dict[str, Any]], ...]:
        events, seen = sse.Events(), []
        async for data in answer:
            now = self._clock()
            seen += [(now, event) for raw in events.feed(data) if (event := _object(sse.data_of(raw)))]
        return tuple(seen)


def user(content: Any) -> dict[str, Any]:
    """Make a message of the user."""
    return {"role": "user", "content": content}


def _object(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = msgspec.json.decode(data)
        return found if isinstance(found, dict) else {}
    return {}


def _wait(headers: Headers) -> float:
    """Return the seconds that a server asks to be left alone for; two if it does not say."""
    said = next((value for name, value in headers if name == b"retry-after"), b"2")
    return min(float(said), _LONGEST_WAIT) if said.isdigit() else _LONGEST_WAIT


def _problem(status: int, body: dict[str, Any]) -> str:
    """Return what an error says, in its first line."""
    error = body.get("error", body)
    message = error.get("message") if isinstance(error, dict) else error
    first = str(message or "").strip().splitlines()
    return f"status {status}" + (f": {first[0][:300]}" if first else "")
