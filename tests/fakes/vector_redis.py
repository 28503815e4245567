"""A server that speaks RESP3 and has the vector sets of Redis 8, of which no wheel carries a server.

Replies and errors are as the documentation of the commands has them; neighbours are exact, not approximate.
"""

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

Reply = bytes | str | int | float | None | list["Reply"] | dict[bytes, float] | Exception


class VectorRedis:
    """Its sets, and the commands it was given."""

    def __init__(self) -> None:
        self.sets: dict[bytes, dict[bytes, tuple[float, ...]]] = {}
        self.expiries: dict[bytes, int] = {}
        self.port = 0

    def __repr__(self) -> str:
        return f"<VectorRedis {len(self.sets)} sets>"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(_encoded(self._answer(await _command(reader))))
        except asyncio.IncompleteReadError:
            writer.close()

    def _answer(self, words: list[bytes]) -> Reply:
        name, *arguments = words
        answers: dict[bytes, Callable[..., Reply]] = {
            b"HELLO": lambda *_: ["server", "redis", "version", "8.0.0", "proto", 3],
            b"COMMAND": lambda _, command: [[command.lower(), -5]],
            b"VADD": self._add, b"VSIM": self._similar, b"VREM": self._remove,
            b"VCARD": lambda key: len(self.sets.get(key, {})),
            b"VRANDMEMBER": lambda key, count: list(self.sets.get(key, {}))[: int(count)],
            b"PEXPIRE": self._expire,
            b"UNLINK": lambda key: int(self.sets.pop(key, None) is not None),
        }  # fmt: skip
        try:
            return answers[name.upper()](*arguments)
        except KeyError:
            return ValueError(f"unknown command '{name.decode()}'")
        except ValueError as e:
            return e

    def _expire(self, key: bytes, milliseconds: bytes) -> int:
        self.expiries[key] = int(milliseconds)
        return 1

    def _add(self, key: bytes, form: bytes, data: bytes, element: bytes, *options: bytes) -> int:
        assert (form, options) == (b"FP32", (b"NOQUANT",))
        found, vector = self.sets.setdefault(key, {}), self._vector(key, data)
        new = element not in found
        found[element] = vector
        return int(new)

    def _similar(self, key: bytes, form: bytes, data: bytes, *options: bytes) -> dict[bytes, float]:
        assert (form, options) == (b"FP32", (b"WITHSCORES", b"COUNT", b"1"))
        vector = self._vector(key, data)
        scores = {name: (1 + _cosine(vector, other)) / 2 for name, other in self.sets.get(key, {}).items()}
        best = max(scores, key=lambda name: scores[name], default=None)
        return {} if best is None else {best: scores[best]}

    def _remove(self, key: bytes, element: bytes) -> int:
        return int(self.sets.get(key, {}).pop(element, None) is not None)

    def _vector(self, key: bytes, data: bytes) -> tuple[float, ...]:
        vector = struct.unpack(f"<{len(data) // 4}f", data)
        size = len(next(iter(self.sets.get(key, {}).values()), vector))
        if len(vector) != size:
            raise ValueError(f"Vector dimension mismatch - got {len(vector)} but set has {size}")
        return vector


@asynccontextmanager
async def vector_redis() -> AsyncIterator[VectorRedis]:
    """Serve on a free port of the loopback."""
    fake = VectorRedis()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    async with server:
        yield fake


def _cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


async def _command(reader: asyncio.StreamReader) -> list[bytes]:
    count = int((await reader.readuntil(b"\r\n"))[1:])
    words = []
    for _ in range(count):
        size = int((await reader.readuntil(b"\r\n"))[1:])
        words.append((await reader.readexactly(size + 2))[:-2])
    return words


def _encoded(reply: Reply) -> bytes:
    match reply:
        case None:
            return b"_\r\n"
        case Exception():
            return b"-ERR %b\r\n" % str(reply).encode()
        case int():
            return b":%d\r\n" % reply
        case float():
            return b",%b\r\n" % repr(reply).encode()
        case dict():
            return b"%%%d\r\n" % len(reply) + b"".join(_encoded(k) + _encoded(v) for k, v in reply.items())
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(map(_encoded, reply))
    data = reply.encode() if isinstance(reply, str) else reply
    return b"$%d\r\n%b\r\n" % (len(data), data)
