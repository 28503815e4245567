"""The supervisor, over real processes: scripted engines that crash, hang, fork and refuse to go."""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from engines.lifecycle import IllegalMove
from engines.logs import follow, slug, tail
from engines.marks import VARIABLE, mark, state_id
from engines.spec import EngineSpec, EngineStatus, Launch, Restart
from engines.supervisor import AlreadyRunning, Supervisor, UnknownEngine
from tests.fakes.fleet import (
    NEVER,
    QUICK,
    TREE,
    Fleet,
    Scripted,
    engine_spec,
    eventually,
    run,
    state_paths,
    supervised,
)

ROOT = Path(__file__).parents[2]

Story = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run_on(request: pytest.FixtureRequest) -> Story:
    """Run a story on each of the event loops that a server may use."""
    if request.param == "asyncio":
        return run
    return lambda story: uvloop.run(asyncio.wait_for(story, 120))


def _exists(pid: int) -> bool:
    return Path("/proc", str(pid)).exists()


def _environment(pid: int) -> dict[str, str]:
    entries = Path("/proc", str(pid), "environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


# --- start ---


def test_an_engine_is_ready_when_it_is_healthy_and_lists_its_model(tmp_path: Path, run_on: Story) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            status = await fleet.until_whole()
            assert status.context_length == 2048
            assert status.address == f"unix:{tmp_path}/run/tiny-0.sock"
            assert status.restarts == 0

    run_on(story())


def test_closing_leaves_no_process_and_no_socket(tmp_path: Path, run_on: Story) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_whole()
        assert fleet.status().state == "stopped"
        assert fleet.processes() == set()
        assert not (tmp_path / "run" / "tiny-0.sock").exists()

    run_on(story())


def test_engines_start_together_and_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        paths = state_paths(tmp_path)
        script = Scripted(paths)

        async def prepare(spec: EngineSpec, report: Callable[[str, float | None], None]) -> Launch:
            if spec.model == "broken":
                raise RuntimeError("needs 24 GiB, there are 14 GiB")
            return await script(spec, report)

        specs = (engine_spec("tiny"), engine_spec("broken"), engine_spec("tiny", replica=1))
        supervisor = Supervisor(specs, paths, prepare, QUICK)
        await supervisor.start()
        fleet = Fleet(supervisor, script)
        try:
            await fleet.until_state("ready", "tiny/0")
            await fleet.until_state("ready", "tiny/1")
            failed = await fleet.until_state("failed", "broken/0")
            assert failed.detail == "needs 24 GiB, there are 14 GiB"
            assert failed.retry_at is None
        finally:
            await supervisor.close()

    run(story())


def test_what_prepare_reports_is_seen_in_the_status(tmp_path: Path) -> None:
    async def story() -> None:
        paths = state_paths(tmp_path)
        go_on = asyncio.Event()

        async def prepare(spec: EngineSpec, report: Callable[[str, float | None], None]) -> Launch:
            report("fetching weights", 0.5)
            await go_on.wait()
            return await Scripted(paths)(spec, report)

        supervisor = Supervisor((engine_spec(),), paths, prepare, QUICK)
        await supervisor.start()
        fleet = Fleet(supervisor, Scripted(paths))
        status = await fleet.until(lambda status: status.progress is not None)
        assert (status.state, status.detail, status.progress) == ("starting", "fetching weights", 0.5)
        go_on.set()
        assert (await fleet.until_state("ready")).progress is None
        await supervisor.close()

    run(story())


def test_while_an_engine_loads_the_status_tells_what_its_log_says(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, flags=("--never-ready",)) as fleet:
            status = await fleet.until(lambda status: "configuration" in status.detail)
            assert status.detail.startswith("reading the model's configuration (")

    run(story())


def test_an_engine_that_is_not_ready_in_time_fails_with_the_end_of_its_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        spec = engine_spec(start_timeout=0.2)
        async with supervised(tmp_path, spec, flags=("--never-ready",)) as fleet:
            status = await fleet.until_state("failed")
            assert status.detail.startswith("not ready within 0.2 s (start_timeout); the end of its log:")
            assert status.retry_at is None
            await eventually(lambda: fleet.processes() == set())

    run(story())
    assert not [record for record in caplog.records if record.exc_info]


def test_a_program_that_cannot_be_run_fails_the_engine_without_a_restart_loop(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(autostart=False)) as fleet:
            fleet.script.interpreter = "/nowhere/python"
            await fleet.supervisor.load("tiny")
            status = await fleet.until_state("failed")
            assert "cannot run /nowhere/python: No such file or directory" in status.detail
            assert status.retry_at is None

    run(story())


def test_the_engine_gets_our_environment_without_secrets_and_with_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("POLYVOX_SERVER__API_KEYS", "OPENAI_API_KEY", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "sentinel")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("HF_TOKEN", "for the hub")
    monkeypatch.setenv("ORDINARY", "kept")

    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_state("ready")
            environment = _environment(fleet.pid())
            assert "sentinel" not in environment.values()
            assert "PYTHONDONTWRITEBYTECODE" not in environment
            assert environment["HF_TOKEN"] == "for the hub"
            assert environment["ORDINARY"] == "kept"
            assert environment["FROM_LAUNCH"] == "1"
            assert environment["SPT_NOENV"] == "1"
            assert environment[VARIABLE] == f"{state_id(fleet.script.paths)}:tiny/0"

    run(story())


# --- crashes and hangs ---


def test_a_crashed_engine_is_restarted_and_ready_again(tmp_path: Path, run_on: Story) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(restart=Restart(first_delay=0.2))) as fleet:
            await fleet.until_whole()
            first = fleet.processes()
            await fleet.ask("/set?exit=3")
            status = await fleet.until(lambda status: status.retry_at is not None)
            assert status.state == "failed"
            assert status.detail.startswith("exited with code 3; the end of its log:")
            await fleet.until_restarted()
            assert not first & fleet.processes()

    run_on(story())


