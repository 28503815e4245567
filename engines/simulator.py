"""An engine without weights: vLLM's HTTP surface and metrics, with settable timings and faults.

For load and fault tests; every text that it gives says that it is simulated. What it says is in engines.simulated.
Two routes that vLLM has not: POST /simulator/faults takes a Fault for the next requests, DELETE forgets those left;
GET /simulator/requests returns what was received.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, Self, cast

import httptools
import msgspec

from engines import simulated
from engines.simulated import Dialect, Document, Refusal, Served, Work
from engines.spec import EngineSpec, Simulation

_JSON = b"application/json"
_SSE = b"text/event-stream; charset=utf-8"
_TEXT = b"text/plain; version=1.0.0; charset=utf-8"
_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_FINISHED = ("stop", "length", "abort", "error", "repetition")
_REMEMBERED = 100  # requests
_KV_CACHE_REQUESTS = 8  # requests of full length that the pretended cache holds

_DIALECTS: dict[bytes, Dialect] = {
    b"/v1/chat/completions": simulated.Chat(),
    b"/v1/completions": simulated.Completion(),
    b"/v1/responses": simulated.Responses(),
    b"/v1/messages": simulated.Messages(),
}
_AT_ONCE: dict[bytes, Callable[[Document, Served, str, int], object]] = {
    b"/v1/embeddings": simulated.embeddings,
    b"/v1/rerank": simulated.rerank,
    b"/v1/score": simulated.score,
    b"/v1/messages/count_tokens": simulated.count_tokens,
    b"/tokenize": simulated.tokenize,
    b"/detokenize": simulated.detokenize,
}
_PHRASES = {int(status): status.phrase for status in HTTPStatus}
_TRANSCRIPTIONS = b"/v1/audio/transcriptions"
_WORK = frozenset((*_DIALECTS, *_AT_ONCE, _TRANSCRIPTIONS))


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is wrong with the next so many requests.

    error: the status to answer with. cut_after: tokens after which the connection is cut. hang: no token comes, of
    this request or any other, until its client goes. slow: all times are so many times longer. exit: the status with
    which the process ends.
    """

    requests: int = 1
    error: int | None = None
    cut_after: int | None = None
    hang: bool = False
    slow: float = 1.0
    exit: int | None = None


_SOUND = Fault()


class Received(msgspec.Struct, frozen=True):
    """A request as it came."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def path(self) -> bytes:
        return self.target.partition(b"?")[0]

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key == name), b"")

    def report(self) -> dict[str, object]:
        """For /simulator/requests: text throughout."""
        headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in self.headers]
        body = self.body.decode("utf-8", "replace")
        return {"method": self.method.decode(), "path": self.target.decode("latin-1"), "headers": headers, "body": body}


class Run:
    """One running request in the meters, from `with` to its end. reason: how it finished."""

    def __init__(self, meters: "Meters", prompt_tokens: int) -> None:
        # Mutable state: the tokens of the request so far, and how it finished.
        self._meters = meters
        self._tokens = self._prompt_tokens = prompt_tokens
        self.reason = "abort"

    def __repr__(self) -> str:
        return f"<Run {self._tokens} tokens>"

    def __enter__(self) -> Self:
        self._meters.running += 1
        self._meters.held += self._tokens
        return self

    def iterate(self, tokens: int) -> None:
        """The engine makes a step with so many new tokens of this request; the first reads the prompt too."""
        meters = self._meters
        meters.iterate(self._prompt_tokens + tokens)
        meters.prompt_tokens += self._prompt_tokens
        meters.generation_tokens += tokens
        meters.held += tokens
        self._prompt_tokens = 0
        self._tokens += tokens

    def __exit__(self, *_: object) -> None:
        self._meters.running -= 1
        self._meters.held -= self._tokens
        self._meters.finished[self.reason] += 1


class Meters:
    """The figures behind /metrics."""

    def __init__(self, served: Served) -> None:
        # Mutable state: what is running, and what has been done since the start.
        self._served = served
        self.running = 0
        self.held = 0  # tokens of the running requests
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.iterations = [0] * (len(_BUCKETS) + 1)
        self.iteration_tokens = 0
        self.finished: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Meters {self.running} running, {sum(self.iterations)} iterations, {dict(self.finished)}>"

    def iterate(self, tokens: int) -> None:
        """One step of the engine that handled so many tokens."""
        self.iterations[bisect_left(_BUCKETS, tokens)] += 1
        self.iteration_tokens += tokens

    def run(self, prompt_tokens: int) -> Run:
        """Return a request to be entered while it runs."""
        return Run(self, prompt_tokens)

    def page(self) -> str:
        """Return the text for Prometheus, under vLLM's names."""
        usage = min(1.0, self.held / (self._served.max_model_len * _KV_CACHE_REQUESTS))
        finished = [(f'finished_reason="{reason}"', self.finished[reason]) for reason in _FINISHED]
        return "".join(
            (
                self._family("num_requests_running", "gauge", [("", self.running)]),
                self._family("num_requests_waiting", "gauge", [("", 0)]),
                self._family("kv_cache_usage_perc", "gauge", [("", usage)]),
                self._family("prompt_tokens_total", "counter", [("", self.prompt_tokens)]),
                self._family("generation_tokens_total", "counter", [("", self.generation_tokens)]),
                self._family("request_success_total", "counter", finished),
                self._histogram("iteration_tokens_total"),
            )
        )

    def _family(self, name: str, kind: str, samples: Sequence[tuple[str, float]]) -> str:
        lines = [self._sample(name, extra, value) for extra, value in samples]
        return f"# TYPE vllm:{name} {kind}\n" + "".join(lines)

    def _histogram(self, name: str) -> str:
        bounds = [*(f"{bound:.1f}" for bound in _BUCKETS), "+Inf"]
        total, lines = 0, []
        for bound, count in zip(bounds, self.iterations, strict=True):
            total += count
            lines.append(self._sample(f"{name}_bucket", f'le="{bound}"', total))
        lines += [self._sample(f"{name}_count", "", total), self._sample(f"{name}_sum", "", self.iteration_tokens)]
        return f"# TYPE vllm:{name} histogram\n" + "".join(lines)

    def _sample(self, name: str, extra: str, value: float) -> str:
        model = self._served.model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        labels = ",".join(part for part in ('engine="0"', extra, f'model_name="{model}"') if part)
        return f"vllm:{name}{{{labels}}} {float(value)}\n"


