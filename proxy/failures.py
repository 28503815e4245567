"""What went wrong at an endpoint: what it says of the endpoint, where to go from there, and what a client may see.

Answers that are errors:

1. 4xx says what is wrong with the client's request, and passes; of a server of others with our key struck out.
2. 5xx may hold paths, addresses or a traceback: status and Retry-After stay, the body is ours.
3. A redirect would name an address of the upstream, and is an error.
4. 401, 402, 403 and 407 of a server of others concern our key and account, not the client's.
5. 529 is what Anthropic calls overloaded; everybody else says 503.
"""

import math
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import msgspec

from proxy.breaker import Outcome
from proxy.errors import (
    BadGateway,
    BadRequest,
    ConnectFailed,
    ConnectTimeout,
    EngineStopped,
    ErrorEvent,
    InvalidRequest,
    NotReady,
    PathNotServed,
    PoolTimeout,
    RequestError,
    TooBusy,
    TruncatedAnswer,
    Unavailable,
    UpstreamError,
    UpstreamFailed,
)
from proxy.registry import Endpoint
from proxy.transport import Answer

_OUR_KEY = frozenset((401, 402, 403, 407))
_OVERLOADED = 529
_BUSY = frozenset((408, 425, 429))
_PASSING = frozenset((502, 503))  # what those answer whose engine is being started, or has too much to do
_LONGEST_REST = 7 * 24 * 3600  # seconds
_NEVER = frozenset((501, 505))  # what the client wants is not there; it could break every breaker with it


class _Error(msgspec.Struct):
    code: int | str | None = None


class _Event(msgspec.Struct):
    error: _Error


_decode_event = msgspec.json.Decoder(_Event).decode


class Verdict(NamedTuple):
    """What a failure means.

    outcome: for the breaker. elsewhere: another endpoint may do better. again: so may this one, in a moment. sent: the
    endpoint has had work with it.
    """

    outcome: Outcome
    elsewhere: bool = True
    again: bool = False
    sent: bool = True


_FAILED = Verdict(Outcome.FAILURE)
_FINAL = Verdict(Outcome.NEUTRAL, elsewhere=False)
BUSY = Verdict(Outcome.NEUTRAL)  # it has too much to do, or does not want us
_PASSES = Verdict(Outcome.FAILURE, again=True)
_NOT_NOW = Verdict(Outcome.NEUTRAL, sent=False)
_OF_ERRORS: dict[type[Exception], Verdict] = {
    InvalidRequest: _FINAL,
    ConnectFailed: Verdict(Outcome.FAILURE, again=True, sent=False),
    ConnectTimeout: Verdict(Outcome.FAILURE, sent=False),
    PoolTimeout: Verdict(Outcome.NEUTRAL, sent=False),  # it is we who have no connection left
    TruncatedAnswer: _PASSES,
    UpstreamError: _FAILED,
    BadGateway: BUSY,
    **dict.fromkeys((TooBusy, NotReady, EngineStopped, Unavailable), _NOT_NOW),
    RequestError: _FINAL,
}


def verdict(error: Exception, *, of_chain: bool = False) -> Verdict:
    """Judge what was raised on the way to an endpoint and back.

    of_chain: the endpoint is not one of the model that was asked for; what it cannot be asked, others may.
    """
    if of_chain and isinstance(error, (BadRequest, PathNotServed)):
        return _NOT_NOW
    if isinstance(error, ErrorEvent) and status_of(error):
        return _FINAL
    if isinstance(error, UpstreamFailed):
        if error.status in _NEVER:
            return _FINAL
        if error.retry_after:
            return BUSY
        return _PASSES if error.status in _PASSING else _FAILED
    return next(_OF_ERRORS[kind] for kind in type(error).__mro__ if kind in _OF_ERRORS)


def status_of(error: ErrorEvent) -> int | None:
    """Return the status of an error that a stream told of, where it is the client's; None otherwise."""
    try:
        code = _decode_event(error.document).error.code
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return code if isinstance(code, int) and 400 <= code < 500 and not is_busy(code) else None


def is_busy(status: int) -> bool:
    """Say whether a status asks to come again later, which another endpoint need not."""
    return status in _BUSY


def check(answer: Answer, endpoint: Endpoint) -> None:
    """Raise what the client is told instead, if the answer is an error that is not for it."""
    error = _instead(answer, of_others=endpoint.base_path is not None)
    if error is not None:
        raise error


def _instead(answer: Answer, *, of_others: bool) -> RequestError | None:
    if answer.status >= 500:  # 2
        status = 503 if answer.status == _OVERLOADED else answer.status  # 5
        return UpstreamFailed(status, retry_after(answer.headers))
    if 300 <= answer.status < 400:  # 3
        return BadGateway("The upstream answered with a redirect, which is not followed.")
    if of_others and answer.status in _OUR_KEY:  # 4
        return BadGateway("The upstream does not take the credentials of this server.")
    return None


def retry_after(headers: list[tuple[bytes, bytes]], clock: Callable[[], float] = time.time) -> int | None:
    """Return the seconds of Retry-After, which may be a date; None without it. clock: Unix time."""
    value = next((value.decode("latin-1") for name, value in headers if name == b"retry-after"), "")
    try:
        seconds = int(value) if value.isdecimal() else math.ceil(parsedate_to_datetime(value).timestamp() - clock())
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0), _LONGEST_REST)


def masked(document: bytes, endpoint: Endpoint) -> bytes:
    """Strike our key out of an error."""
    if endpoint.api_key is None:
        return document
    key = endpoint.api_key.reveal().encode()
    return document.replace(key, b"*" * len(key))  # of the same length, which the head has announced