def test_a_killed_server_takes_its_descendants_with_it_and_is_restarted(tmp_path: Path, run_on: Story) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_whole()
            first = fleet.processes()
            os.kill(fleet.pid(), signal.SIGKILL)
            await fleet.until_restarted()
            assert not first & fleet.processes()

    run_on(story())


def test_a_killed_guard_takes_the_whole_engine_with_it_and_is_restarted(tmp_path: Path, run_on: Story) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(restart=Restart(first_delay=0.2))) as fleet:
            await fleet.until_whole()
            first = fleet.processes()
            guard = os.getsid(fleet.pid())
            os.kill(guard, signal.SIGKILL)
            status = await fleet.until(lambda status: status.retry_at is not None)
            assert status.detail.startswith("its guard process was ended by SIGKILL")
            assert not any(map(_exists, first))
            await fleet.until_restarted()

    run_on(story())


def test_a_crash_loop_is_given_up_with_the_end_of_the_log(tmp_path: Path) -> None:
    async def story() -> None:
        spec = engine_spec(restart=Restart(first_delay=0.01, give_up_after=3))
        async with supervised(tmp_path, spec, flags=("--exit-at-start", "1")) as fleet:
            status = await fleet.until(lambda status: status.detail.startswith("gave up"))
            assert status.state == "failed"
            assert status.retry_at is None
            assert status.detail.startswith("gave up after 3 crashes within 600 s: exited with code 1")
            assert status.detail.endswith("ValueError: the scripted reason")
            assert fleet.script.prepared == 3

    run(story())


def test_an_engine_that_was_given_up_can_be_loaded_by_hand(tmp_path: Path) -> None:
    async def story() -> None:
        spec = engine_spec(restart=Restart(give_up_after=1))
        async with supervised(tmp_path, spec, flags=("--exit-at-start", "1")) as fleet:
            await fleet.until(lambda status: status.detail.startswith("gave up"))
            fleet.script.flags = ()
            await fleet.supervisor.load("tiny")
            assert (await fleet.until_state("ready")).restarts == 0

    run(story())


