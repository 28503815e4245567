"""What the steps before an engine can start share: saying how far they are, a lock, a child process, free disk.

These children (the installer, the downloader, the converter) end with the task that runs them.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import msgspec

Report = Callable[[str, float | None], None]
"""Told what is being done, and which share of it is done (0 to 1; None where nobody knows)."""

GIB = 2**30
_TAIL_LINES = 12
_LOCK_POLL = 0.1  # seconds; flock has no way to be awaited and cancelled
_UNWANTED = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


class PreparationError(Exception):
    """An engine cannot be started yet; the text says what is missing and what to do."""


class ChildFailed(PreparationError):
    """A child process ended with a status other than 0; `tail` is the last it said."""

    def __init__(self, status: int, tail: str) -> None:
        super().__init__(f"exit status {status}: {tail or 'it said nothing'}")
        self.status = status
        self.tail = tail


class Step(msgspec.Struct, frozen=True):
    """One line from our own scripts in an engine's interpreter. `error` is for a person, and final."""

    detail: str = ""
    progress: float | None = None
    error: str | None = None


def child_environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """Our environment without what would lead another interpreter astray.

    PYTHONDONTWRITEBYTECODE is dropped too: without bytecode every start of an engine takes half a minute more.
    """
    return {k: v for k, v in os.environ.items() if k not in _UNWANTED} | dict(extra)


async def run(
    argv: tuple[str, ...],
    environment: Mapping[str, str],
    on_line: Callable[[str], None] = lambda _: None,
    keep_open: int | None = None,
) -> None:
    """Run a child to its end and hand each line it prints to on_line; cancelling ends the child and its children.

    keep_open: a lock's descriptor that the child inherits, so that the lock outlives us for as long as it works.
    Raises ChildFailed.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**20,
        start_new_session=True,
        pass_fds=() if keep_open is None else (keep_open,),
    )
    try:
        tail = await _lines(process, on_line)
        status = await process.wait()
    finally:
        await _end(process)
    if status != 0:
        raise ChildFailed(status, "\n".join(tail))


async def run_script(
    interpreter: Path,
    script: str,
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    report: Report,
    keep_open: int | None = None,
) -> None:
    """Run one of our scripts with an engine's interpreter; it prints a Step as JSON per line.

    Raises PreparationError with the script's own words, or ChildFailed if it had none.
    """
    errors: list[str] = []

    def on_line(line: str) -> None:
        step = _step(line)
        if step is not None and step.error is not None:
            errors.append(step.error)
        elif step is not None:
            report(step.detail, step.progress)

    # -I keeps our folder off the script's sys.path, where our module names would hide those of libraries.
    argv = (str(interpreter), "-I", str(Path(__file__).with_name(script)), *arguments)
    try:
        await run(argv, environment, on_line, keep_open)
    except ChildFailed as failure:
        if errors:
            raise PreparationError(errors[-1]) from failure
        raise


@contextlib.asynccontextmanager
async def exclusive(lock: Path, report: Report, waiting: str) -> AsyncIterator[int]:
    """Hold an exclusive lock between processes; says `waiting` once where another one has it. Gives its descriptor."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _try_lock(descriptor):
            report(waiting, None)
            while not _try_lock(descriptor):  # noqa: ASYNC110 (a file lock cannot be awaited)
                await asyncio.sleep(_LOCK_POLL)
        yield descriptor
    finally:
        os.close(descriptor)


def require_free_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raise PreparationError with both figures where `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PreparationError(
            f"{purpose} needs {needed / GIB:.1f} GiB of disk, but {folder} has {free / GIB:.1f} GiB free: "
            "make room, or choose another folder with --data-dir"
        )


def without_credentials(text: str) -> str:
    """Text without the `user:password@` of addresses in it."""
    return _CREDENTIALS.sub("***@", text)


async def _lines(process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> list[str]:
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    async for raw in process.stdout:
        line = without_credentials(raw.decode(errors="replace").rstrip())
        if line:
            tail.append(line)
            on_line(line)
    return list(tail)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _step(line: str) -> Step | None:
    try:
        return msgspec.json.decode(line, type=Step)
    except msgspec.MsgspecError:
        return None


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
