"""Reading the logs of engines, which the guard writes and rotates."""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

from engines.guard import BANNER

_TAIL_BYTES: Final = 256 * 1024
_CHUNK: Final = 64 * 1024


def slug(engine: str) -> str:
    """Return a file name for an engine id, different for different ids: `smollm2/0` -> `smollm2-0`."""
    model, _, replica = engine.rpartition("/")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", model):
        return f"{model}-{replica}"
    digest = hashlib.sha256(engine.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('.-')[:40]}-{replica}-{digest}"


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines of a log, over one rotation; none when there is no log."""
    text = _end_of(path, _TAIL_BYTES)
    if text.count(b"\n") < lines:
        text = _end_of(path.with_name(path.name + ".1"), _TAIL_BYTES) + text
    return text.decode(errors="replace").splitlines()[-lines:] if lines > 0 else []


def tail_of_run(path: Path, lines: int, window: int = _TAIL_BYTES) -> list[str]:
    """Return the last lines that the engine's latest start wrote; `window` bounds the bytes looked at."""
    text = _end_of(path, window)
    return text[max(text.rfind(BANNER), 0) :].decode(errors="replace").splitlines()[-lines:]


async def follow(path: Path, lines: int, every: float = 0.25) -> AsyncIterator[bytes]:
    """Yield the last lines of a log, then what is written to it, for ever, over rotations.

    every: seconds between looks.
    """
    file = _opened(path)
    if file is not None:
        _seek_lines(file, lines)
    try:
        while True:
            rotated = file is None or _rotated(path, file)  # asked first: a file that was moved away is complete
            if file is not None and (data := file.read(_CHUNK)):
                yield data
            elif rotated and (fresh := _opened(path)) is not None:
                if file is not None:
                    file.close()
                file = fresh
            else:
                await asyncio.sleep(every)
    finally:
        if file is not None:
            file.close()


def _opened(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _end_of(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read()
    except FileNotFoundError:
        return b""


def _seek_lines(file: BinaryIO, lines: int) -> None:
    """Go to where the last lines begin."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    last = b"".join(file.read().splitlines(keepends=True)[-lines:]) if lines > 0 else b""
    file.seek(size - len(last))


def _rotated(path: Path, file: BinaryIO) -> bool:
    try:
        return path.stat().st_ino != os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False
