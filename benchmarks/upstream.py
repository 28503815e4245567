"""A mock of vLLM's chat endpoint that costs next to nothing: fixed answers, written straight to the socket.

    python -m benchmarks.upstream PORT [PORT ...]

A request says what it wants of the answer: `stream`, and in `seed` the milliseconds between two events of its stream.
"""

import asyncio
import json
import re
import sys
from typing import cast

import uvloop

EVENTS = 64  # of a stream that carry a token; role, finish reason, usage and [DONE] come on top

_STREAM = re.compile(rb'"stream": ?true').search
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE).search
_PACE = re.compile(rb'"seed": ?(\d+)').search


def _answer(content: object) -> bytes:
    body = json.dumps(content).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def _chunk(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _event(**choice: object) -> bytes:
    common = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1795220426, "model": "mock"}
    return _chunk(json.dumps({**common, "choices": [{"index": 0, "logprobs": None, **choice}]}).encode())


USAGE = {"prompt_tokens": 37, "completion_tokens": EVENTS, "total_tokens": 37 + EVENTS}
WHOLE = _answer(
    {
        "id": "chatcmpl-mock",
        "object": "chat.completion",
        "created": 1795220426,
        "model": "mock",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris. " * 8, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
)
MODELS = _answer(
    {"object": "list", "data": [{"id": "mock", "object": "model", "owned_by": "vllm", "max_model_len": 32768}]}
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM = (
    STREAM_HEAD + _event(delta={"role": "assistant", "content": ""}, finish_reason=None),
    *[_event(delta={"content": " token"}, finish_reason=None)] * EVENTS,
    _event(delta={}, finish_reason="stop")
    + _chunk(json.dumps({"id": "chatcmpl-mock", "choices": [], "model": "mock", "usage": USAGE}).encode())
    + _chunk(b"[DONE]")
    + b"0\r\n\r\n",
)


class Engine(asyncio.Protocol):
    """One connection of the mock."""

    def __init__(self) -> None:
        # All mutable state: the socket, and the bytes of the request that is not whole yet.
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = b""

    def __repr__(self) -> str:
        return f"<Engine {len(self._received)} bytes waiting>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        while (end := _request_end(self._received)) is not None:
            request, self._received = self._received[:end], self._received[end:]
            self._reply(request)

    def _reply(self, request: bytes) -> None:
        assert self._transport
        if request.startswith(b"GET"):
            self._transport.write(MODELS)
        elif _STREAM(request):
            pace = _PACE(request)
            self._stream(0, int(pace[1]) / 1000 if pace else 0.0)
        else:
            self._transport.write(WHOLE)

    def _stream(self, number: int, pause: float) -> None:
        if self._transport is None:
            return
        self._transport.write(STREAM[number])
        if number + 1 < len(STREAM):
            self._loop.call_later(pause, self._stream, number + 1, pause)


def _request_end(received: bytes) -> int | None:
    """Return where the first request ends, or None while it is not whole."""
    head_end = received.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    if length := _LENGTH(received, 0, head_end + 2):
        end = head_end + 4 + int(length[1])
    elif b"chunked" in received[:head_end].lower():
        last = received.find(b"\r\n0\r\n\r\n", head_end)
        if last < 0:
            return None
        end = last + 7
    else:
        end = head_end + 4
    return end if len(received) >= end else None


async def main(ports: list[int]) -> None:
    """Listen until the process is ended."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Engine, "127.0.0.1", port, backlog=1024) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(main([int(port) for port in sys.argv[1:]]))
