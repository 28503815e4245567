"""Answers of upstreams that are errors, and what a client may see of them.

1. 4xx says what is wrong with the client's request, and passes; of a server of others with our key struck out.
2. 5xx may hold paths, addresses or a traceback: status and Retry-After stay, the body is ours.
3. A redirect would name an address of the upstream, and is an error.
4. 401, 402, 403 and 407 of a server of others concern our key and account, not the client's.
5. 529 is what Anthropic calls overloaded; everybody else says 503.
"""

from collections.abc import AsyncIterator

from proxy.errors import BadGateway, MalformedAnswer, RequestError, UpstreamFailed
from proxy.registry import Endpoint
from proxy.relay import Reply
from proxy.transport import Answer

_OUR_KEY = frozenset((401, 402, 403, 407))
_OVERLOADED = 529
_LONGEST = 1024 * 1024  # bytes; an error that is longer is cut


def check(answer: Answer, endpoint: Endpoint) -> None:
    """Raise what the client is told instead, if the answer is an error that is not for it."""
    error = _instead(answer, of_others=endpoint.base_path is not None)
    if error is not None:
        raise error


def _instead(answer: Answer, *, of_others: bool) -> RequestError | None:
    if answer.status >= 500:  # 2
        status = 503 if answer.status == _OVERLOADED else answer.status  # 5
        return UpstreamFailed(status, _retry_after(answer))
    if 300 <= answer.status < 400:  # 3
        return BadGateway("The upstream answered with a redirect, which is not followed.")
    if of_others and answer.status in _OUR_KEY:  # 4
        return BadGateway("The upstream does not take the credentials of this server.")
    return None


def _retry_after(answer: Answer) -> int | None:
    value = next((value for name, value in answer.headers if name == b"retry-after"), b"")
    return int(value) if value.isdigit() and len(value) < 7 else None


def mask(reply: Reply, endpoint: Endpoint) -> Reply:
    """Strike our key out of the body of an error."""
    if endpoint.api_key is not None:
        reply.body = _masked(reply.body, endpoint.api_key.reveal().encode())
    return reply


async def _masked(body: AsyncIterator[bytes], key: bytes) -> AsyncIterator[bytes]:
    text = b""
    async for data in body:
        text += data
        if len(text) > _LONGEST:
            raise MalformedAnswer("an error that is too long")
    yield text.replace(key, b"*" * len(key))  # of the same length, which the head has announced
