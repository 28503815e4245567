"""What becomes of the configuration of a running server, with those who follow it played."""

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from proxy import config
from proxy.config import Loaded
from proxy.errors import ConfigError, ServeError
from proxy.reloading import Reloader, Start
from tests.fakes.scripted_upstream import eventually

ONE = "models: {m: {endpoints: [{base_url: 'http://one/v1'}]}}  # kept\n"
TWO = "models: {m: {endpoints: [{base_url: 'http://two/v1'}]}}\n"
SETTINGS = {"endpoints": [{"base_url": "http://put/v1", "api_key": "${KEY}"}]}
ENVIRON = {"KEY": "sk-sentinel"}


class Played:
    """Workers, engines and a terminal in one: remember what they are told."""

    def __init__(self) -> None:
        self.followed: list[str] = []
        self.said: list[str] = []
        self.refusals = 0
        self.has_room = True

    async def check(self, new: Loaded, old: Loaded) -> None:
        if not self.has_room:
            raise ServeError("the engines do not fit")

    async def follow(self, new: Loaded, old: Loaded) -> None:
        self.followed.append(new.config.models["m"].endpoints[0].base_url)

    def refused(self) -> None:
        self.refusals += 1

    def say(self, text: str, style: str | None = None) -> None:
        self.said.append(text)


def reloader(folder: Path, text: str = ONE, now: str | None = None) -> tuple[Reloader, Played, Path]:
    """Return a reloader that started with a text, and the file with what is there now."""
    file, played = folder / "polyvox.yaml", Played()
    file.write_text(text if now is None else now)
    start = Start(file, ENVIRON, text, config.parse(text, file, ENVIRON))
    return Reloader(start, played, played), played, file  # type: ignore[arg-type]


def test_a_valid_file_is_followed_and_what_changed_is_said(tmp_path: Path):
    made, played, file = reloader(tmp_path)
    file.write_text(TWO)
    applied = asyncio.run(made.reload())
    assert (applied.generation, applied.changes.changed) == (2, ("models.m",))
    assert played.followed == ["http://two/v1"]
    assert played.said == ["configuration 2: changed model m"]


@pytest.mark.parametrize("text", ["models: [", "models: {m: {}}", "aliases: {a: b}"])
def test_a_bad_file_is_refused_and_nobody_follows_it(tmp_path: Path, text: str):
    made, played, file = reloader(tmp_path)
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"polyvox.yaml:1: "):
        asyncio.run(made.reload())
    assert (played.followed, played.refusals, made.loaded.config.models.keys()) == ([], 1, {"m"})


def test_what_has_no_room_is_refused_and_not_written(tmp_path: Path):
    made, played, file = reloader(tmp_path)
    played.has_room = False
    with pytest.raises(ServeError):
        asyncio.run(made.put_model("m", SETTINGS))
    assert (played.followed, file.read_text()) == ([], ONE)


def test_a_model_that_is_put_is_written_as_it_was_given_and_followed_with_its_secret(tmp_path: Path):
    made, played, file = reloader(tmp_path)
    asyncio.run(made.put_model("m", SETTINGS))
    assert played.followed == ["http://put/v1"]
    assert "${KEY}" in file.read_text()
    assert "# kept" in file.read_text()
    assert "sk-sentinel" not in file.read_text()
    key = made.loaded.config.models["m"].endpoints[0].api_key
    assert key
    assert key.reveal() == "sk-sentinel"
    assert [shown.settings["endpoints"][0]["api_key"] for shown in made.models()] == ["${KEY}"]


def test_a_server_that_others_reach_keeps_its_keys_whatever_host_the_file_names_now(tmp_path: Path):
    made, played, file = reloader(tmp_path, "server: {host: 0.0.0.0, api_keys: [k]}\n" + ONE)
    file.write_text("server: {host: 127.0.0.1}\n" + ONE)
    with pytest.raises(ConfigError, match=r"polyvox.yaml:1: server.host: 0.0.0.0 can be reached"):
        asyncio.run(made.reload())
    assert played.followed == []


# Watching


def watched(made: Reloader, story: Coroutine[Any, Any, None], asked: asyncio.Event | None = None) -> None:
    """Run a story while the file is watched."""

    async def both() -> None:
        watching = asyncio.create_task(made.watch(asked or asyncio.Event()))
        try:
            await story
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    asyncio.run(both())


def test_what_was_written_while_the_server_started_is_followed(tmp_path: Path):
    made, played, _ = reloader(tmp_path, ONE, now=TWO)
    watched(made, eventually(lambda: played.followed == ["http://two/v1"]))


def test_a_model_that_is_put_is_followed_once_and_what_is_written_then_as_well(tmp_path: Path):
    made, played, file = reloader(tmp_path)

    async def story() -> None:
        await made.put_model("m", SETTINGS)
        file.write_text(TWO)
        await eventually(lambda: len(played.followed) == 2)

    watched(made, story())
    assert played.followed == ["http://put/v1", "http://two/v1"]


def test_a_bad_file_is_told_once_and_a_good_one_after_it_is_followed(tmp_path: Path):
    made, played, file = reloader(tmp_path)

    async def story() -> None:
        file.write_text("models: [")
        await eventually(lambda: bool(played.said))
        file.unlink()
        file.write_text(TWO)
        await eventually(lambda: bool(played.followed))

    watched(made, story())
    assert played.said[0].startswith("the new configuration is refused, the one before stays: ")
    assert played.said[1:] == ["configuration 2: changed model m"]


def test_an_unwatched_file_is_followed_when_somebody_asks(tmp_path: Path):
    made, played, _ = reloader(tmp_path, "server: {watch: false}\n" + ONE, now="server: {watch: false}\n" + TWO)
    asked = asyncio.Event()

    async def story() -> None:
        asked.set()
        await eventually(lambda: played.followed == ["http://two/v1"])

    watched(made, story(), asked)


def test_whatever_is_in_the_file_the_server_goes_on(tmp_path: Path):
    made, played, file = reloader(tmp_path)

    async def story() -> None:
        file.write_text("[" * 20_000)
        asked.set()
        await eventually(lambda: not asked.is_set())
        file.write_text(TWO)
        await eventually(lambda: bool(played.followed))

    asked = asyncio.Event()
    watched(made, story(), asked)
    assert played.followed == ["http://two/v1"]
