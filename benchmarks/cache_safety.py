"""Proves that the cache gives nobody what is not his. `make bench-cache-safety`

Clients of several API keys ask a few questions again and again, as streams and not, while the upstream and the store
fail at random. Every answer says which key and which question it is for, so each client can tell whether it is its own
and whether it is whole. The upstream counts its generations: where nothing fails, no two for one question of one key
are under way at once. With `--redis`, two replicas share a real Redis, which hangs and dies again and again.
"""

import argparse
import asyncio
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import uvloop

from proxy.cache import Entry
from proxy.cache.memory import MemoryStore
from proxy.cache.settings import CacheSettings
from proxy.cache.shield import Shield
from proxy.config import ApiKey, BreakerSettings, Config, EndpointSettings, ModelSettings, RetrySettings, Server
from proxy.secret import Secret
from tests.cache.redis_server import RedisServer, redis_server
from tests.fakes.one_worker import Proxy, proxying

KEYS = ("key-one", "key-two", "key-three", "key-four")
_PIECES = 6  # of an answer


class Outcome(msgspec.Struct):
    """What came of it. foreign: answers for another key or question. broken: incomplete ones that look complete."""

    requests: int = 0
    foreign: int = 0
    broken: int = 0
    failed: int = 0  # errors that were told: faults are injected
    doubled: int = 0  # generations for one question of one key that were under way at once, without any fault
    generations: int = 0
    results: Counter[str] = msgspec.field(default_factory=Counter)


class FaultyStore(MemoryStore):
    """Forgets at random what it was asked for, and what it was to keep."""

    def __init__(self, chance: random.Random, share: float) -> None:
        super().__init__(64 * 1024 * 1024)
        self._chance, self._share = chance, share

    def get(self, key: bytes) -> Entry | None:
        return None if self._chance.random() < self._share else super().get(key)

    def put(self, key: bytes, entry: Entry, claim: object = None) -> None:
        if self._chance.random() >= self._share:
            super().put(key, entry)


class Upstream:
    """Answers a question with its own words, in a stream or at once; fails at random, at any place."""

    def __init__(self, chance: random.Random, faults: float, outcome: Outcome) -> None:
        self._chance, self._faults, self._outcome = chance, faults, outcome
        # All mutable state: the questions under way, and those of them that failed or came after a failure.
        self.under_way: Counter[bytes] = Counter()
        self.troubled: set[bytes] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if not await self._answer(json.loads(body), writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError, RuntimeError):
            pass  # the proxy has gone: uvloop raises RuntimeError where asyncio writes to nowhere
        finally:
            writer.close()

    async def _answer(self, body: dict[str, object], writer: asyncio.StreamWriter) -> bool:
        question = body["messages"][0]["content"].encode()  # type: ignore[index]
        self._outcome.generations += 1
        self.under_way[question] += 1
        if self.under_way[question] > 1 and question not in self.troubled:
            self._outcome.doubled += 1
        fails = self._chance.random() < self._faults
        if fails:
            self.troubled.add(question)
        try:
            await asyncio.sleep(self._chance.random() * 0.01)
            pieces = [f"<{question.decode()}:{i}>" for i in range(_PIECES)]
            if body.get("stream"):
                return await self._stream(pieces, writer, fails=fails)
            return self._plain(pieces, writer, fails=fails)
        finally:
            self.under_way[question] -= 1

    def _plain(self, pieces: list[str], writer: asyncio.StreamWriter, *, fails: bool) -> bool:
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(pieces)}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": _PIECES, "total_tokens": _PIECES + 1}
        data = json.dumps({"id": "1", "model": "m", "choices": [choice], "usage": usage}).encode()
        if fails and self._chance.random() < 0.5:
            writer.write(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}")
            return True
        answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
        writer.write(answer[: self._chance.randrange(len(answer))] if fails else answer)
        return not fails

    async def _stream(self, pieces: list[str], writer: asyncio.StreamWriter, *, fails: bool) -> bool:
        deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces)]
        events = [_event([{"index": 0, "delta": d, "finish_reason": None}]) for d in deltas]
        events += [_event([{"index": 0, "delta": {}, "finish_reason": "stop"}]), _event([], usage=True)]
        events.append(b"data: [DONE]\n\n")
        stop = self._chance.randrange(len(events) - 2) if fails else len(events)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in events[:stop]:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await asyncio.sleep(0)
        writer.write(b"" if fails else b"0\r\n\r\n")
        return not fails


def _event(choices: list[object], *, usage: bool = False) -> bytes:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
    if usage:
        chunk["usage"] = {"prompt_tokens": 1, "completion_tokens": _PIECES, "total_tokens": _PIECES + 1}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@asynccontextmanager
