"""Every error of the proxy.

PolyvoxError
├── ConfigError                the configuration is wrong: file, line, key, remedy
│   └── FileReadOnly           its file cannot be written
├── ServeError                 the server cannot start or go on: what, and what to do
│   ├── NoServer               that which a command asks does not answer
│   └── NotFollowed            a worker does not follow a new configuration
├── PluginError                what an installed distribution offers cannot be used
├── WrongSetting               a provider does not take a setting of its endpoint
├── ProbeFailed                an endpoint does not say what it can do: it does not answer, or not to us
├── RequestError               what a client is told, in OpenAI's envelope
│   ├── BadRequest             400
│   │   └── NothingSuits       no model has what the request needs
│   ├── WrongKey               401
│   ├── UnknownModel           404
│   ├── UnknownPath            404
│   ├── PathNotServed          404, by this model's provider
│   ├── NoLedger               404, this server keeps none
│   ├── NoCache                404, nor answers
│   ├── MethodNotAllowed       405
│   ├── RequestTimeout         408
│   ├── Conflict               409, the server cannot do so as it is
│   ├── BodyTooLarge           413
│   ├── TooBusy                429
│   ├── HeadTooLarge           431
│   ├── BadGateway             502
│   ├── UpstreamFailed         5xx as the upstream said
│   ├── TooManyConnections     503
│   ├── NotReady               503, come back in a moment
│   ├── EngineStopped          503, somebody has to do something
│   ├── LedgerUnavailable      503, its database does not answer
│   ├── StoreUnavailable       503, the cache's store does not answer
│   ├── Unavailable            503, nothing that could answer is asked now
│   ├── QuorumNotMet           503, 504, or as all members said
│   ├── DeadlinePassed         504, as the client wished
│   └── GatewayTimeout         504
└── UpstreamError              an endpoint did not give a whole, valid answer
    ├── InvalidRequest         we refused to send it: a header or path that could smuggle; nothing was sent
    ├── ConnectFailed          no connection: refused, no such socket, name unknown, TLS, transport closed
    ├── UpstreamTimeout
    │   ├── ConnectTimeout     no connection in time
    │   │   └── PoolTimeout    all connections were busy for as long as connecting may take
    │   ├── FirstByteTimeout   the request was sent, and no answer began in time
    │   ├── BetweenBytesTimeout  the answer began, then stood still
    │   └── FirstTokenTimeout  a stream that has a head, and no token
    ├── MalformedAnswer        what came is not HTTP, or its framing is ambiguous
    ├── ErrorEvent             a stream told of an error inside
    └── TruncatedAnswer        the connection ended before the answer did (perhaps before its first byte)
"""

import difflib
import math
from collections.abc import Sequence

import msgspec


class PolyvoxError(Exception):
    """Whatever goes wrong inside the proxy."""


class ConfigError(PolyvoxError):
    """The configuration is wrong. The text names file, line, key and remedy.

    field, problem: the key, as `models.NAME.engine`, and what is wrong with it, where that is known apart.
    """

    def __init__(self, text: str, field: str = "", problem: str = "") -> None:
        super().__init__(text)
        self.field, self.problem = field, problem or text


class FileReadOnly(ConfigError):
    """The file of the configuration cannot be written. The text names it."""


class ServeError(PolyvoxError):
    """The server cannot start, or cannot go on. The text says what to do."""


class NoServer(ServeError):
    """The server that a command asks does not answer."""


class NotFollowed(ServeError):
    """A worker does not follow a new configuration, as all others do."""


class PluginError(PolyvoxError):
    """What an installed distribution offers cannot be used. The text names the distribution."""


