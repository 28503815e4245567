"""The HTTP surface, thin: routes, limits, keys, request ids, and errors in OpenAI's envelope."""

import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from time import monotonic
from typing import Any, cast
from urllib.parse import parse_qsl, unquote

import msgspec
from litestar import Litestar
from litestar.handlers import asgi
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from proxy.admin import PATH as ADMIN_MODELS
from proxy.admin import Admin
from proxy.auth import Caller, Keys
from proxy.cache import bulletin
from proxy.cache.replies import CLIENT, Client
from proxy.chat import TELLING, Chat, Headers, Incoming
from proxy.config import Server
from proxy.deadline import Deadline
from proxy.errors import (
    BadRequest,
    BodyTooLarge,
    DeadlinePassed,
    MethodNotAllowed,
    NoCache,
    NoLedger,
    RequestError,
    UnknownPath,
    UpstreamError,
    upstream_failure,
)
from proxy.ledger import usage
from proxy.ledger.books import Books
from proxy.ledger.recorder import Both
from proxy.live import LiveRegistry
from proxy.metrics import Metrics
from proxy.prices import Prices
from proxy.registry import BEST_FIRST, Ensemble, Model, Preset, Registry
from proxy.relay import Exchange
from proxy.reply import Reply
from proxy.telemetry import OPERATIONS, OTHER, Sink

MODEL_PATHS = tuple(OPERATIONS)  # every path of vLLM's server whose body has a `model`

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Visit(msgspec.Struct, frozen=True):
    """What belongs to one request whatever it asks for. headers: by their names, which are lower-case."""

    request_id: bytes
    caller: Caller
    exchange: Exchange
    headers: Mapping[bytes, bytes]