async def _serving(
    faults: float, ttl: float, outcome: Outcome, chance: random.Random, redis: RedisServer | None
) -> AsyncIterator[list[Proxy]]:
    upstream = Upstream(chance, faults, outcome)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    endpoint = EndpointSettings(base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    model = ModelSettings(
        endpoints=(endpoint,), breaker=BreakerSettings(failures=10**6, minimum=10**6), retries=RetrySettings(1.0, 1e6)
    )
    keys = tuple(ApiKey(key) for key in KEYS)
    settings = Config(server=Server(api_keys=keys), models={"m": model}, aliases={"a": "m"},
                      cache=CacheSettings(ttl=ttl, store="redis" if redis else "memory",
                                          url=Secret(redis.url) if redis else None))  # fmt: skip
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(proxying(settings)) for _ in range(2 if redis else 1)]
        for proxy in proxies:
            assert proxy.cached
            if isinstance(proxy.cached._store, Shield) and not faults:
                proxy.cached._store._patience = 20.0  # a machine with much to do is no fault
            elif faults and not redis:
                proxy.cached._store = FaultyStore(chance, faults)
        try:
            yield proxies
        finally:
            server.close()


async def _hurt(redis: RedisServer) -> None:
    """Have Redis hang, and die, again and again."""
    while True:
        for harm, heal in ((redis.freeze, redis.thaw), (redis.kill, redis.start)):
            await asyncio.sleep(1.0)
            await asyncio.to_thread(harm)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(heal)


async def prove(
    requests: int, clients: int, questions: int, *, faults: float, seed: int = 1, redis: RedisServer | None = None
) -> Outcome:
    """Ask so many times in all. faults: the share of answers that fail, and of look-ups and entries that are lost.

    redis: shared by two replicas, and hurt where there are faults.
    """
    outcome, chance = Outcome(), random.Random(seed)
    left = iter(range(requests))
    leaves = 0.02 if faults else 0.0  # who leaves may leave a generation behind that does not know it yet
    hurting = asyncio.create_task(_hurt(redis)) if redis and faults else None
    async with _serving(faults, 0.05, outcome, chance, redis) as proxies, asyncio.TaskGroup() as group:
        for i in range(clients):
            key, port = KEYS[i % len(KEYS)], proxies[i // len(KEYS) % len(proxies)].port
            group.create_task(_ask_all(port, key, questions, left, outcome, chance, leaves=leaves))
    if hurting:
        hurting.cancel()
    return outcome


class Client:
    """One connection to the proxy, opened anew where it was left."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n".encode()
        # All mutable state: the connection, None for none.
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: dict[str, object]) -> tuple[bytes, bytes]:
        """Return the head and the body of an answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        data = json.dumps(body).encode()
        writer.write(self._head + b"content-length: %d\r\n\r\n" % len(data) + data)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if length := re.search(rb"content-length: *(\d+)", head):
            return head, await reader.readexactly(int(length[1]))
        chunks = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            chunks += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return head, chunks

    def leave(self) -> None:
        """End the connection, in the middle of an answer perhaps."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None


async def _ask_all(
    port: int, key: str, questions: int, left: Iterator[int], outcome: Outcome, chance: random.Random, *, leaves: float
) -> None:
    client = Client(port, key)
    for _ in left:
        question, stream = f"{key} {chance.randrange(questions)}", chance.random() < 0.5
        message = {"role": "user", "content": question}
        body = {"model": chance.choice("ma"), "messages": [message], "temperature": 0, "stream": stream}
        outcome.requests += 1
        patience = chance.random() * 0.01 if chance.random() < leaves else None
        try:
            async with asyncio.timeout(patience):
                head, answer = await client.ask(body)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            outcome.failed += not isinstance(error, TimeoutError)
            client.leave()
        else:
            _judge(head, answer.decode(), question, outcome, stream=stream)
    client.leave()


def _judge(head: bytes, answer: str, question: str, outcome: Outcome, *, stream: bool) -> None:
    result = re.search(rb"\r\nx-polyvox-cache: (\w+)", head)
    outcome.results[result[1].decode() if result else "none"] += 1
    if b" 200 " not in head[:15]:
        outcome.failed += 1
        return
    said = set(re.findall(r"<([^:<>]*):\d+>", answer))
    outcome.foreign += bool(said - {question})
    if stream and "[DONE]" not in answer:
        outcome.failed += '"error"' in answer
        outcome.broken += '"error"' not in answer
        return
    pieces = [int(i) for i in re.findall(r"<[^:<>]*:(\d+)>", answer)]
    outcome.broken += pieces != list(range(_PIECES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--faults", type=float, nargs="*", default=(0.0, 0.1), help="one run for each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--redis", action="store_true", help="two replicas that share a Redis")
    given = parser.parse_args()
    bad = 0
    for faults in given.faults:
        with tempfile.TemporaryDirectory() as folder, _redis(Path(folder), wanted=given.redis) as redis:
            asked = (given.requests, given.clients, given.questions)
            found = uvloop.run(prove(*asked, faults=faults, seed=given.seed, redis=redis))
        print(f"faults {faults:.0%}: {msgspec.json.encode(found).decode()}", flush=True)
        bad += found.foreign + found.broken + (found.doubled if not faults else 0)
    raise SystemExit(1 if bad else 0)


@contextmanager
def _redis(folder: Path, *, wanted: bool) -> Iterator[RedisServer | None]:
    if not wanted:
        yield None
        return
    with redis_server(folder) as server:
        yield server


if __name__ == "__main__":
    main()
