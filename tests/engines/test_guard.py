"""The guard, run as the process that it is, around a scripted engine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines import guard
from engines.guard import NOT_STARTED, RotatingLog, descendants, process_table
from tests.fakes.fleet import SCRIPT, eventually, run

MARK = "GUARD_TEST"


class Guarded:
    """A guard process and the scripted engine that it runs."""

    def __init__(self, folder: Path, *flags: str, argv: list[str] | None = None, **order: Any) -> None:
        self.log = folder / "engine.log"
        self.socket = folder / "engine.sock"
        self.mark = f"{MARK}={folder}"
        name, value = self.mark.split("=", 1)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, name: value},
        )
        script = [sys.executable, "-I", "-S", str(SCRIPT), "--uds", str(self.socket), "--model", "m", *flags]
        whole = {"argv": argv or script, "log": str(self.log), "parent": os.getpid(), "socket": str(self.socket)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**whole, **order}).encode() + b"\n")
        self.process.stdin.flush()
        self.server = int(self.process.stdout.readline() or 0)

    def members(self) -> set[int]:
        """All processes of the engine that are alive, the guard not counted."""
        return {pid for pid in _marked(self.mark) if pid != self.process.pid}

    def until_listening(self) -> "Guarded":
        run(eventually(self.socket.exists))
        return self

    def status(self) -> int:
        return self.process.wait(60)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def _marked(mark: str) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
        except OSError:
            continue


Start = Callable[..., Guarded]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Guarded] = []

    def begin(*flags: str, **order: Any) -> Guarded:
        started.append(Guarded(tmp_path, *flags, **order))
        return started[-1]

    yield begin
    for guarded in started:
        guarded.process.send_signal(signal.SIGINT)
        guarded.status()
        guarded.close()
        assert guarded.members() == set()


def test_the_guard_exits_with_the_status_of_the_engine(start: Start) -> None:
    assert start("--exit-at-start", "7").status() == 7


def test_a_server_that_is_killed_takes_all_its_descendants_with_it(start: Start) -> None:
    guarded = start().until_listening()
    run(eventually(lambda: len(guarded.members()) == 5))
    os.kill(guarded.server, signal.SIGKILL)
    assert guarded.status() == 128 + signal.SIGKILL
    assert guarded.members() == set()


def test_sigterm_ends_the_engine_politely(start: Start) -> None:
    guarded = start(grace=60).until_listening()
    guarded.process.terminate()
    assert guarded.status() == 128 + signal.SIGTERM
    assert guarded.members() == set()


def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace(start: Start) -> None:
    guarded = start("--ignore-sigterm", grace=0.1).until_listening()
    guarded.process.terminate()
    assert guarded.status() == 128 + signal.SIGKILL
    assert guarded.members() == set()


def test_sigint_ends_the_engine_without_grace(start: Start) -> None:
    guarded = start("--ignore-sigterm", grace=3600).until_listening()
    guarded.process.send_signal(signal.SIGINT)
    assert guarded.status() == 128 + signal.SIGKILL


def test_a_second_order_to_end_can_only_shorten_the_grace(start: Start) -> None:
    guarded = start("--ignore-sigterm", grace=3600, orphan_grace=0.1).until_listening()
    guarded.process.terminate()
    guarded.close()
    assert guarded.status() == 128 + signal.SIGKILL


def test_the_end_of_the_lifeline_ends_the_engine(start: Start) -> None:
    guarded = start("--ignore-sigterm", orphan_grace=0.1).until_listening()
    guarded.close()
    assert guarded.status() == 128 + signal.SIGKILL
    assert guarded.members() == set()


def test_an_engine_whose_supervisor_is_another_process_by_now_is_ended(start: Start) -> None:
    assert start(parent=1, orphan_grace=3600).status() == 128 + signal.SIGTERM


def test_stopped_processes_are_ended_too(start: Start) -> None:
    guarded = start(grace=0.1).until_listening()
    run(eventually(lambda: len(guarded.members()) == 5))
    for pid in guarded.members():
        os.kill(pid, signal.SIGSTOP)
    guarded.process.terminate()
    guarded.status()
    assert guarded.members() == set()


def test_a_stale_socket_file_is_removed_before_the_start_and_after_the_end(start: Start, tmp_path: Path) -> None:
    stale = tmp_path / "engine.sock"
    stale.write_text("left by an earlier engine")
    guarded = start()
    run(eventually(lambda: stale.is_socket()))
    os.kill(guarded.server, signal.SIGKILL)
    guarded.status()
    assert not stale.exists()


def test_a_program_that_cannot_be_run_is_named_in_the_log(start: Start) -> None:
    guarded = start(argv=["/nowhere/python"])
    assert guarded.status() == NOT_STARTED
    assert guarded.server == 0
    assert "cannot run /nowhere/python: No such file or directory" in guarded.log.read_text()


def test_a_guard_without_an_order_starts_nothing() -> None:
    argv = [sys.executable, "-I", "-S", guard.__file__]
    assert subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode == NOT_STARTED


def test_stdout_and_stderr_of_the_engine_are_in_the_log_to_the_last_line(start: Start) -> None:
    guarded = start("--exit-at-start", "1")
    guarded.status()
    text = guarded.log.read_text()
    assert "Starting to load model" in text
    assert text.endswith("ValueError: the scripted reason\n")


def test_the_log_is_rotated_between_lines_and_bounded(start: Start) -> None:
    guarded = start("--chatter", "2000", "--exit-at-start", "0", log_bytes=4000, log_files=2)
    guarded.status()
    files = [guarded.log.with_name(f"engine.log{end}") for end in (".2", ".1", "")]
    assert sorted(guarded.log.parent.glob("engine.log*")) == sorted(files)
    assert all(file.stat().st_size <= 4000 for file in files)
    lines = "".join(file.read_text() for file in files).splitlines()
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert numbers == list(range(numbers[0], 2000))


def test_an_earlier_log_is_continued(start: Start, tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_text("from before\n")
    guarded = start("--exit-at-start", "0")
    guarded.status()
    assert guarded.log.read_text().startswith("from before\n==== polyvox: engine starts")


def test_a_log_that_cannot_be_written_does_not_raise(tmp_path: Path) -> None:
    log = RotatingLog(str(tmp_path / "missing" / "engine.log"), limit=100, keep=1)
    log.write(b"lost\n")
    assert list(tmp_path.iterdir()) == []


def test_descendants_are_found_whatever_a_process_is_called(tmp_path: Path) -> None:
    odd = tmp_path / "x) Z 1 1 (y"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(odd), "60"])
    try:
        run(eventually(lambda: "x) Z" in Path(f"/proc/{child.pid}/comm").read_text()))
        assert child.pid in descendants(os.getpid(), process_table())
    finally:
        child.kill()
        child.wait()