def test_loading_an_engine_that_waits_for_its_restart_starts_it_now(tmp_path: Path) -> None:
    async def story() -> None:
        spec = engine_spec(restart=Restart(first_delay=NEVER, max_delay=NEVER))
        async with supervised(tmp_path, spec) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?exit=3")
            await fleet.until(lambda status: status.retry_at is not None)
            await fleet.supervisor.load("tiny")
            assert (await fleet.until_state("ready")).retry_at is None

    run(story())


def test_an_engine_that_stands_still_with_requests_in_flight_is_restarted(tmp_path: Path) -> None:
    async def story() -> None:
        spec = engine_spec(hang_timeout=1.0, restart=Restart(first_delay=0.2))
        async with supervised(tmp_path, spec) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?running=1&stuck=1")
            status = await fleet.until_state("failed")
            assert status.detail.startswith("hung: requests are in flight, none moves for 1 s (hang_timeout)")
            await fleet.until_restarted()

    run(story())


def test_an_engine_that_does_not_answer_is_restarted(tmp_path: Path) -> None:
    async def story() -> None:
        spec = engine_spec(hang_timeout=1.0, restart=Restart(first_delay=0.2))
        async with supervised(tmp_path, spec) as fleet:
            await fleet.until_whole()
            first = fleet.processes()
            (tmp_path / "run" / "tiny-0.sock").unlink()
            status = await fleet.until_state("failed")
            assert status.detail.startswith("hung: it does not answer for 1 s (hang_timeout)")
            await fleet.until_restarted()
            assert not first & fleet.processes()

    run(story())


def test_an_engine_that_hangs_while_it_is_idle_is_found_out_and_restarted(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(hang_timeout=1.0)) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?wedged=1")
            await fleet.until_restarted()

    run(story())


