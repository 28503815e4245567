"""The control socket: a small HTTP API over a unix socket, through which workers and commands reach the supervisor.

    GET  /fleet                                          -> FleetStatus
    GET  /fleet/watch                                    -> FleetStatus per line, now and after each change
    POST /engines/load|unload|restart                    -> FleetStatus  {"model", "replica": null, "wait": false}
    GET  /engines/logs?engine=ID&lines=200&follow=false  -> text
    GET  /reports/NAME                                   -> what somebody else reports: JSON
    POST /services/NAME                                  -> what somebody else does: JSON

Errors: {"error": {"message", "code"}}; 400 bad request, 404 unknown engine, 409 not in this state.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from engines.lifecycle import Command, IllegalMove
from engines.logs import follow as follow_log
from engines.logs import tail
from engines.spec import FleetStatus
from engines.supervisor import Supervisor, UnknownEngine

if TYPE_CHECKING:
    from litestar import Litestar
    from litestar.exceptions import HTTPException

_JSON: Final = "application/json"
_MOST_LINES: Final = 100_000

Reports = Mapping[str, Callable[[], bytes]]
Service = Callable[[bytes], Awaitable[tuple[int, bytes]]]  # the body of a request -> status and JSON
Services = Mapping[str, Service]


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a command. model: a model or an engine id. wait: answer when it is done, or has failed."""

    model: str
    replica: int | None = None
    wait: bool = False


async def serve_control(
    supervisor: Supervisor, path: Path, reports: Reports | None = None, services: Services | None = None
) -> None:
    """Serve the control API on a unix socket of this user, until cancelled.

    reports: what makes the JSON of a name. services: what does as a name says, which may take a while.
    """
    # The framework takes half a second to import: not in the way of the engines' start.
    app = await asyncio.to_thread(build_app, supervisor, reports or {}, services or {})
    listener = _listen(path)
    try:
        await _serve(app, listener)
    finally:
        _remove(path)


async def _serve(app: "Litestar", listener: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            yield  # signals belong to the parent's main program

    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1, ws="none"
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    """Bind the socket; only this user may ever connect, so the mode is right from the first moment."""
    _remove(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    return listener


def build_app(supervisor: Supervisor, reports: Reports, services: Services) -> "Litestar":
    """Return the ASGI application of the control API."""
    from litestar import Litestar, Request, Response, get, post
    from litestar.exceptions import HTTPException
    from litestar.params import FromQuery, JSONBody
    from litestar.response import Stream

    def refuse(_: Request, error: Exception) -> Response:  # type: ignore[type-arg]
        status, code, message = _explain(error)
        body = {"error": {"message": message, "code": code}}
        return Response(body, status_code=status, media_type=_JSON)

    def fleet_response(fleet: FleetStatus) -> Response[bytes]:
        return Response(msgspec.json.encode(fleet), media_type=_JSON)

    @get("/fleet")
    async def fleet() -> Response[bytes]:
        return fleet_response(supervisor.fleet())

    @get("/fleet/watch")
    async def watch() -> Stream:
        return Stream(_lines(supervisor), media_type="application/x-ndjson")

    def command(name: Command) -> object:
        @post(f"/engines/{name}", status_code=200, name=name)
        async def handler(data: JSONBody[Wish]) -> Response[bytes]:
            await carry_out(supervisor, name, data)
            return fleet_response(supervisor.fleet())

        return handler

    @get("/engines/logs")
    async def logs(engine: FromQuery[str], lines: FromQuery[int] = 200, follow: FromQuery[bool] = False) -> Stream:
        path = supervisor.log_path(engine)
        count = min(max(lines, 0), _MOST_LINES)
        return Stream(follow_log(path, count) if follow else _log_text(path, count), media_type="text/plain")

    others = _offered(reports, services)
    handlers = [fleet, watch, logs, *others, command("load"), command("unload"), command("restart")]
    known = dict.fromkeys((UnknownEngine, IllegalMove, HTTPException, Exception), refuse)
    return Litestar(handlers, exception_handlers=known, openapi_config=None, logging_config=None)  # type: ignore


def _offered(reports: Reports, services: Services) -> list[object]:
    """Return the handlers of what others report and do."""
    from litestar import Request, Response, get, post

    def report(name: str, make: Callable[[], bytes]) -> object:
        @get(f"/reports/{name}", name=f"report-{name}")
        async def handler() -> Response[bytes]:
            return Response(make(), media_type=_JSON)

        return handler

    def service(name: str, serve: Service) -> object:
        @post(f"/services/{name}", name=f"service-{name}")
        async def handler(request: Request) -> Response[bytes]:  # type: ignore[type-arg]
            status, answer = await serve(await request.body())
            return Response(answer, status_code=status, media_type=_JSON)

        return handler

    told = [report(name, make) for name, make in reports.items()]
    return told + [service(name, serve) for name, serve in services.items()]


async def carry_out(supervisor: Supervisor, command: Command, wish: Wish) -> None:
    """Have the supervisor begin what is wished for; see it to its end if that is part of the wish."""
    chosen = supervisor.select(wish.model, wish.replica)
    await supervisor.command(command, wish.model, wish.replica)
    if wish.wait:
        async for fleet in supervisor.watch():
            states = {engine.state for engine in fleet.engines if engine.id in chosen}
            if not states & {"starting", "draining"}:
                return


async def _lines(supervisor: Supervisor) -> AsyncIterator[bytes]:
    async for fleet in supervisor.watch():
        yield msgspec.json.encode(fleet) + b"\n"


async def _log_text(path: Path, lines: int) -> AsyncIterator[bytes]:
    for line in tail(path, lines):
        yield line.encode() + b"\n"


def _explain(error: Exception) -> tuple[int, str, str]:
    """Return status, code and message for what a handler raised."""
    if isinstance(error, UnknownEngine):
        return 404, "engine_not_found", str(error)
    if isinstance(error, IllegalMove):
        return 409, "illegal_move", str(error)
    status = getattr(error, "status_code", 500)
    if status >= 500:
        return status, "internal_error", "the supervisor failed to answer; see its log"
    return status, "bad_request", _with_details(error)


def _with_details(error: "HTTPException | Exception") -> str:
    extra = getattr(error, "extra", None)
    fields = [f"{e['key']}: {e['message']}" for e in extra if "key" in e] if isinstance(extra, list) else []
    return "; ".join([getattr(error, "detail", str(error)), *fields])
