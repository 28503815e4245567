"""Rows on disk, on their way to the database: segments of lines, each with a checksum, only ever appended to.

A writer holds a lock on the segment it appends to, which ends with it, however it ends. A segment that nobody holds is
complete, but for a last line that may have been cut; it is removed once its rows are safe elsewhere.
"""

import contextlib
import fcntl
import os
import secrets
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from proxy.ledger import Row

_SUFFIX = ".rows"
_SEGMENT = 4 * 1024 * 1024  # bytes, after which another segment is begun
_PIECE = 256 * 1024  # bytes read at once

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Row).decode


class JournalFull(OSError):
    """The journal is as large as it may be: the database has been away for long."""


class Writer:
    """Appends rows to segments of its own."""

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes that all segments in the folder may have together, those of other writers included."""
        self._folder = folder
        self._limit = limit
        # All mutable state: the open segment, -1 for none, and its bytes.
        self._segment = -1
        self._size = 0

    def __repr__(self) -> str:
        return f"<Writer in {self._folder}, {self._size} bytes in its segment>"

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows; when this returns they are on disk. Raises OSError, and then none of them counts as written."""
        data = b"".join([_line(row) for row in rows])
        if size(self._folder) + len(data) > self._limit:
            raise JournalFull(f"the journal in {self._folder} has reached its {self._limit} bytes")
        if self._segment < 0 or self._size + len(data) > _SEGMENT:
            self._begin()
        try:
            _write_all(self._segment, data)
            os.fdatasync(self._segment)
        except OSError:
            self.close()  # what came of them is cut, or comes again under the same ids
            raise
        self._size += len(data)

    def close(self) -> None:
        """Give the segment to whoever reads."""
        if self._segment >= 0:
            os.close(self._segment)
        self._segment, self._size = -1, 0

    def _begin(self) -> None:
        self.close()
        for folder in (self._folder.parent, self._folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{time.time_ns()}-{secrets.token_hex(4)}"
        hidden = self._folder / f".{name}"
        self._segment = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        fcntl.flock(self._segment, fcntl.LOCK_EX)
        hidden.rename(self._folder / (name + _SUFFIX))  # seen only once it is locked
        _sync_folder(self._folder)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def segments(folder: Path) -> list[Path]:
    """Return the segments of all writers, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if path.suffix == _SUFFIX and path.name[0] != ".")
    return []


def size(folder: Path) -> int:
    """Return the bytes of all segments."""
    total = 0
    for path in segments(folder):
        with contextlib.suppress(FileNotFoundError):  # it was removed just now
            total += path.stat().st_size
    return total


def read(path: Path, offset: int) -> tuple[list[Row], int]:
    """Return the rows of whole lines from an offset on, some at a time, and where they end.

    A line whose checksum does not agree is left out. No progress of the offset means that there is no more.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(_PIECE)
    end = data.rfind(b"\n") + 1
    return [row for line in data[:end].splitlines() if (row := _row(line)) is not None], offset + end


def is_complete(path: Path) -> bool:
    """Say whether nobody appends to a segment any more. Ask before the last reading of it."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _line(row: Row) -> bytes:
    data = _encode(row)
    return b"%08x %b\n" % (zlib.crc32(data), data)


def _row(line: bytes) -> Row | None:
    checksum, _, data = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(data):
        return None
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _decode(data)
    return None


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