def test_an_engine_that_says_it_is_dead_is_restarted_without_waiting_for_its_end(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?dead=1")
            await fleet.until_restarted()

    run(story())


def test_the_death_of_a_member_is_looked_into_at_once(tmp_path: Path, run_on: Story) -> None:
    async def story() -> None:
        pace = msgspec.structs.replace(QUICK, watching=NEVER)
        async with supervised(tmp_path, pace=pace) as fleet:
            await fleet.until_whole()
            await fleet.ask("/set?dead=1")
            member = max(fleet.processes() - {fleet.pid(), os.getsid(fleet.pid())})
            os.kill(member, signal.SIGKILL)
            await fleet.until_restarted()

    run_on(story())


# --- commands ---


def test_unload_waits_for_the_requests_in_flight_and_stops_the_engine_then(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?running=2")
            await fleet.supervisor.unload("tiny")
            assert fleet.status().state == "draining"
            await _looked_at(fleet, times=5)
            assert fleet.status().state == "draining"
            await fleet.ask("/set?running=0")
            assert (await fleet.until_state("stopped")).address is None
            assert fleet.processes() == set()

    run(story())


def test_a_drain_ends_at_its_limit(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(drain_timeout=0.1)) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?running=1")
            await fleet.supervisor.unload("tiny")
            await fleet.until_state("stopped")

    run(story())


def test_closing_drains_too_and_can_be_hurried(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(drain_timeout=NEVER)) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?running=1")
            closing = asyncio.create_task(fleet.supervisor.close())
            await fleet.until_state("draining")
            assert not closing.done()
            await fleet.supervisor.close(grace=0)
            await closing
            assert fleet.status().state == "stopped"

    run(story())


def test_closing_while_an_engine_drains_lets_it_go_on_draining(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(drain_timeout=NEVER)) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?running=1")
            await fleet.supervisor.unload("tiny")
            closing = asyncio.create_task(fleet.supervisor.close())
            await _looked_at(fleet, times=5)
            assert fleet.status().state == "draining"
            await fleet.ask("/set?running=0")
            await closing
            assert fleet.status().state == "stopped"

    run(story())


def test_an_engine_that_crashes_while_it_drains_is_stopped_and_not_restarted(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(drain_timeout=NEVER)) as fleet:
            await fleet.until_state("ready")
            await fleet.ask("/set?running=1")
            await fleet.supervisor.unload("tiny")
            await fleet.ask("/set?exit=3")
            await fleet.until_state("stopped")
            assert fleet.script.prepared == 1

    run(story())


def test_an_engine_can_be_unloaded_while_it_starts(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, flags=("--never-ready",)) as fleet:
            await fleet.until(lambda status: status.pid is not None)
            await fleet.supervisor.unload("tiny")
            await fleet.until_state("stopped")
            assert fleet.processes() == set()

    run(story())


def test_an_engine_that_is_ended_by_force_still_leaves_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, flags=("--ignore-sigterm",)) as fleet:
            await fleet.until_state("ready")
            await fleet.supervisor.unload("tiny")
            await fleet.until_state("stopped")
            assert fleet.processes() == set()

    run(story())


def test_restart_drains_stops_and_loads_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_state("ready")
            first = fleet.pid()
            await fleet.supervisor.restart("tiny")
            status = await fleet.until_state("ready")
            assert status.pid != first
            assert status.restarts == 0

    run(story())


def test_loading_a_ready_engine_changes_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            before = await fleet.until_state("ready")
            await fleet.supervisor.load("tiny")
            assert fleet.status() == before

    run(story())


def test_a_command_reaches_all_replicas_of_a_model_or_the_one_that_is_named(tmp_path: Path) -> None:
    async def story() -> None:
        specs = [engine_spec("org/tiny", replica, autostart=False) for replica in (0, 1, 2)]
        for spec in specs:
            assert spec.id.startswith("org/tiny/")
        paths = state_paths(tmp_path)
        script = Scripted(paths)

        async def prepare(spec: EngineSpec, report: Callable[[str, float | None], None]) -> Launch:
            launch = await script(msgspec.structs.replace(spec, model="tiny"), report)
            argv = tuple(spec.model if word == "tiny" else word for word in launch.argv)
            return msgspec.structs.replace(launch, argv=argv)

        supervisor = Supervisor(specs, paths, prepare, QUICK)
        await supervisor.start()
        fleet = Fleet(supervisor, script)
        await supervisor.load("org/tiny", 1)
        await supervisor.load("org/tiny/2")
        await fleet.until_state("ready", "org/tiny/1")
        await fleet.until_state("ready", "org/tiny/2")
        assert fleet.status("org/tiny/0").state == "stopped"
        await supervisor.load("org/tiny")
        await fleet.until_state("ready", "org/tiny/0")
        await supervisor.close()

    run(story())


def test_a_command_that_the_state_does_not_allow_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(autostart=False)) as fleet:
            with pytest.raises(IllegalMove, match="unload engine tiny/0 while it is stopped"):
                await fleet.supervisor.unload("tiny")

    run(story())


def test_a_command_to_a_stopping_server_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.supervisor.close()
            with pytest.raises(IllegalMove, match="the server is stopping"):
                await fleet.supervisor.load("tiny")

    run(story())


def test_an_unknown_model_is_refused_with_close_matches(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec("smollm2", autostart=False)) as fleet:
            with pytest.raises(UnknownEngine, match="no local engine serves 'smolm2'; did you mean smollm2"):
                await fleet.supervisor.load("smolm2")

    run(story())


async def _looked_at(fleet: Fleet, times: int) -> None:
    """Wait until the engine's gauges were read so many times from now on."""
    first = int(await fleet.ask("/looks"))
    while True:
        if int(await fleet.ask("/looks")) >= first + times:
            return
        await asyncio.sleep(0.01)


# --- the fleet ---


def test_watching_gives_the_present_first_then_every_change_until_the_close(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec(autostart=False)) as fleet:
            seen: list[EngineStatus] = []
            versions: list[int] = []

            async def look() -> None:
                async for status in fleet.supervisor.watch():
                    seen.append(status.engines[0])
                    versions.append(status.version)

            watchers = [asyncio.create_task(look()), asyncio.create_task(look())]
            await eventually(lambda: len(seen) == 2)
            await fleet.supervisor.load("tiny")
            await fleet.until_state("ready")
            await fleet.supervisor.close()
            await asyncio.gather(*watchers)
            states = list(dict.fromkeys(status.state for status in seen))
            assert states == ["stopped", "starting", "ready", "draining"]
            assert seen[-1].state == "stopped"
            assert versions[-1] == fleet.supervisor.fleet().version

    run(story())


