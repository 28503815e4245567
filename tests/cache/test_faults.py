"""Two replicas, many clients, a Redis and an upstream that fail: nobody gets what is not his, or not whole."""

import asyncio
import contextlib
import itertools
import json
import random

import httpx2

from proxy.cache.settings import CacheSettings
from proxy.cache.shield import Shield
from proxy.config import ApiKey, BreakerSettings, Config, EndpointSettings, ModelSettings, RetrySettings, Server
from proxy.secret import Secret
from tests.fakes.one_worker import EVENTS, JSON, document, events, proxying, text_of
from tests.fakes.scripted_upstream import _read_request, chunked, ok

CLIENTS, QUESTIONS, SECONDS = 48, 8, 2.0
KEYS = ("secret-one", "secret-two")
RESULTS = {"hit", "miss", "joined"}
HEAD = b"\r\n".join((b"HTTP/1.1 200 OK", EVENTS, b"transfer-encoding: chunked", b"", b""))


class Model:
    """Says something new each time, sometimes not to its end; knows how often it is asked the same at once."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.chance = random.Random(7)
        self.asked: dict[str, int] = {}
        self.most = 0

    async def serve(self, reader, writer):
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                body = json.loads((await _read_request(reader, 0)).body)
                question = body["messages"][0]["content"]
                self.asked[question] = self.asked.get(question, 0) + 1
                self.most = max(self.most, self.asked[question])
                try:
                    if not await self.answer(writer, question, body.get("stream")):
                        return
                finally:
                    self.asked[question] -= 1

    async def answer(self, writer, question, stream):
        words = [f"{question} ", f"{next(self.numbers)} ", "end"]
        fault = self.chance.random()
        if fault < 0.1:
            writer.write(ok(b'{"error":{"message":"busy"}}', JSON, status=b"500 Internal Server Error"))
        elif not stream:
            await asyncio.sleep(0)
            writer.write(ok(document("".join(words)), JSON))
        else:
            pieces = events(*words)
            writer.write(HEAD + b"".join(chunked(piece)[:-5] for piece in pieces[:2]))
            await asyncio.sleep(0)
            if fault < 0.2:
                return False
            writer.write(b"".join(chunked(piece)[:-5] for piece in pieces[2:]) + b"0\r\n\r\n")
        await writer.drain()
        return True


class Client:
    """Asks one question after the other with one key, and remembers what it was told.

    until: when it has asked for long enough, once it was told something, and all RESULTS have been seen.
    """

    def __init__(self, number, proxies, until, seen):
        self.key = KEYS[number % 2]
        self.chance = random.Random(number)
        self.proxies = proxies
        self.until = until
        self.seen = seen
        self.told = set()

    async def run(self):
        loop = asyncio.get_running_loop()
        while loop.time() < self.until or not (self.told and self.seen >= RESULTS):
            await self.ask(self.chance.choice(self.proxies), f"q{self.chance.randrange(QUESTIONS)}")

    async def ask(self, proxy, question):
        stream = self.chance.random() < 0.5
        body = {"model": "m", "messages": [{"role": "user", "content": question}], "temperature": 0, "stream": stream}
        headers = {"authorization": f"Bearer {self.key}"}
        answer = await proxy.client.post("/v1/chat/completions", json=body, headers=headers, timeout=60)
        result = answer.headers.get("x-polyvox-cache", "error")
        self.seen.add(result)
        if answer.status_code != 200 or '"error":' in answer.text:
            assert result != "hit", "an error was kept"
            return
        text = text_of(answer.text) if stream else answer.json()["choices"][0]["message"]["content"]
        assert text.split()[0::2] == [question, "end"], text
        self.told.add(text)


async def hurt(server, until):
    """Have Redis fail in each way, and be well again, until it is enough."""
    loop = asyncio.get_running_loop()
    while True:
        for harm, heal in ((server.freeze, server.thaw), (server.kill, server.start)):
            await asyncio.sleep(SECONDS / 8)
            if loop.time() > until:
                return
            await asyncio.to_thread(harm)
            await asyncio.sleep(SECONDS / 20)
            await asyncio.to_thread(heal)


async def play(server, *, faults):
    model, loop = Model(), asyncio.get_running_loop()
    listening = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    settings = ModelSettings(
        endpoints=(EndpointSettings(base_url=f"{address}/v1"),),
        breaker=BreakerSettings(failures=10_000, error_rate=1.0),
        retries=RetrySettings(share=0.0, per_second=0.0),
    )
    cache = CacheSettings(store="redis", url=Secret(server.url), ttl=0.2)
    keys = tuple(map(ApiKey, KEYS))
    made = Config(models={"m": settings}, cache=cache, server=Server(api_keys=keys))
    async with listening, proxying(made) as one, proxying(made) as other:
        until = loop.time() + SECONDS
        for proxy in (one, other):
            await proxy.client.aclose()
            limits = httpx2.Limits(max_connections=CLIENTS)
            proxy.client = httpx2.AsyncClient(
                base_url=f"http://127.0.0.1:{proxy.port}", limits=limits, trust_env=False, timeout=60
            )
        seen = set()
        clients = [Client(number, (one, other), until, seen) for number in range(CLIENTS)]
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.run())
            if faults:
                group.create_task(hurt(server, until))
    return model, clients


def check(model, clients):
    told = [set().union(*(client.told for client in clients if client.key == key)) for key in KEYS]
    assert not told[0] & told[1], "an answer went from one key to another"


def test_with_a_redis_that_is_well_each_question_is_asked_once_at_a_time(server, monkeypatch):
    monkeypatch.setitem(Shield.__init__.__kwdefaults__, "patience", 20.0)  # a machine with much to do is no fault
    model, clients = asyncio.run(play(server, faults=False))
    check(model, clients)
    assert model.most <= len(KEYS), "two generations of one request at once"


def test_with_a_redis_that_fails_nobody_gets_what_is_not_his(server):
    check(*asyncio.run(play(server, faults=True)))
