"""Every test of the suite runs over each way to an upstream."""

import asyncio
import ssl
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from proxy.transport import Answer, Timeouts, Transport
from proxy.transport.cloud import CloudTransport
from proxy.transport.dialing import CloudLimits
from proxy.transport.local import Limits, LocalTransport
from tests.fakes.scripted_http2 import ScriptedHttp2, http2_upstream
from tests.fakes.scripted_upstream import DEADLINE, Play, ScriptedUpstream, upstream

Scripted = ScriptedUpstream | ScriptedHttp2

HTTP1 = ("local-tcp", "local-tcp-uvloop", "local-unix", "local-unix-uvloop", "cloud", "cloud-tls", "cloud-tls-uvloop")
PATIENT = Timeouts(connect=DEADLINE, first_byte=DEADLINE, between_bytes=DEADLINE)
BODY_LIMIT = 1 << 30


@dataclass(frozen=True)
class Wire:
    """A kind of transport, the sockets that it uses, and the event loop that it runs on."""

    name: str
    local: bool
    folder: Path | None
    fast_loop: bool
    tls: ssl.SSLContext | None = None
    http2: bool = False

    def run(self, story: Coroutine[Any, Any, Any], seconds: float = 2 * DEADLINE) -> Any:
        """Run a story to its end, which comes within so many seconds, on this wire's kind of event loop."""
        factory = uvloop.new_event_loop if self.fast_loop else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(asyncio.wait_for(story, seconds))

    def transport(self, address: str, *, connections: int = 1000, idle: int = 100) -> Transport:
        if self.local:
            return LocalTransport(address, Limits(max_connections=connections, max_idle=idle, idle_timeout=DEADLINE))
        return CloudTransport(address, CloudLimits(max_connections=connections))

    def _upstream(self, plays: Sequence[Play], read_requests: bool) -> AbstractAsyncContextManager[Scripted]:
        if self.http2:
            assert self.tls is not None
            return http2_upstream(*plays, tls=self.tls)
        path = self.folder and self.folder / "upstream.sock"
        return upstream(*plays, unix=path, read_requests=read_requests, tls=self.tls)

    @asynccontextmanager
    async def to(
        self, *plays: Play, read_requests: bool = True, connections: int = 1000
    ) -> AsyncIterator[tuple[Scripted, Transport]]:
        """An upstream that plays, and a transport to it."""
        async with self._upstream(plays, read_requests) as scripted:
            transport = self.transport(scripted.address, connections=connections)
            try:
                yield scripted, transport
            finally:
                await transport.close()


async def get(transport: Transport, timeouts: Timeouts = PATIENT) -> Answer:
    """Send the plainest request."""
    return await transport.send(b"GET", b"/", [], b"", timeouts)


async def body_of(transport: Transport, timeouts: Timeouts = PATIENT) -> bytes:
    """Send the plainest request and return the body of its answer."""
    answer = await get(transport, timeouts)
    try:
        return await answer.read(BODY_LIMIT)
    finally:
        await answer.close()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="pv-") as folder:
        yield Path(folder)


@pytest.fixture(params=[*HTTP1, "cloud-http2", "cloud-http2-uvloop"])
def wire(request: pytest.FixtureRequest, short_folder: Path, trusted: trustme.CA) -> Wire:
    return _wire(request.param, short_folder, trusted)


@pytest.fixture(params=HTTP1)
def http1_wire(request: pytest.FixtureRequest, short_folder: Path, trusted: trustme.CA) -> Wire:
    return _wire(request.param, short_folder, trusted)


def _wire(name: str, folder: Path, authority: trustme.CA) -> Wire:
    secure = "tls" in name or "http2" in name
    return Wire(
        name,
        name.startswith("local"),
        folder if "unix" in name else None,
        name.endswith("uvloop"),
        server_tls(authority) if secure else None,
        "http2" in name,
    )


def server_tls(authority: trustme.CA, host: str = "127.0.0.1") -> ssl.SSLContext:
    """The context of a server that has a certificate for a host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    return context


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_proxies: None
) -> trustme.CA:
    """An authority that the environment says to trust."""
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    return authority


@pytest.fixture(params=["local-tcp", "local-unix-uvloop"])
def local_wire(request: pytest.FixtureRequest, short_folder: Path) -> Wire:
    name: str = request.param
    return Wire(name, True, short_folder if "unix" in name else None, name.endswith("uvloop"))


@pytest.fixture
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