class Simulator:
    """What all connections share."""

    def __init__(self, model: str, simulation: Simulation) -> None:
        # Mutable state: the chance of faults, the faults ordered for the next requests, the requests received, the
        # meters, the number of hung requests with the gate that they close for all, and the count behind the ids.
        self.served = Served(model, simulation.max_model_len, simulation.tokens)
        self.simulation = simulation
        self.faults: deque[Fault] = deque()
        self.received: deque[Received] = deque(maxlen=_REMEMBERED)
        self.meters = Meters(self.served)
        self._chance = random.Random(simulation.seed)  # noqa: S311 - a test load, not a secret
        self._hung = 0
        self._gate = asyncio.Event()
        self._gate.set()
        self._requests = 0
        self._created = int(time.time())

    def __repr__(self) -> str:
        return f"<Simulator {self.served.model!r}: {self.meters!r}, {len(self.faults)} faults to come>"

    def next_fault(self) -> Fault:
        """Return what is wrong with the request that has just come: what was ordered, else what chance says."""
        if self.faults:
            return self.faults.popleft()
        rates = self.simulation
        if not (rates.error_rate or rates.cut_rate or rates.hang_rate):
            return _SOUND
        drawn = self._chance.random()
        if drawn < rates.error_rate:
            return Fault(error=500)
        if drawn < rates.error_rate + rates.cut_rate:
            return Fault(cut_after=self._chance.randrange(max(rates.tokens, 1)))
        return Fault(hang=drawn < rates.error_rate + rates.cut_rate + rates.hang_rate)

    def suffix(self, request: Received) -> str:
        """Return what makes the id of an answer unique: the client's request id, else a count."""
        self._requests += 1
        given = request.header(b"x-request-id")
        return given.decode("latin-1") if given else f"{self._requests:016x}"

    async def step(self, seconds: float, *, hang: bool = False) -> None:
        """Take the time of one step, which does not end while a request hangs: this one, or another."""
        if hang:
            await self._hang()
        if seconds > 0:
            await asyncio.sleep(seconds)
        while self._hung:
            await self._gate.wait()

    async def _hang(self) -> None:
        """Stand still, and everybody with us, until cancelled."""
        self._hung += 1
        self._gate.clear()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._hung -= 1
            if not self._hung:
                self._gate.set()

    def models(self) -> object:
        """The document of /v1/models."""
        card = {"id": self.served.model, "object": "model", "created": self._created, "owned_by": "simulator"}
        return {"object": "list", "data": [{**card, "root": None, "max_model_len": self.served.max_model_len}]}


