"""The control socket, called by its client over the real socket."""

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from engines.control import serve_control
from engines.control_client import ControlClient, ControlRefused, ControlUnreachable
from engines.spec import EngineSpec, FleetStatus
from tests.fakes.fleet import Fleet, engine_spec, eventually, run, supervised

IDLE = engine_spec("smollm2", autostart=False)


@asynccontextmanager
async def controlled(
    folder: Path, *specs: EngineSpec, flags: tuple[str, ...] = ()
) -> AsyncIterator[tuple[Fleet, ControlClient]]:
    """A supervisor that listens on its control socket, and a client of it."""
    async with supervised(folder, *(specs or (IDLE,)), flags=flags) as fleet:
        path = fleet.script.paths.control_socket
        serving = asyncio.create_task(serve_control(fleet.supervisor, path))
        try:
            await eventually(path.exists)
            async with ControlClient(path) as client:
                await _answering(client)
                yield fleet, client
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            assert not path.exists()


async def _answering(client: ControlClient) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await client.fleet()
            except ControlUnreachable:
                await asyncio.sleep(0.01)
            else:
                return


def _states(fleet: FleetStatus) -> list[str]:
    return [engine.state for engine in fleet.engines]


def test_the_fleet_is_given_as_the_supervisor_has_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (fleet, client):
            assert await client.fleet() == fleet.supervisor.fleet()

    run(story())


def test_the_socket_is_for_this_user_only(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (fleet, _):
            assert stat.S_IMODE(fleet.script.paths.control_socket.stat().st_mode) == 0o600

    run(story())


def test_a_command_is_answered_as_soon_as_it_has_begun(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path, IDLE, flags=("--never-ready",)) as (_, client):
            assert _states(await client.load("smollm2")) == ["starting"]
            assert _states(await client.unload("smollm2", 0)) == ["draining"]

    run(story())


def test_a_command_that_waits_is_answered_when_it_is_done(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (_, client):
            assert _states(await client.load("smollm2", wait=True)) == ["ready"]
            assert _states(await client.restart("smollm2", wait=True)) == ["ready"]
            assert _states(await client.unload("smollm2", wait=True)) == ["stopped"]

    run(story())


def test_watching_gives_the_present_and_then_the_changes(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (_, client):
            states = []
            async with aclosing(client.watch()) as changes:
                async for fleet in changes:
                    states += _states(fleet)
                    if states == ["stopped"]:
                        await client.load("smollm2")
                    if states[-1] == "ready":
                        break
            assert list(dict.fromkeys(states)) == ["stopped", "starting", "ready"]

    run(story())


def test_an_unknown_model_is_a_404_with_close_matches(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (_, client):
            with pytest.raises(ControlRefused, match="'smolm2'; did you mean smollm2") as refusal:
                await client.load("smolm2")
            assert (refusal.value.status, refusal.value.code) == (404, "engine_not_found")

    run(story())


def test_a_command_that_the_state_does_not_allow_is_a_409(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (_, client):
            with pytest.raises(ControlRefused, match="cannot unload engine smollm2/0 while it is stopped") as refusal:
                await client.unload("smollm2")
            assert (refusal.value.status, refusal.value.code) == (409, "illegal_move")

    run(story())


@pytest.mark.parametrize(
    ("body", "names"),
    [(b"{}", "model"), (b'{"model": "smollm2", "replicas": 1}', "replicas"), (b"{", "")],
)
def test_a_malformed_command_is_a_400_that_names_the_field(tmp_path: Path, body: bytes, names: str) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (fleet, _):
            transport = httpx2.AsyncHTTPTransport(uds=str(fleet.script.paths.control_socket))
            async with httpx2.AsyncClient(transport=transport, base_url="http://control", timeout=60) as http:
                answer = await http.post("/engines/load", content=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "bad_request"
            assert names in answer.json()["error"]["message"]

    run(story())


def test_the_last_lines_of_a_log_are_given(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path, flags=("--chatter", "50")) as (_, client):
            await client.load("smollm2", wait=True)
            text = b"".join([piece async for piece in client.logs("smollm2/0", lines=3)])
            assert text == b"line 47\nline 48\nline 49\n"

    run(story())


def test_a_log_is_followed_over_a_restart_of_its_engine(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path, flags=("--chatter", "2")) as (_, client):
            await client.load("smollm2", wait=True)
            text = b""
            async with aclosing(client.logs("smollm2/0", lines=1, follow=True)) as pieces:
                async for piece in pieces:
                    if not text:
                        await client.restart("smollm2")
                    text += piece
                    if text.count(b"line 1\n") == 2:
                        break
            assert text.startswith(b"line 1\n==== polyvox: engine starts")

    run(story())


def test_the_log_of_an_unknown_engine_is_a_404(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (_, client):
            with pytest.raises(ControlRefused, match="did you mean smollm2/0") as refusal:
                await anext(client.logs("smollm2"))
            assert refusal.value.status == 404

    run(story())


def test_a_server_that_stops_ends_what_is_streamed(tmp_path: Path) -> None:
    async def story() -> None:
        async with controlled(tmp_path) as (fleet, client), aclosing(client.watch()) as changes:
            await anext(changes)
            await fleet.supervisor.close()
            assert [_states(last) async for last in changes][-1] == ["stopped"]

    run(story())


def test_a_socket_that_nobody_serves_is_named_with_what_to_check(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "control.sock"
        async with ControlClient(path) as client:
            with pytest.raises(ControlUnreachable, match=f"no polyvox server answers at {path}; .*--state-dir"):
                await client.fleet()
            with pytest.raises(ControlUnreachable):
                await anext(client.watch())

    run(story())