class WrongSetting(PolyvoxError):
    """A provider does not take a setting of its endpoint. field: its path below the endpoint, as ("options", "x")."""

    def __init__(self, field: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.field = field


class ProbeFailed(PolyvoxError):
    """An endpoint could not be asked what it can do. The text says why."""

    def __init__(self, endpoint: str, reason: str) -> None:
        super().__init__(f"{endpoint} does not answer: {reason}")


class RequestError(PolyvoxError):
    """What a client is told instead of an answer. type and code are those that OpenAI's API uses."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: int | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code

    def envelope(self, *, anthropic: bool = False) -> bytes:
        """Return the JSON body; for Anthropic's clients with their `type` and kinds of errors."""
        kind = _ANTHROPIC.get(self.status, "api_error") if anthropic else self.type
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"type": "error", "error": error} if anthropic else {"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that belong to this error."""
        return [(b"retry-after", b"%d" % self.retry_after)] if self.retry_after else []


# The types of Anthropic's errors, by status; what is not among them is an api_error.
_ANTHROPIC = {
    **dict.fromkeys((400, 405, 408, 409, 431), "invalid_request_error"),
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class BadRequest(RequestError):
    """Something in the request is not as it must be; `param` names the field."""

    status = 400
    type = "invalid_request_error"


class NothingSuits(BadRequest):
    """No model that may be asked has what the request needs."""

    code = "no_suitable_model"

    def __init__(self, name: str, failures: Sequence[str]) -> None:
        said = "; ".join(failures) or "there are no models"
        super().__init__(f"No model can serve this request for {name!r}. {said}.", param="model")


class WrongKey(RequestError):
    """No key or a wrong one: the same words for both, so that nothing can be learned from them."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("Incorrect API key provided. Send one of this server's keys as 'Authorization: Bearer KEY'.")

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"www-authenticate", b"Bearer")]


class UnknownModel(RequestError):
    """No model or alias has this name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, name: str, near: Sequence[str]) -> None:
        shown = name if len(name) <= 100 else name[:100] + "..."
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "GET /v1/models lists what there is."
        super().__init__(f"The model {shown!r} does not exist. {hint}", param="model")


class UnknownPath(RequestError):
    """Nothing is served at this path."""

    status = 404
    type = "invalid_request_error"
    code = "unknown_url"

    def __init__(self, method: str, path: str, known: Sequence[str]) -> None:
        shown = path if len(path) <= 100 else path[:100] + "..."
        near = difflib.get_close_matches(shown, known, n=1)
        super().__init__(f"Unknown request URL: {method} {shown}." + (f" Did you mean {near[0]}?" if near else ""))


class PathNotServed(RequestError):
    """The path is one of ours, but the provider of the model has nothing like it."""

    status = 404
    type = "invalid_request_error"
    code = "path_not_served"

    def __init__(self, path: str, provider: str, served: Sequence[str] = ()) -> None:
        hint = f"; it serves {', '.join(served)}" if served else ""
        super().__init__(f"{path} is not served for this model by its provider, {provider}{hint}.")


class MethodNotAllowed(RequestError):
    """The path is served, but not with this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_supported"

    def __init__(self, method: str, path: str, allowed: str) -> None:
        super().__init__(f"Not allowed to {method} on {path}; use {allowed}.")
        self._allowed = allowed

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"allow", self._allowed.encode())]


class Conflict(RequestError):
    """What an administrator wants cannot be done as the server, its machine or its file are now."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(RequestError):
    """The body is larger than `server.max_body_bytes`."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than this server takes ({limit} bytes, server.max_body_bytes).")


class HeadTooLarge(RequestError):
    """The request line and headers are longer than they may be."""

    status = 431
    type = "invalid_request_error"
    code = "request_headers_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The head of the request is larger than this server takes ({limit} bytes).")


class RequestTimeout(RequestError):
    """The request did not come in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"

    def __init__(self, part: str) -> None:
        super().__init__(f"The {part} of the request took too long to come (server.{part}_timeout).")


class TooManyConnections(RequestError):
    """The server has as many connections as it may have."""

    status = 503
    code = "too_many_connections"
    retry_after = 1

    def __init__(self) -> None:
        super().__init__("This server has as many connections as it takes (server.max_connections); try again soon.")


class TooBusy(RequestError):
    """Every endpoint of the model has as many requests as it may have, and no more can wait, or not any longer."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, model: str, retry_after: int) -> None:
        super().__init__(f"The model {model!r} has more requests than it can take; try again in {retry_after} s.")
        self.retry_after = retry_after


class NoLedger(RequestError):
    """The server keeps no ledger."""

    status = 404
    type = "invalid_request_error"
    code = "no_ledger"

    def __init__(self) -> None:
        super().__init__("This server keeps no ledger of its requests (`ledger: off`).")


class NoCache(RequestError):
    """The server keeps no answers."""

    status = 404
    type = "invalid_request_error"
    code = "no_cache"

    def __init__(self) -> None:
        super().__init__("This server keeps no answers (`cache: off`).")


class LedgerUnavailable(RequestError):
    """The database of the ledger does not answer."""

    status = 503
    type = "server_error"
    code = "ledger_unavailable"
    retry_after = 5

    def __init__(self) -> None:
        super().__init__("The database of the ledger does not answer; requests are noted, try again soon.")


class StoreUnavailable(RequestError):
    """The store of the cache does not answer whoever looks after it; requests go on without."""

    status = 503
    type = "server_error"
    code = "cache_unavailable"
    retry_after = 5

    def __init__(self) -> None:
        super().__init__("The store of the cache does not answer; requests go on without it, try again soon.")


class NotReady(RequestError):
    """The engine of the model is starting, and did not become ready in the time a request waits."""

    status = 503
    type = "server_error"
    code = "model_not_ready"
    retry_after = 5

    def __init__(self, model: str, state: str, detail: str) -> None:
        super().__init__(f"The model {model!r} is {state}" + (f" ({detail})" if detail else "") + "; try again soon.")


class EngineStopped(RequestError):
    """The engine of the model is stopped, draining or failed."""

    status = 503
    type = "server_error"
    code = "model_not_available"
    retry_after = 30

    def __init__(self, model: str, state: str) -> None:
        super().__init__(f"The model {model!r} is not available: its engine is {state}.")


class DeadlinePassed(RequestError):
    """The time that the client gave its request is over."""

    status = 504
    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("The answer was not complete in the time given (x-request-timeout).")


class Unavailable(RequestError):
    """Every endpoint that could answer has failed so often that it is not asked for a while."""

    status = 503
    code = "model_not_available"

    def __init__(self, model: str, wait: float) -> None:
        super().__init__(f"The model {model!r} is not available: it has failed too often just now; try again soon.")
        self.retry_after = max(1, math.ceil(wait))


class QuorumNotMet(RequestError):
    """Fewer members of an ensemble have answered than it needs. failures: of the others, what a client may be told."""

    code = "quorum_not_met"

    def __init__(self, ensemble: str, quorum: int, answers: int, failures: Sequence["MemberFailure"]) -> None:
        why = "; ".join(f"{failure.member}: {failure.message}" for failure in failures)
        super().__init__(f"The ensemble {ensemble!r} needs {quorum} answers and has {answers}. {why}")
        self.status = _status_of_all([failure.status for failure in failures])
        self.type = "invalid_request_error" if self.status < 500 and self.status != TooBusy.status else "server_error"


class MemberFailure(msgspec.Struct, frozen=True):
    """Why a member of an ensemble gave no answer: the status that its client would have got alone, and the words."""

    member: str
    status: int
    message: str


def _status_of_all(statuses: Sequence[int]) -> int:
    """Return what a client is told where everybody has failed.

    1. The request is wrong, if all say so: as they say it, 400 where they differ.
    2. All of them were too busy, or too late.
    3. Or else nobody knows whether the next time will be better.
    """
    told = set(statuses)
    if len(told) == 1 and (told <= {TooBusy.status, GatewayTimeout.status} or max(told) < 500):  # 1, 2
        return told.pop()
    return BadRequest.status if max(told) < 500 and TooBusy.status not in told else Unavailable.status  # 1, 3


class BadGateway(RequestError):
    """The upstream gave no whole, valid answer."""

    status = 502
    type = "server_error"
    code = "upstream_error"


class UpstreamFailed(RequestError):
    """The upstream answered with a 5xx: its status stays, its words may hold what is not for clients."""

    type = "server_error"
    code = "upstream_error"

    def __init__(self, status: int, retry_after: int | None) -> None:
        super().__init__(f"The upstream failed with status {status}.")
        self.status = status
        self.retry_after = retry_after


class GatewayTimeout(RequestError):
    """The upstream took longer than the model's timeouts allow."""

    status = 504
    type = "server_error"
    code = "upstream_timeout"


def upstream_failure(error: "UpstreamError") -> RequestError:
    """Return what a client is told of an upstream's failure."""
    kind = GatewayTimeout if isinstance(error, UpstreamTimeout) else BadGateway
    return kind(str(error)[0].upper() + str(error)[1:] + ".")


class UpstreamError(PolyvoxError):
    """An endpoint did not give a whole, valid answer.

    str() is safe to show to a client: it names no path, address or key of the endpoint. `address` is for logs.
    """

    summary = "the upstream failed"

    def __init__(self, reason: str = "", *, address: str = "") -> None:
        super().__init__(f"{self.summary}: {reason}" if reason else self.summary)
        self.reason = reason
        self.address = address


class InvalidRequest(UpstreamError):
    """We refused to send the request; nothing of it was sent."""

    summary = "the request was not sent"


class ConnectFailed(UpstreamError):
    """No connection could be made; nothing of the request was sent."""

    summary = "cannot connect to the upstream"


class UpstreamTimeout(UpstreamError):
    """The endpoint took longer than it may."""

    summary = "the upstream took too long"


class ConnectTimeout(UpstreamTimeout):
    """No connection in time; nothing of the request was sent."""

    summary = "connecting to the upstream took too long"


class PoolTimeout(ConnectTimeout):
    """Every connection that we may have was busy for as long as connecting may take."""

    summary = "all connections to the upstream are busy"


class FirstByteTimeout(UpstreamTimeout):
    """The request was sent, but the head of the answer did not come in time."""

    summary = "the upstream did not begin to answer in time"


class BetweenBytesTimeout(UpstreamTimeout):
    """The answer began, then nothing came for longer than the endpoint may pause."""

    summary = "the upstream stopped in the middle of its answer"


class FirstTokenTimeout(UpstreamTimeout):
    """The head of a stream came, but no token in time."""

    summary = "the upstream gave no first token in time"


class MalformedAnswer(UpstreamError):
    """What came is not HTTP, or it can be read in two ways; the connection is not used again."""

    summary = "the upstream gave a malformed answer"


class TruncatedAnswer(UpstreamError):
    """The connection ended before the answer was complete, perhaps before its first byte."""

    summary = "the upstream ended the connection before its answer was complete"


class ErrorEvent(UpstreamError):
    """The endpoint ended its stream with an event that tells of an error, or sent such a document with status 200.

    document: its JSON. before: what may still be sent of the bytes that it came with.
    """

    summary = "the upstream told of an error in its answer"

    def __init__(self, document: bytes) -> None:
        super().__init__()
        self.document = document
        self.before = b""