class Connection(asyncio.Protocol):
    """One client: reads requests, and runs one after the other."""

    def __init__(self, simulator: Simulator) -> None:
        # Mutable state: the transport, the parser and the parts of the request that it is reading, the requests
        # that wait, the task that answers, and the gate that is closed while the client does not read.
        self._simulator = simulator
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._waiting: deque[Received] = deque()
        self._answering: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def __repr__(self) -> str:
        return f"<Connection {'answering' if self._answering else 'idle'}, {len(self._waiting)} waiting>"

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answering is not None:
            self._answering.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._send_whole(400, b"Invalid HTTP request received.", _TEXT)
            self.cut()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._target, self._headers, self._body = b"", [], []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if (b"expect", b"100-continue") in self._headers:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        method = self._parser.get_method()
        self._waiting.append(Received(method, self._target, self._headers, b"".join(self._body)))
        self._next()

    # Answering

    def _next(self) -> None:
        """Answer the next request; in a task only if it takes time, which keeps the others cheap."""
        while self._waiting and self._answering is None:
            request = self._waiting.popleft()
            if (slow := self._answer(request)) is not None:
                self._answering = asyncio.get_running_loop().create_task(slow)
                self._answering.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering = None
        if not task.cancelled() and task.exception() is not None:
            self.cut()
            raise cast(BaseException, task.exception())
        self._next()

    def _answer(self, request: Received) -> Coroutine[Any, Any, None] | None:
        """Answer now, or return what will."""
        path, simulator = request.path, self._simulator
        if path.startswith(b"/simulator/"):
            self._control(request)
        elif path in _WORK and request.method == b"POST":
            simulator.received.append(request)
            return self._work(request, simulator.next_fault())
        else:
            self._look(request)
        return None

    def _look(self, request: Received) -> None:
        """The routes that ask how the engine is."""
        looks: dict[bytes, Callable[[], tuple[bytes, bytes]]] = {
            b"/health": lambda: (b"", _TEXT),
            b"/metrics": lambda: (self._simulator.meters.page().encode(), _TEXT),
            b"/v1/models": lambda: (msgspec.json.encode(self._simulator.models()), _JSON),
            b"/version": lambda: (b'{"version":"simulated"}', _JSON),
        }
        look = looks.get(request.path)
        if look is None and request.path not in _WORK:
            self._send_whole(404, b'{"detail":"Not Found"}')
        elif look is None or request.method not in (b"GET", b"HEAD"):
            self._send_whole(405, b'{"detail":"Method Not Allowed"}')
        else:
            self._send_whole(200, *look())

    def _control(self, request: Received) -> None:
        """The routes that vLLM has not."""
        faults = self._simulator.faults
        match (request.method, request.path):
            case (b"POST", b"/simulator/faults"):
                self._order(request.body)
            case (b"DELETE", b"/simulator/faults"):
                faults.clear()
                self._send_whole(200, b"{}")
            case (b"GET", b"/simulator/requests"):
                reports = [received.report() for received in self._simulator.received]
                self._send_whole(200, msgspec.json.encode(reports))
            case _:
                self._send_whole(404, b'{"detail":"Not Found"}')

    def _order(self, body: bytes) -> None:
        try:
            fault = msgspec.json.decode(body, type=Fault)
        except msgspec.DecodeError as error:
            self._send_whole(400, msgspec.json.encode({"detail": str(error)}))
            return
        self._simulator.faults.extend([fault] * fault.requests)
        self._send_whole(200, b"{}")

    async def _work(self, request: Received, fault: Fault) -> None:
        """Answer a request of a client, with what is wrong with it."""
        try:
            if fault.exit is not None:
                os._exit(fault.exit)
            if fault.error is not None:
                raise Refusal(fault.error, _kind(fault.error), "simulated failure")
            await self._serve(request, fault)
        except Refusal as refusal:
            anthropic = request.path.startswith(b"/v1/messages")
            document = refusal.anthropic_document() if anthropic else refusal.document()
            self._send_whole(refusal.status, msgspec.json.encode(document))

    async def _serve(self, request: Received, fault: Fault) -> None:
        path, served = request.path, self._simulator.served
        suffix, created = self._simulator.suffix(request), int(time.time())
        if path == _TRANSCRIPTIONS:
            done = simulated.transcription(request.body, request.header(b"content-type"), served)
            await self._take_time(fault)
        elif (dialect := _DIALECTS.get(path)) is not None:
            work = simulated.plan(dialect, simulated.decoded(request.body), served, suffix, created)
            await self._generate(dialect, work, fault)
            return
        else:
            document = simulated.decoded(request.body)
            simulated.check_model(document, served)
            done = _AT_ONCE[path](document, served, suffix, created)
            await self._take_time(fault)
        self._send_whole(200, msgspec.json.encode(done))

    async def _take_time(self, fault: Fault) -> None:
        """What a request without tokens of its own costs: one iteration, after the time to a first token."""
        simulator = self._simulator
        with simulator.meters.run(prompt_tokens=0) as run:
            await simulator.step(simulator.simulation.time_to_first_token * fault.slow, hang=fault.hang)
            run.iterate(0)
            run.reason = "stop"

    async def _generate(self, dialect: Dialect, work: Work, fault: Fault) -> None:
        """Make an answer, token by token. As in vLLM, the head of a stream comes before its first token."""
        simulator, streams = self._simulator, bool(work.document.get("stream"))
        times = simulator.simulation
        with simulator.meters.run(work.prompt_tokens) as run:
            if streams:
                self.write(_head(200, _SSE, b"transfer-encoding: chunked"))
            await simulator.step(times.time_to_first_token * fault.slow, hang=fault.hang)
            self._send_chunk(dialect.opening(work) if streams else b"")
            for made in range(work.count):
                if made == fault.cut_after:
                    run.reason = "error"
                    self._break_off(b"" if streams else msgspec.json.encode(dialect.whole(work)))
                    return
                if made:
                    await simulator.step(times.time_per_token * fault.slow)
                run.iterate(work.choices)
                if streams:
                    await self._send_token(dialect, work, work.first + made)
            run.reason = work.finish
        self._complete(dialect, work, streams=streams)

    async def _send_token(self, dialect: Dialect, work: Work, number: int) -> None:
        for choice in range(work.choices):
            self._send_chunk(dialect.token(work, number, choice))
        if not self._writable.is_set():
            await self._writable.wait()

    def _complete(self, dialect: Dialect, work: Work, *, streams: bool) -> None:
        if streams:
            self._send_chunk(dialect.closing(work))
            self.write(b"0\r\n\r\n")
        else:
            self._send_whole(200, msgspec.json.encode(dialect.whole(work)))

    # Writing

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def cut(self) -> None:
        """End the connection, after what has been written."""
        if self._transport is not None:
            self._transport.close()

    def _break_off(self, body: bytes) -> None:
        """End the connection in the middle: of the stream, or of this body."""
        if body:
            self.write(_head(200, _JSON, b"content-length: %d" % len(body)) + body[: len(body) // 2])
        self.cut()

    def _send_chunk(self, data: bytes) -> None:
        if data:
            self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _send_whole(self, status: int, body: bytes, content_type: bytes = _JSON) -> None:
        self.write(_head(status, content_type, b"content-length: %d" % len(body)) + body)


def simulator_command(spec: EngineSpec, address: str) -> tuple[str, ...]:
    """Return the command line of a simulator engine that listens on `unix:/path` or `http://host:port`."""
    settings = spec.settings
    simulation = settings.simulator or Simulation()
    if settings.max_model_len is not None:
        simulation = msgspec.structs.replace(simulation, max_model_len=settings.max_model_len)
    where: tuple[str, ...] = ("--uds", address.removeprefix("unix:"))
    if not address.startswith("unix:"):
        host, port = address.removeprefix("http://").rsplit(":", 1)
        where = ("--host", host.strip("[]"), "--port", port)
    values = msgspec.structs.asdict(simulation).items()
    flags = (word for name, value in values for word in (_flag(name), str(value)))
    return (sys.executable, "-m", "engines.simulator", "--model", spec.model, *where, *flags)


async def serve(simulator: Simulator, uds: str | None, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT. Nobody can connect before the start-up time is over, as with vLLM."""
    await asyncio.sleep(simulator.simulation.startup)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await (
        loop.create_unix_server(lambda: Connection(simulator), uds)
        if uds
        else loop.create_server(lambda: Connection(simulator), host, port)
    )
    where = uds or "http://{}:{}".format(*server.sockets[0].getsockname()[:2])
    print(f"Simulator of {simulator.served.model} on {where}", flush=True)  # noqa: T201
    await stop.wait()
    server.close()


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m engines.simulator --model NAME (--uds PATH | --host H --port P) [--time-per-token S ...]`"""
    options = _parser().parse_args(argv)
    simulation = Simulation(**{name: getattr(options, name) for name in Simulation.__struct_fields__})

    async def story() -> None:
        await serve(Simulator(options.model, simulation), options.uds, options.host, options.port)

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(story())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engines.simulator", description=__doc__)
    parser.add_argument("--model", required=True, help="the name that is served")
    parser.add_argument("--uds", help="path of the unix socket to listen on, rather than host and port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    for field in msgspec.structs.fields(Simulation):
        kind = cast(Callable[[str], Any], field.type)
        parser.add_argument(_flag(field.name), type=kind, default=field.default, help="default: %(default)s")
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return cast(Callable[[], asyncio.AbstractEventLoop], uvloop.new_event_loop)


def _head(status: int, content_type: bytes, framing: bytes) -> bytes:
    reason = _phrase(status).encode()
    kind = b"content-type: " + content_type
    return b"HTTP/1.1 %d %b\r\nserver: simulator\r\n%b\r\n%b\r\n\r\n" % (status, reason, framing, kind)


def _kind(status: int) -> str:
    """What vLLM calls an error with this status."""
    return _phrase(status).replace(" ", "").removesuffix("Error") + "Error"


def _phrase(status: int) -> str:
    return _PHRASES.get(status, "Simulated")


if __name__ == "__main__":
    main()
