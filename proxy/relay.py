"""Bytes out: the answer of an endpoint on its way to the client, and one close() that settles everything."""

from collections.abc import AsyncIterator, Callable

from proxy import sse, wire
from proxy.balancer import Lease
from proxy.transport import Answer

_EVENT_STREAM = b"text/event-stream"
_JSON = b"application/json"
# Of an upstream's server: ours says its own, and its cookies, certificates and addresses are not for our clients.
_SERVERS_OWN = frozenset(
    (b"date", b"server", b"via", b"x-powered-by", b"set-cookie", b"location", b"alt-svc", b"x-request-id",
     b"strict-transport-security", b"www-authenticate", b"x-polyvox-model", b"x-polyvox-endpoint")
)  # fmt: skip
_DOCUMENT_LIMIT = 256 * 1024 * 1024


class Reply:
    """An answer ready to be sent: status, headers, and chunks of the body as they come."""

    def __init__(
        self,
        status: int,
        headers: list[tuple[bytes, bytes]],
        body: AsyncIterator[bytes],
        answer: Answer,
        lease: Lease,
    ) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.is_event_stream = content_type(headers).startswith(_EVENT_STREAM)
        # All mutable state: what must be given back, once.
        self._answer = answer
        self._lease = lease

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self._lease!r}>"

    async def close(self) -> None:
        """End the exchange, also in the middle, and give the lease back. May be called any number of times."""
        self._lease.release()
        await self._answer.close()


async def reply(answer: Answer, lease: Lease, rename: str | None) -> Reply:
    """Make the reply to a client. rename: the `model` to write into the answer, None to leave it alone.

    Without a new name every byte passes as it came. With one, an event stream passes event by event, and
    a JSON document whole; anything else passes untouched.
    """
    headers = [(name, value) for name, value in answer.headers if name not in _SERVERS_OWN]
    kind = content_type(headers)
    if rename is None or not kind.startswith((_EVENT_STREAM, _JSON)):
        return Reply(answer.status, headers, answer, answer, lease)
    if kind.startswith(_EVENT_STREAM):
        return Reply(answer.status, headers, _renamed_events(answer, rename), answer, lease)
    document = wire.set_model(await answer.read(_DOCUMENT_LIMIT), rename)
    return Reply(answer.status, with_length(headers, len(document)), _once(document), answer, lease)


def content_type(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the value of Content-Type in lower case, or b""."""
    return next((value.lower() for name, value in headers if name == b"content-type"), b"")


def with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Return headers with the Content-Length of another body."""
    others = [(name, value) for name, value in headers if name != b"content-length"]
    return [*others, (b"content-length", b"%d" % length)]


async def _renamed_events(answer: Answer, name: str) -> AsyncIterator[bytes]:
    rename = _renamer(name)
    events = sse.Events()
    async for data in answer:
        whole = events.feed(data)
        if whole:
            yield b"".join([sse.map_data(event, rename) for event in whole])
    if events.rest:
        yield events.rest


def _renamer(name: str) -> Callable[[bytes], bytes]:
    return lambda document: wire.set_model(document, name)


async def _once(document: bytes) -> AsyncIterator[bytes]:
    yield document
