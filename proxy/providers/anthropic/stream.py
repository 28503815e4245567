"""The events of a message of Anthropic's as the chunks of a chat completion. Pure.

Nothing of the answer is kept but what is needed to go on: an incomplete event, the usage, which block is open.
How the answer ended is passed on when `message_stop` says that it is whole, never before.
"""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from proxy import sse, wire
from proxy.errors import MalformedAnswer, TruncatedAnswer
from proxy.providers.anthropic.document import Block, Message, Usage, finish_reason


class _Refusal(msgspec.Struct, frozen=True):
    explanation: str | None = None


class _Delta(msgspec.Struct, frozen=True):
    type: str = ""
    text: str = ""
    thinking: str = ""
    signature: str = ""
    partial_json: str = ""
    stop_reason: str | None = None
    stop_details: _Refusal | None = None


class _Error(msgspec.Struct, frozen=True):
    type: str = ""


class _Event(msgspec.Struct, frozen=True):
    type: str
    message: Message | None = None
    index: int = 0
    content_block: Block | None = None
    delta: _Delta = _Delta()
    usage: Usage | None = None
    error: _Error = _Error()


_decode = msgspec.json.Decoder(_Event).decode
Delta = dict[str, Any]


class Stream:
    """A proxy.providers.translated.Translation. created: Unix time, which Anthropic does not tell."""

    def __init__(self, created: int) -> None:
        # All mutable state. The incomplete event, and whether the answer is whole:
        self._events = sse.Events()
        self.complete = False
        # What each chunk begins with, what was used, how it ended:
        self._head: dict[str, Any] = {"id": "", "object": "chat.completion.chunk", "created": created, "model": ""}
        self._usage = Usage()
        self._stop_reason: str | None = None
        # The number of tool calls, and the input of the one that is open, while nothing of it was streamed:
        self._tools = 0
        self._unsaid: bytes | None = None

    def __repr__(self) -> str:
        return f"<Stream {self._head['id']} {self._stop_reason} {self._events!r}>"

    def feed(self, data: bytes) -> bytes:
        return b"".join([chunk for event in self._events.feed(data) for chunk in self._translate(event)])

    def end(self) -> bytes:
        if not self.complete:
            raise TruncatedAnswer("the stream ended without message_stop")
        return b""

    def _translate(self, raw: bytes) -> Iterator[bytes]:
        data = sse.data_of(raw)
        if self.complete:
            return
        if not data:
            yield sse.PING
            return
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise MalformedAnswer("an event is not one of Anthropic's API") from None
        if take := _TAKES.get(event.type):  # others are to come, says the reference, and are to be passed over
            yield from take(self, event)

    def _ping(self, event: _Event) -> Iterator[bytes]:
        yield sse.PING

    def _message_start(self, event: _Event) -> Iterator[bytes]:
        if event.message is not None:
            self._head.update(id=event.message.id, model=event.message.model)
            self._usage = event.message.usage
        yield self._chunk({"role": "assistant", "content": ""})

    def _block_start(self, event: _Event) -> Iterator[bytes]:
        block = event.content_block or Block("")
        if block.type == "tool_use":
            self._tools += 1
            self._unsaid = bytes(block.input)
            function = {"name": block.name, "arguments": ""}
            yield self._tool_chunk({"id": block.id, "type": "function", "function": function})
        elif block.type == "redacted_thinking":
            yield self._chunk({"thinking_blocks": [block.kept()]})
        elif block.type in ("text", "thinking"):
            yield from self._said(block.text, block.thinking)

    def _block_delta(self, event: _Event) -> Iterator[bytes]:
        delta = event.delta
        if delta.type == "input_json_delta":
            if delta.partial_json:
                self._unsaid = None
                yield self._tool_chunk({"function": {"arguments": delta.partial_json}})
        elif delta.type == "signature_delta":
            # The text of the block has passed as reasoning_content.
            yield self._chunk({"thinking_blocks": [Block("thinking", signature=delta.signature).kept()]})
        else:
            yield from self._said(delta.text, delta.thinking)

    def _block_stop(self, event: _Event) -> Iterator[bytes]:
        unsaid, self._unsaid = self._unsaid, None
        if unsaid is not None:  # a call without arguments streams none, where OpenAI says {}
            yield self._tool_chunk({"function": {"arguments": unsaid.decode()}})

    def _message_delta(self, event: _Event) -> Iterator[bytes]:
        self._stop_reason = event.delta.stop_reason or self._stop_reason
        if event.usage is not None:
            self._usage = self._usage.then(event.usage)
        if event.delta.stop_details and event.delta.stop_details.explanation:
            yield self._chunk({"refusal": event.delta.stop_details.explanation})

    def _message_stop(self, event: _Event) -> Iterator[bytes]:
        if self._stop_reason is None:
            raise MalformedAnswer("the message ended without a stop_reason")
        self.complete = True
        yield self._chunk({}, finish_reason(self._stop_reason))
        yield _event({**self._head, "choices": [], "usage": self._usage.for_openai()})
        yield b"data: [DONE]\n\n"

    def _error(self, event: _Event) -> Iterator[bytes]:
        """End with an error event and no [DONE]. Its words are ours: an upstream's may hold what is not for clients."""
        self.complete = True
        kind = event.error.type if event.error.type in _ERRORS else "api_error"
        message = f"The upstream failed in the middle of its answer ({kind})."
        error = {"message": message, "type": "server_error", "param": None, "code": "upstream_error"}
        yield _event({"error": error})

    def _said(self, text: str, thinking: str) -> Iterator[bytes]:
        if text:
            yield self._chunk({"content": text})
        if thinking:
            yield self._chunk({"reasoning_content": thinking})

    def _tool_chunk(self, call: Delta) -> bytes:
        return self._chunk({"tool_calls": [{"index": self._tools - 1, **call}]})

    def _chunk(self, delta: Delta, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**self._head, "choices": [choice]})


_ERRORS = frozenset(
    ("api_error", "authentication_error", "billing_error", "invalid_request_error", "not_found_error",
     "overloaded_error", "permission_error", "rate_limit_error", "timeout_error")
)  # fmt: skip
_TAKES: dict[str, Callable[[Stream, _Event], Iterator[bytes]]] = {
    "ping": Stream._ping,
    "message_start": Stream._message_start,
    "content_block_start": Stream._block_start,
    "content_block_delta": Stream._block_delta,
    "content_block_stop": Stream._block_stop,
    "message_delta": Stream._message_delta,
    "message_stop": Stream._message_stop,
    "error": Stream._error,
}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + wire.encode(chunk) + b"\n\n"
