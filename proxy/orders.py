"""What the parent process hands to a worker, over the worker's standard input."""

from typing import BinaryIO, Self

import msgspec

_SIZE_BYTES = 4


class Orders(msgspec.Struct, frozen=True):
    """config: as `config.encode` gives it, secrets included, which is why it goes by a pipe.

    worker: its number, from 0. metrics_fd: the memory that all workers count in. board_fd: that in which they see each
    other's load. ledger: the folder of the ledger, for a server that keeps one. capabilities: the folder of findings.
    """

    config: bytes
    control_socket: str
    listen_fd: int
    metrics_fd: int
    board_fd: int
    worker: int
    ledger: str
    capabilities: str

    def frame(self) -> bytes:
        """Return the orders as `read` takes them: their size, then themselves."""
        data = msgspec.msgpack.encode(self)
        return len(data).to_bytes(_SIZE_BYTES, "big") + data

    @classmethod
    def read(cls, stream: BinaryIO) -> Self:
        """Read orders, and leave the stream open behind them."""
        size = int.from_bytes(stream.read(_SIZE_BYTES), "big")
        return msgspec.msgpack.decode(stream.read(size), type=cls)