# --- one supervisor, no leftovers ---


def _serve(folder: Path) -> subprocess.Popen[str]:
    """Start a supervisor in a process of its own; return when its engine is ready."""
    argv = [sys.executable, "-m", "tests.fakes.fleet", str(folder)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_supervisor_leaves_no_process(tmp_path: Path) -> None:
    server = _serve(tmp_path)
    fleet = Fleet(
        Supervisor((), state_paths(tmp_path), Scripted(state_paths(tmp_path))), Scripted(state_paths(tmp_path))
    )
    run(eventually(lambda: len(fleet.processes()) == TREE))
    server.kill()
    server.wait()
    run(eventually(lambda: fleet.processes() == set()))


def test_what_an_earlier_run_left_behind_is_ended_before_anything_is_prepared(tmp_path: Path) -> None:
    paths = state_paths(tmp_path)
    paths.create()
    marking = mark(state_id(paths), "tiny/0")
    shell = ["/bin/sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"]
    orphan = subprocess.run(shell, env={VARIABLE: marking}, check=True, capture_output=True, text=True)
    leftover = int(orphan.stdout)
    assert _exists(leftover)
    other = subprocess.Popen(["/bin/sleep", "600"], env={VARIABLE: mark("another", "tiny/0")})

    async def story() -> None:
        async def prepare(spec: EngineSpec, report: Callable[[str, float | None], None]) -> Launch:
            assert not _exists(leftover)
            return await Scripted(paths)(spec, report)

        supervisor = Supervisor((engine_spec(),), paths, prepare, QUICK)
        await supervisor.start()
        await Fleet(supervisor, Scripted(paths)).until_state("ready")
        await supervisor.close()

    try:
        run(story())
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_second_supervisor_of_the_same_folder_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_whole()
            second = Supervisor((engine_spec(),), fleet.script.paths, fleet.script, QUICK)
            with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}.*--state-dir"):
                await second.start()
            await second.close()
            assert len(fleet.processes()) == TREE

    run(story())


