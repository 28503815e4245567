"""Every test of the suite runs over each way to an upstream."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop

from proxy.transport import Answer, Timeouts, Transport
from proxy.transport.cloud import CloudTransport
from proxy.transport.local import Limits, LocalTransport
from tests.fakes.scripted_upstream import DEADLINE, Play, ScriptedUpstream, upstream

PATIENT = Timeouts(connect=DEADLINE, first_byte=DEADLINE, between_bytes=DEADLINE)
BODY_LIMIT = 1 << 30


@dataclass(frozen=True)
class Wire:
    """A kind of transport, the sockets that it uses, and the event loop that it runs on."""

    name: str
    local: bool
    folder: Path | None
    fast_loop: bool

    def run(self, story: Coroutine[Any, Any, Any]) -> Any:
        """Run a story to its end on this wire's kind of event loop."""
        factory = uvloop.new_event_loop if self.fast_loop else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(asyncio.wait_for(story, 2 * DEADLINE))

    def transport(self, address: str, *, connections: int = 1000, idle: int = 100) -> Transport:
        if self.local:
            return LocalTransport(address, Limits(max_connections=connections, max_idle=idle, idle_timeout=DEADLINE))
        return CloudTransport(address, max_connections=connections)

    @asynccontextmanager
    async def to(
        self, *plays: Play, read_requests: bool = True, connections: int = 1000
    ) -> AsyncIterator[tuple[ScriptedUpstream, Transport]]:
        """An upstream that plays, and a transport to it."""
        path = self.folder and self.folder / "upstream.sock"
        async with upstream(*plays, unix=path, read_requests=read_requests) as scripted:
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


@pytest.fixture(params=["local-tcp", "local-tcp-uvloop", "local-unix", "local-unix-uvloop", "cloud"])
def wire(request: pytest.FixtureRequest, short_folder: Path, without_proxies: None) -> Wire:
    name: str = request.param
    folder = short_folder if "unix" in name else None
    return Wire(name, name.startswith("local"), folder, name.endswith("uvloop"))


@pytest.fixture(params=["local-tcp", "local-unix-uvloop"])
def local_wire(request: pytest.FixtureRequest, short_folder: Path) -> Wire:
    name: str = request.param
    return Wire(name, True, short_folder if "unix" in name else None, name.endswith("uvloop"))


@pytest.fixture
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