class Api:
    """The handlers of one worker."""

    def __init__(
        self,
        chat: Chat,
        live: LiveRegistry,
        metrics: Metrics,
        server: Server,
        prices: Prices | None = None,
        books: Books | None = None,
        admin: Admin | None = None,
    ) -> None:
        """books: of the ledger, for a server that keeps one. admin: for one whose configuration can be changed."""
        self._live = live
        self._admin = admin
        self._metrics = metrics
        self._books = books
        self._sink: Sink = Both(metrics, books.recorder) if books else metrics
        self._started = int(time.time())
        # All mutable state: what comes with a configuration.
        self.follow(chat, server, prices)

    def follow(self, chat: Chat, server: Server, prices: Prices | None) -> None:
        """Answer by another configuration from now on. Requests that have begun keep what they began with."""
        self._chat = chat
        self._prices = prices
        self._server = server
        self._keys = Keys(server.api_keys)
        self._usage_keys = Keys(server.api_keys, admins=server.admin_keys)
        self._metrics_keys = Keys(()) if server.metrics_public else self._keys
        self._admin_keys = Keys(server.admin_keys, required=True)

    def model_request(self, scope: HTTPScope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve a POST whose body names a model."""
        return self._guarded(scope, receive, send, "POST", self._answer)

    async def route(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """POST /v1/route: how a request would be routed."""
        await self._guarded(scope, receive, send, "POST", self._explain_route)

    async def rest(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """GET /v1/models, GET /v1/models/{id}, GET /v1/usage, /admin/models, and every path that there is not."""
        # Litestar has one mount that takes what no route does; ids have slashes, so they need a mount as well.
        path = unquote(scope["raw_path"].decode("latin-1"))
        if path == "/v1/models" or path.startswith("/v1/models/"):
            await self._guarded(scope, receive, send, "GET", self._show_models)
        elif path == "/admin/cache":
            method = scope["method"] if scope["method"] == "DELETE" else "GET"
            await self._guarded(scope, receive, send, method, self._look_after_cache, self._admin_keys)
        elif path == "/admin/cache/semantic":
            await self._guarded(scope, receive, send, "GET", self._show_likeness, self._admin_keys)
        elif path == "/v1/usage":
            await self._guarded(scope, receive, send, "GET", self._show_usage, self._usage_keys)
        elif self._admin and (path == ADMIN_MODELS or path.startswith(f"{ADMIN_MODELS}/")):
            await self._guarded(scope, receive, send, scope["method"], self._administrate, self._admin_keys)
        else:
            keys = self._admin_keys if path.startswith("/admin/") else None
            await self._guarded(scope, receive, send, scope["method"], self._refuse_path, keys)

    async def metrics(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """GET /metrics: all workers of this server together."""
        await self._guarded(scope, receive, send, "GET", self._show_metrics, self._metrics_keys)

    async def health(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """GET /health: this process is alive."""
        await _send_json(send, 200, {"status": "ok"})

    async def ready(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """GET /ready: something can answer; 503 with the state of each model while nothing can."""
        models = self._live.current.models
        able = any(model.ready() for model in models.values())
        body = {
            "status": "ready" if able else "not ready",
            "models": {name: _condition(model) for name, model in models.items()},
        }
        await _send_json(send, 200 if able else 503, body, [] if able else [(b"retry-after", b"5")])

    async def _guarded(
        self,
        scope: HTTPScope,
        receive: Receive,
        send: Send,
        method: str,
        handle: Callable[[HTTPScope, Receive, Send, Visit], Awaitable[None]],
        keys: Keys | None = None,
    ) -> None:
        """Check method and key, then handle; turn whatever goes wrong into one envelope."""
        given = _by_name(scope["headers"])
        request_id = _request_id(given)
        operation = OPERATIONS.get(scope["path"].rstrip("/"), OTHER)
        exchange = Exchange(self._sink, operation, monotonic, self._prices, request_id)
        try:
            caller = (keys or self._keys).check(given)
            exchange.key_id = caller.id
            if scope["method"] != method:
                raise MethodNotAllowed(scope["method"], scope["raw_path"].decode("latin-1"), method)
            await handle(scope, receive, send, Visit(request_id, caller, exchange, given))
        except RequestError as e:
            exchange.fail(e, e.status)
            await send_error(send, e, request_id, scope["path"], exchange.attempts)
        except UpstreamError as e:
            failure = upstream_failure(e)
            exchange.fail(e, failure.status)
            await send_error(send, failure, request_id, scope["path"], exchange.attempts)
        except BaseException as e:
            exchange.fail(e)
            raise
        finally:
            await exchange.close()

    async def _answer(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        request = await self._read(scope, receive, visit)
        if request is not None:
            await self._relay(request, send, visit.exchange)

    async def _explain_route(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        request = await self._read(scope, receive, visit)
        if request is not None:
            await _send_json(send, 200, self._chat.explain(request), [(b"x-request-id", visit.request_id)])
            visit.exchange.complete()

    async def _read(self, scope: HTTPScope, receive: Receive, visit: Visit) -> Incoming | None:
        """Return the whole request, None if the client has gone."""
        deadline = Deadline.of(visit.headers)
        body = await _read_body(visit.headers, receive, self._server.max_body_bytes)
        if body is None:
            return None
        visit.exchange.received()
        path, query, headers = scope["path"].rstrip("/"), scope["query_string"], cast(Headers, scope["headers"])
        salt, models = visit.caller.salt, visit.caller.models
        client = cast(Client | None, (scope.get("extensions") or {}).get(CLIENT))
        ordinary = TELLING.isdisjoint(visit.headers)
        return Incoming(path, query, headers, body, visit.request_id, salt, deadline, models, client, ordinary)

    async def _relay(self, request: Incoming, send: Send, exchange: Exchange) -> None:
        answering = self._chat.answer(request, exchange)
        reply = await (request.deadline.bound(answering) if request.deadline else answering)
        headers = [*reply.headers, (b"x-request-id", request.request_id)]
        if reply.body is None and (usd := exchange.usd()) is not None:  # of a stream it is not known yet
            headers.append((b"x-polyvox-cost", b"%.10f" % usd))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await self._send_body(reply, send, request.deadline)
        exchange.complete()

    async def _send_body(self, reply: Reply, send: Send, deadline: Deadline | None) -> None:
        """Send a body. The head is sent, so the status can no longer tell where it breaks: see Reply.mend."""
        passing, more = (reply.document, False) if reply.body is None else (reply.opening, True)
        while more:
            if passing:
                await send({"type": "http.response.body", "body": passing, "more_body": True})
            try:
                assert reply.body is not None
                async for data in deadline.bounded(reply.body) if deadline else reply.body:
                    if passing := reply.read(data):
                        await send({"type": "http.response.body", "body": passing, "more_body": True})
                passing, more = reply.end(), False
            except UpstreamError as e:
                passing, more = await self._mended(reply, e, deadline)
            except DeadlinePassed as e:
                passing, more = reply.give_up(e), False
        await send({"type": "http.response.body", "body": passing, "more_body": False})

    async def _mended(self, reply: Reply, error: UpstreamError, deadline: Deadline | None) -> tuple[bytes, bool]:
        mending = reply.mend(error)
        try:
            return await (deadline.bound(mending) if deadline else mending)
        except DeadlinePassed as e:
            return reply.give_up(e), False

    async def _show_models(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        registry, only = self._live.current, visit.caller.models
        name = unquote(scope["raw_path"].decode("latin-1")).removeprefix("/v1/models").strip("/")
        if name:
            body = self._card(registry, name, only)
        else:
            body = {"object": "list", "data": [self._card(registry, name, only) for name in registry.names(only)]}
        await _send_json(send, 200, body, [(b"x-request-id", visit.request_id)])
        visit.exchange.complete()

    async def _show_usage(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        """What the caller's own key has used, or what was asked without one; for an admin, what all have."""
        if self._books is None:
            raise NoLedger
        asked = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        query = usage.parse(asked, time.time())
        if not visit.caller.is_admin:
            query = msgspec.structs.replace(query, key_id=visit.caller.id)
        report = await self._books.report(query)
        await _send_json(send, 200, report, [(b"x-request-id", visit.request_id)])
        visit.exchange.complete()

    async def _look_after_cache(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        """What the cache of answers holds and has done; DELETE drops what `model` and `key_prefix` say, or all."""
        if self._chat.cached is None:
            raise NoCache
        if scope["method"] == "DELETE":
            asked = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
            purge = bulletin.parse(asked, self._model_called)
            body: object = {"object": "cache.purge", "purged": await self._chat.cached.purge(purge)}
        else:
            body = {"object": "cache", **msgspec.structs.asdict(await self._chat.cached.report())}
        await _send_json(send, 200, body, [(b"x-request-id", visit.request_id)])
        visit.exchange.complete()

    async def _show_likeness(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        """How near questions are to earlier ones, by alias: what would be hit at which threshold."""
        if (cached := self._chat.cached) is None:
            raise NoCache
        found = cached.questions.report() if cached.questions else {}
        body = {"object": "cache.semantic", "models": found}
        await _send_json(send, 200, body, [(b"x-request-id", visit.request_id)])
        visit.exchange.complete()

    def _model_called(self, name: str) -> str:
        target = self._live.current.resolve(name)
        target = target.of if isinstance(target, Preset) else target
        if not isinstance(target, Model):
            raise BadRequest(f"model: {name!r} is several models; name one of them.", param="model")
        return target.name

    async def _show_metrics(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        accept = visit.headers.get(b"accept", b"")
        content_type, page = self._metrics.page(accept.decode("latin-1"))
        await _send_bytes(send, 200, page, [(b"x-request-id", visit.request_id)], content_type)
        visit.exchange.complete()

    async def _administrate(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        body = await _read_body(visit.headers, receive, self._server.max_body_bytes)
        if body is None:
            return
        assert self._admin
        status, answer = await self._admin.answer(scope["method"], scope["raw_path"].decode("latin-1"), body)
        await _send_bytes(send, status, answer, [(b"x-request-id", visit.request_id)])
        visit.exchange.complete()

    async def _refuse_path(self, scope: HTTPScope, receive: Receive, send: Send, visit: Visit) -> None:
        path = scope["raw_path"].decode("latin-1")
        raise UnknownPath(
            scope["method"],
            path,
            (*MODEL_PATHS, "/v1/models", "/v1/route", "/v1/usage", "/health", "/ready", "/metrics"),
        )

    def _card(self, registry: Registry, name: str, only: frozenset[str] | None) -> dict[str, Any]:
        target = registry.resolve(name, only)
        if isinstance(target, Ensemble):
            return self._card_of_ensemble(registry, target)
        of = target.of if isinstance(target, Preset) else target
        models = [of] if isinstance(of, Model) else [registry.models[member] for member in of.members]
        best = min(models, key=lambda model: BEST_FIRST.index(model.state), default=None)
        contexts = [model.context_length for model in models if model.context_length]
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "polyvox",
            "root": of.name,
            "parent": None,
            "max_model_len": max(contexts, default=None),
            "state": best.state if best else "stopped",
        }

    def _card_of_ensemble(self, registry: Registry, ensemble: Ensemble) -> dict[str, Any]:
        """What its members have in common: as long a context as the shortest of them, and whether enough are ready."""
        cards = [self._card(registry, member, None) for member in ensemble.settings.members]
        enough = sum(card["state"] == "ready" for card in cards) >= ensemble.settings.quorum
        return {
            "id": ensemble.name,
            "object": "model",
            "created": self._started,
            "owned_by": "polyvox",
            "root": ensemble.name,
            "parent": None,
            "max_model_len": min((c["max_model_len"] for c in cards if c["max_model_len"]), default=None),
            "state": "ready" if enough else "starting",
            "members": [*ensemble.settings.members],
        }


def _condition(model: Model) -> dict[str, str]:
    """Return what anybody may know of a model: not why it failed, since a log's tail may hold anything."""
    return {"state": model.state, "detail": model.detail if model.state == "starting" else ""}


def _by_name(headers: Iterable[tuple[bytes, bytes]]) -> Mapping[bytes, bytes]:
    """Return headers by their names; of one that comes several times, the values in one line (RFC 9110, 5.3)."""
    pairs = list(headers)
    found = dict(pairs)
    if len(found) < len(pairs):
        return {name: b", ".join(value for other, value in pairs if other == name) for name in found}
    return found


def _request_id(headers: Mapping[bytes, bytes]) -> bytes:
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return b"%032x" % random.getrandbits(128)  # not secret: it only tells requests apart


async def _read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes | None:
    """Return the whole body, or None when the client went away. Raises BodyTooLarge, before reading if told."""
    if int(headers.get(b"content-length", b"0")) > limit:
        raise BodyTooLarge(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = cast(bytes, message.get("body", b""))
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(limit)
        chunks.append(chunk)
        if not message.get("more_body"):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _send_json(send: Send, status: int, body: object, headers: Headers | None = None) -> None:
    await _send_bytes(send, status, msgspec.json.encode(body), headers or [])


async def _send_bytes(
    send: Send, status: int, body: bytes, headers: Headers, content_type: bytes = b"application/json"
) -> None:
    length = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*length, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(send: Send, error: RequestError, request_id: bytes, path: str, attempts: int = 0) -> None:
    """Send an error in OpenAI's envelope; on Anthropic's path in one that its clients read as well."""
    envelope = error.envelope(anthropic=path.startswith("/v1/messages"))
    headers = [*error.headers(), (b"x-request-id", request_id)]
    if attempts:
        headers.append((b"x-polyvox-attempts", b"%d" % attempts))
    await _send_bytes(send, error.status, envelope, headers)


def build_app(api: Api, on_startup: list[Any], on_shutdown: list[Any]) -> ASGIApp:
    """Make the ASGI application: Litestar, with a way past its routing for the paths that carry the load."""
    return _shortcut(_litestar(api, on_startup, on_shutdown), dict.fromkeys(MODEL_PATHS, api.model_request))


def _shortcut(app: Litestar, handlers: dict[str, Callable[[Any, Any, Any], Awaitable[None]]]) -> ASGIApp:
    """Call the handler of a path that is exactly one of these, and let the application find every other.

    Litestar's routing and exception middleware cost 12 us for each request, as much as all that routes need here.
    """

    def call(scope: Any, receive: Receive, send: Send) -> Awaitable[None]:
        return handlers.get(scope.get("path"), app)(scope, receive, send)

    return cast(ASGIApp, call)


def _litestar(api: Api, on_startup: list[Any], on_shutdown: list[Any]) -> Litestar:
    return Litestar(
        route_handlers=[
            asgi(list(MODEL_PATHS), copy_scope=False)(_plain(api.model_request)),
            asgi("/v1/route", copy_scope=False)(_plain(api.route)),
            asgi("/health", copy_scope=False)(_plain(api.health)),
            asgi("/ready", copy_scope=False)(_plain(api.ready)),
            asgi("/metrics", copy_scope=False)(_plain(api.metrics)),
            asgi("/", is_mount=True, copy_scope=False)(_plain(api.rest)),
        ],
        on_startup=on_startup,
        on_shutdown=on_shutdown,
        openapi_config=None,
        logging_config=None,
    )


def _plain(method: Callable[[HTTPScope, Receive, Send], Awaitable[None]]) -> Any:
    """Litestar inspects handlers as functions."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await method(cast(HTTPScope, scope), receive, send)

    return handler
