"""What the parent process and a worker say to each other over the worker's standard input, a socket.

The parent sends orders, again with each new configuration; the worker answers each but the first when it follows them.
Each is a frame: its size, then itself.
"""

import asyncio
import socket
from typing import Self

import msgspec

from proxy.shared import Slot

_SIZE_BYTES = 4


class _Frame(msgspec.Struct, frozen=True):
    def frame(self) -> bytes:
        """Return this as the other side reads it."""
        data = msgspec.msgpack.encode(self)
        return len(data).to_bytes(_SIZE_BYTES, "big") + data

    @classmethod
    def take(cls, line: socket.socket) -> Self:
        """Read one from a socket that blocks, and nothing of what is behind it."""
        size = int.from_bytes(line.recv(_SIZE_BYTES, socket.MSG_WAITALL), "big")
        return msgspec.msgpack.decode(line.recv(size, socket.MSG_WAITALL), type=cls)

    @classmethod
    async def read(cls, line: asyncio.StreamReader) -> Self:
        """Wait for one. Raises EOFError or OSError when the other side is gone."""
        size = int.from_bytes(await line.readexactly(_SIZE_BYTES), "big")
        return msgspec.msgpack.decode(await line.readexactly(size), type=cls)


class Orders(_Frame, frozen=True):
    """config: as `config.encode` gives it, secrets included, which is why it goes by a socket.

    generation: of the configuration; grows with each. given: see shared.Slots. worker: its number, from 0. metrics_fd:
    the memory that all workers count in. board_fd: that in which they see each other's load. cache_fd: that in
    which they tell each other of their caches. ledger: the folder of the ledger, for a server that keeps one.
    capabilities: the folder of findings.
    """

    config: bytes
    generation: int
    given: tuple[Slot, ...]
    control_socket: str
    listen_fd: int
    metrics_fd: int
    board_fd: int
    cache_fd: int
    worker: int
    ledger: str
    capabilities: str


class Followed(_Frame, frozen=True):
    """A worker has done as ordered; failed: it could not, and is to be replaced."""

    generation: int
    failed: bool = False
