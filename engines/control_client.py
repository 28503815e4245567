"""Talking to the supervisor of a running server over its control socket."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import httpx2
import msgspec

from engines.spec import FleetStatus

# Commands that wait take as long as an engine takes to load.
_TIMEOUT = httpx2.Timeout(5.0, read=None)


class ControlUnreachable(Exception):
    """No server answers at the control socket."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"no polyvox server answers at {path}; is it running with this --state-dir?")


class ControlRefused(Exception):
    """The supervisor refused. code: what is wrong, for programs; status: as in HTTP."""

    def __init__(self, message: str, code: str, status: int) -> None:
        super().__init__(message)
        self.code, self.status = code, status


class _Problem(msgspec.Struct):
    message: str
    code: str


class _Envelope(msgspec.Struct):
    error: _Problem


class ControlClient:
    """A client of one control socket. Every method raises ControlUnreachable or ControlRefused."""

    def __init__(self, path: Path) -> None:
        # Mutable: the connection pool of the client.
        self._path = path
        transport = httpx2.AsyncHTTPTransport(uds=str(path), verify=False)  # no TLS to set up
        self._http = httpx2.AsyncClient(
            transport=transport, base_url="http://control", timeout=_TIMEOUT, trust_env=False
        )

    def __repr__(self) -> str:
        return f"ControlClient({str(self._path)!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def fleet(self) -> FleetStatus:
        """Return all engines as they are now."""
        return await self._fleet("GET", "/fleet")

    async def load(self, model: str, replica: int | None = None, *, wait: bool = False) -> FleetStatus:
        """Load a model's engines, or one of them. wait: return when that is done, or has failed."""
        return await self._command("load", model, replica, wait)

    async def unload(self, model: str, replica: int | None = None, *, wait: bool = False) -> FleetStatus:
        """Drain and stop a model's engines, or one of them."""
        return await self._command("unload", model, replica, wait)

    async def restart(self, model: str, replica: int | None = None, *, wait: bool = False) -> FleetStatus:
        """Drain, stop and load again a model's engines, or one of them."""
        return await self._command("restart", model, replica, wait)

    async def watch(self) -> AsyncGenerator[FleetStatus, None]:
        """Yield the fleet as it is now, then after each change, until the server stops."""
        async with self._stream("/fleet/watch") as answer:
            try:
                async for line in answer.aiter_lines():
                    if line:
                        yield msgspec.json.decode(line, type=FleetStatus)
            except httpx2.TransportError as error:
                raise ControlUnreachable(self._path) from error

    async def logs(self, engine: str, *, lines: int = 200, follow: bool = False) -> AsyncGenerator[bytes, None]:
        """Yield an engine's last log lines, in pieces; with `follow`, then what it logs from now on."""
        query = {"engine": engine, "lines": str(lines), "follow": "true" if follow else "false"}
        async with self._stream("/engines/logs", query) as answer:
            try:
                async for data in answer.aiter_bytes():
                    yield data
            except httpx2.TransportError as error:
                raise ControlUnreachable(self._path) from error

    async def report(self, name: str) -> bytes:
        """Return what the server reports under a name, as JSON."""
        return (await self._request("GET", f"/reports/{name}", None)).content

    async def service(self, name: str, body: dict[str, Any] | None = None) -> bytes:
        """Have the server do what it offers under a name; return what it says, as JSON."""
        return (await self._request("POST", f"/services/{name}", body or {})).content

    async def _command(self, command: str, model: str, replica: int | None, wait: bool) -> FleetStatus:
        body = {"model": model, "replica": replica, "wait": wait}
        return await self._fleet("POST", f"/engines/{command}", body)

    async def _fleet(self, method: str, path: str, body: dict[str, Any] | None = None) -> FleetStatus:
        return msgspec.json.decode((await self._request(method, path, body)).content, type=FleetStatus)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> httpx2.Response:
        try:
            answer = await self._http.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise ControlUnreachable(self._path) from error
        _check(answer)
        return answer

    @asynccontextmanager
    async def _stream(self, path: str, query: dict[str, str] | None = None) -> AsyncIterator[httpx2.Response]:
        request = self._http.build_request("GET", path, params=query)
        try:
            answer = await self._http.send(request, stream=True)
        except httpx2.TransportError as error:
            raise ControlUnreachable(self._path) from error
        try:
            if answer.is_error:
                await answer.aread()
            _check(answer)
            yield answer
        finally:
            await answer.aclose()


def _check(answer: httpx2.Response) -> None:
    if answer.is_success:
        return
    try:
        problem = msgspec.json.decode(answer.content, type=_Envelope).error
    except msgspec.DecodeError:
        problem = _Problem(f"the control socket answered {answer.status_code}", "unexpected_answer")
    raise ControlRefused(problem.message, problem.code, answer.status_code)