def test_the_folder_is_free_again_after_the_close(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_state("ready")
            await fleet.supervisor.close()
            await fleet.supervisor.close()
            with fleet.script.paths.lock.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    run(story())


def test_a_copy_of_a_state_folder_has_another_id(tmp_path: Path) -> None:
    original, copy = state_paths(tmp_path / "a"), state_paths(tmp_path / "b")
    original.create()
    copy.create()
    first = state_id(original)
    (tmp_path / "b" / "id").write_text((tmp_path / "a" / "id").read_text())
    assert state_id(original) == first
    assert state_id(copy) != first


# --- logs ---


@given(st.lists(st.tuples(st.text(max_size=60), st.integers(0, 9)), unique=True, min_size=2, max_size=6))
def test_different_engines_have_different_and_safe_log_names(engines: list[tuple[str, int]]) -> None:
    names = [slug(f"{model}/{replica}") for model, replica in engines]
    assert len(set(names)) == len(names)
    assert all("/" not in name and name not in (".", "..") and len(name) < 80 for name in names)


def test_the_tail_of_a_log_goes_back_over_a_rotation(tmp_path: Path) -> None:
    (tmp_path / "e.log.1").write_text("one\ntwo\n")
    (tmp_path / "e.log").write_text("three\n")
    assert tail(tmp_path / "e.log", 2) == ["two", "three"]
    assert tail(tmp_path / "missing.log", 2) == []


def test_following_a_log_survives_its_rotation(tmp_path: Path) -> None:
    path = tmp_path / "e.log"

    async def story() -> None:
        path.write_text("one\ntwo\n")
        pieces: AsyncIterator[bytes] = follow(path, 1, every=0.01)
        assert await anext(pieces) == b"two\n"
        with path.open("a") as file:
            file.write("three\n")
        path.rename(tmp_path / "e.log.1")
        path.write_text("four\n")
        assert await anext(pieces) == b"three\n"
        assert await anext(pieces) == b"four\n"

    run(story())


# --- other specs ---


def ids(fleet: Fleet) -> list[str]:
    return [engine.id for engine in fleet.supervisor.fleet().engines]


async def leave_busy(fleet: Fleet) -> None:
    """Let an engine go that has a request in flight; return when it drains."""
    await fleet.ask("/set?running=1")
    await fleet.supervisor.follow([])
    await fleet.until_state("draining")


def test_a_new_engine_is_loaded_and_one_that_is_gone_is_drained_and_forgotten(tmp_path: Path, run_on: Story) -> None:
    async def story() -> None:
        async with supervised(tmp_path, engine_spec("old"), engine_spec("kept")) as fleet:
            await fleet.until_state("ready", "old/0")
            kept = (await fleet.until_state("ready", "kept/0")).pid
            await fleet.supervisor.follow([engine_spec("kept"), engine_spec("new")])
            await fleet.until_state("ready", "new/0")
            await eventually(lambda: ids(fleet) == ["kept/0", "new/0"])
            assert fleet.processes("old/0") == set()
            assert fleet.pid("kept/0") == kept
            with pytest.raises(UnknownEngine):
                await fleet.supervisor.load("old")

    run_on(story())


def test_what_is_in_flight_at_an_engine_that_is_gone_is_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_state("ready")
            await leave_busy(fleet)
            assert fleet.processes()
            await fleet.ask("/set?running=0")
            await eventually(lambda: ids(fleet) == [])

    run(story())


def test_an_engine_whose_process_would_be_another_is_restarted_with_its_new_settings(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            before = (await fleet.until_state("ready")).pid
            await fleet.supervisor.follow([engine_spec(args={"max-num-seqs": 3})])
            await fleet.until(lambda status: status.state == "ready" and status.pid != before)
            assert fleet.status().restarts == 0
            assert fleet.script.prepared == 2

    run(story())


@pytest.mark.parametrize(
    "settings", [{"replicas": 2}, {"hang_timeout": 5.0}, {"drain_timeout": 1.0}, {"max_in_flight": 3},
                 {"restart": Restart(give_up_after=2)}, {"autostart": False}, {"start_timeout": 3.0}],
)  # fmt: skip
def test_what_the_process_knows_nothing_of_changes_without_a_restart(tmp_path: Path, settings: dict[str, Any]) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            before = (await fleet.until_state("ready")).pid
            await fleet.supervisor.follow([engine_spec(**settings)])
            assert (fleet.status().state, fleet.pid()) == ("ready", before)
            assert fleet.script.prepared == 1

    run(story())


def test_replicas_change_one_after_the_other(tmp_path: Path) -> None:
    async def story() -> None:
        specs = [engine_spec(replica=i) for i in range(2)]
        async with supervised(tmp_path, *specs) as fleet:
            for spec in specs:
                await fleet.until_state("ready", spec.id)
            before = {spec.id: fleet.pid(spec.id) for spec in specs}
            least = 2
            await fleet.supervisor.follow([engine_spec(replica=i, dtype="float32") for i in range(2)])
            async for seen in fleet.supervisor.watch():
                ready = {e.id: e.pid for e in seen.engines if e.state == "ready"}
                least = min(least, len(ready))
                if len(ready) == 2 and not set(ready.values()) & set(before.values()):
                    break
            assert least == 1

    run(story())


def test_an_engine_that_comes_back_while_it_goes_is_loaded_anew(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            before = (await fleet.until_state("ready")).pid
            await leave_busy(fleet)
            for _ in range(3):
                await fleet.supervisor.follow([engine_spec()])
            await fleet.supervisor.follow([])
            await fleet.supervisor.follow([engine_spec()])
            assert fleet.pid() == before  # what it does has its time, however often it was told to go
            await fleet.ask("/set?running=0")
            await eventually(lambda: ids(fleet) == ["tiny/0"] and fleet.status().state == "ready")
            assert fleet.pid() != before
            assert fleet.script.prepared == 2

    run(story())


def test_closing_ends_engines_that_are_on_their_way_out(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as fleet:
            await fleet.until_state("ready")
            await leave_busy(fleet)
        assert fleet.processes() == set()

    run(story())
