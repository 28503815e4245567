"""Engines are asked what they can do when they are first ready, without getting in anybody's way."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from engines.spec import EngineSettings, EngineStatus, FleetStatus, Simulation
from proxy import registry
from proxy.capabilities import Capabilities, Finding, Folder, subject_of
from proxy.config import Config, EndpointSettings, ModelSettings
from proxy.discovery import Discovery, Manners
from proxy.live import LiveRegistry
from proxy.transport.local import LocalTransport
from tests.fakes.able_server import AbleServer, able_server
from tests.fakes.scripted_upstream import eventually

QUICK = Manners(pause=0.001, glance=0.001, quiet=0.005, patience=0.02, hold=0.002, longest=20.0)
ENGINE = EngineSettings(weights="a/b")
LOCAL = ModelSettings(engine=ENGINE)
SUBJECT = subject_of(ENGINE, "there")


def live_of(
    model: ModelSettings, address: str, version: str | None = "9.1", findings: dict | None = None
) -> LiveRegistry:
    engine = EngineStatus(
        id="there/0", model="there", replica=0, state="ready", since=1.0, address=address, version=version
    )
    fleet = FleetStatus(version=1, engines=(engine,))
    return LiveRegistry(registry.build(Config(models={"there": model}), fleet, findings or {}))


Story = Callable[[AbleServer, Folder], Awaitable[None]]


def discovering(
    tmp_path: Path, story: Story, model: ModelSettings = LOCAL, findings: dict | None = None, **server: object
) -> None:
    async def tell() -> None:
        async with able_server(**server) as able:
            transport, folder = LocalTransport(able.address), Folder(tmp_path)
            live = live_of(model, able.address, findings=findings)
            running = asyncio.create_task(Discovery(live, lambda _: transport, folder, QUICK).run())
            try:
                await story(able, folder)
                assert not running.done()
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                await transport.close()

    asyncio.run(tell())


def test_an_engine_that_nobody_knows_is_asked_and_what_it_can_do_is_kept(tmp_path):
    async def story(able: AbleServer, folder: Folder) -> None:
        await eventually(lambda: bool(folder.read()))
        finding = folder.read()[SUBJECT]
        assert finding.version == "9.1" and finding.capabilities.tools is True
        known = live_of(LOCAL, able.address, findings=folder.read()).current.resolve("there")
        assert known.capabilities == finding.capabilities

    discovering(tmp_path, story)


async def nothing_is_asked(able: AbleServer, folder: Folder) -> None:
    for _ in range(50):  # each is at least one look for engines to ask
        await asyncio.sleep(0.002)
    assert able.requests == [] and folder.read() == {}


def test_an_engine_that_is_known_is_not_asked(tmp_path):
    known = {SUBJECT: Finding("there", Capabilities(tools=True), 1.0, "9.1")}
    discovering(tmp_path, nothing_is_asked, findings=known)


def test_an_engine_of_another_version_is_asked_again(tmp_path):
    async def story(able: AbleServer, folder: Folder) -> None:
        await eventually(lambda: bool(folder.read()))
        assert folder.read()[SUBJECT].version == "9.1"

    discovering(tmp_path, story, findings={SUBJECT: Finding("there", Capabilities(tools=True), 1.0, "9.0")})


def test_an_engine_is_not_asked_where_that_is_off(tmp_path):
    discovering(tmp_path, nothing_is_asked, msgspec.structs.replace(LOCAL, probe=False))


def test_a_simulated_engine_is_not_asked(tmp_path):
    simulated = ModelSettings(engine=EngineSettings(simulator=Simulation()))
    discovering(tmp_path, nothing_is_asked, simulated)


def test_a_server_of_somebody_else_is_not_asked(tmp_path):
    discovering(tmp_path, nothing_is_asked, ModelSettings(endpoints=(EndpointSettings(base_url="http://127.0.0.1:1"),)))


def test_a_context_length_is_not_tried_out_in_the_background(tmp_path):
    async def story(able: AbleServer, folder: Folder) -> None:
        await eventually(lambda: bool(folder.read()))
        assert max(len(str(request["messages"])) for request in able.requests) < 4000

    discovering(tmp_path, story)


def test_an_engine_that_fails_at_it_is_asked_once(tmp_path):
    async def story(able: AbleServer, folder: Folder) -> None:
        await eventually(lambda: able.heard.count("/v1/models") == 1)
        for _ in range(50):
            await asyncio.sleep(0.002)
        assert able.heard.count("/v1/models") == 1 and folder.read() == {}

    discovering(tmp_path, story, key="not ours")


def test_questions_wait_while_an_engine_has_something_to_do(tmp_path):
    async def story(able: AbleServer, folder: Folder) -> None:
        await eventually(lambda: able.heard.count("/metrics") > 3)
        assert able.requests == []
        able.running = 0
        await eventually(lambda: bool(folder.read()))

    async def patient() -> None:
        async with able_server(running=1) as able:
            transport, folder = LocalTransport(able.address), Folder(tmp_path)
            manners = QUICK._replace(patience=20.0, hold=20.0)
            discovery = Discovery(live_of(LOCAL, able.address), lambda _: transport, folder, manners)
            running = asyncio.create_task(discovery.run())
            try:
                await story(able, folder)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                await transport.close()

    asyncio.run(patient())


def test_an_engine_that_is_busy_all_day_is_asked_all_the_same(tmp_path):
    async def story(able: AbleServer, folder: Folder) -> None:
        await eventually(lambda: bool(folder.read()))

    discovering(tmp_path, story, running=3)
