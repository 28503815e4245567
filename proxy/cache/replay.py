"""A kept answer, as the next client wants it: a document made of a stream, a stream made of a document. Pure.

Of /v1/chat/completions and /v1/completions. Fields that we do not know are kept as well.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import msgspec

from proxy import sse, wire
from proxy.accounting import StreamAccount, Usage
from proxy.cache import Entry
from proxy.renaming import EventRenamer

JSON, EVENT_STREAM = b"application/json", b"text/event-stream; charset=utf-8"

Object = dict[str, Any]
Cost = Callable[[Usage], float | None]

_decode = msgspec.json.Decoder(Object).decode
_encode = msgspec.json.encode
_DONE = b"data: [DONE]\n\n"
_TURNS = {"content": 1, "function_call": 2, "tool_calls": 2}  # models reason first, and call tools when all is said
_SMALL, _MOST = 64 * 1024, 128  # bytes of an answer of which what was made is kept, and how many such: 16 MiB in all
_WORDS = re.compile(r"\s*\S+\s?|\s+").findall
# Of what these are called, the last that was said counts. Other texts and lists go on with what was said before.
_SAID_ONCE = frozenset(
    ("id", "object", "model", "created", "system_fingerprint", "service_tier", "role", "type", "name", "index",
     "finish_reason", "stop_reason", "usage")
)  # fmt: skip


def document(entry: Entry, name: str) -> bytes:
    """Return an answer as one document, in which the model has this name."""
    if not entry.stream and entry.name == name:
        return entry.body
    return _documents(entry, name) if len(entry.body) <= _SMALL else _document(entry, name)


def events(entry: Entry, name: str, *, hide_usage: bool, cost: Cost | None = None, pieces: bool = False) -> bytes:
    """Return an answer as the events of a stream, in which the model has this name.

    hide_usage: without the usage. cost: what to add to that. pieces: the text of a document is cut into words, for a
    stream that is to have a pace.
    """
    make = _streams if len(entry.body) <= _SMALL else _stream
    return make(entry, name, hide_usage, cost, pieces)


def _document(entry: Entry, name: str) -> bytes:
    whole = _gathered(entry) if entry.stream else entry.body
    return whole if entry.name == name else wire.set_model(whole, name)


def _stream(entry: Entry, name: str, hide_usage: bool, cost: Cost | None, pieces: bool) -> bytes:
    stream = entry.body if entry.stream else b"".join(_scattered(entry, pieces=pieces))
    if hide_usage or cost:
        account = StreamAccount(hide_usage=hide_usage, cost=cost)
        stream = account.feed(stream) + account.end()
    return stream if entry.name == name else EventRenamer(name)(stream)


# An answer that is given often is mostly given in one way, which takes longer to make than all the rest of giving it.
_documents = lru_cache(maxsize=_MOST)(_document)
_streams = lru_cache(maxsize=_MOST)(_stream)


# A document of a stream


def _gathered(entry: Entry) -> bytes:
    whole: Object = {}
    choices: dict[int, Object] = {}
    for event in sse.Events().feed(entry.body):
        data = sse.data_of(event)
        if data.startswith(b"{"):
            chunk = _decode(data)
            for choice in chunk.pop("choices", None) or ():
                _add(choices.setdefault(choice.get("index", 0), {}), choice)
            _add(whole, chunk)
    is_chat = entry.operation == "chat"
    whole["choices"] = [_as_message(choices[i]) if is_chat else choices[i] for i in sorted(choices)]
    if is_chat:
        whole["object"] = "chat.completion"
    if "usage" in whole:
        whole["usage"] = whole.pop("usage")  # behind the choices, where engines have it
    return _encode(whole)


def _add(said: Object, more: Object) -> None:
    """Add what a chunk says to what was said before, as OpenAI's SDK does (`accumulate_delta`)."""
    for name, value in more.items():
        before = said.get(name)
        if before is None or (value is not None and name in _SAID_ONCE):
            said[name] = value
        elif isinstance(value, str) and isinstance(before, str):
            said[name] = before + value
        elif isinstance(value, dict) and isinstance(before, dict):
            _add(before, value)
        elif isinstance(value, list) and isinstance(before, list):
            _add_items(before, value)
        elif value is not None:
            said[name] = value


def _add_items(said: list[Any], more: list[Any]) -> None:
    """Add items: those that have an index to the item of that index, the others behind."""
    for item in more:
        index = item.get("index") if isinstance(item, dict) else None
        same = [old for old in said if isinstance(old, dict) and old.get("index") == index] if index is not None else []
        if same:
            _add(same[0], item)
        else:
            said.append(item)


def _as_message(choice: Object) -> Object:
    message = {"role": "assistant", "content": None, **choice.pop("delta", {})}
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [{n: v for n, v in call.items() if n != "index"} for call in calls]
        message["content"] = message["content"] or None
    return {"index": choice.pop("index", 0), "message": message, **choice}


# A stream of a document


def _scattered(entry: Entry, *, pieces: bool) -> Iterator[bytes]:
    whole = _decode(entry.body)
    choices, usage = whole.pop("choices", []), whole.pop("usage", None)
    is_chat = entry.operation == "chat"
    if is_chat:
        whole["object"] = "chat.completion.chunk"
    base = {n: v for n, v in whole.items() if n in _SAID_ONCE}
    for choice in choices:
        parts = _deltas(choice, pieces=pieces) if is_chat else _texts(choice, pieces=pieces)
        for part in parts:
            yield _event({**whole, "choices": [part]})
            whole = base  # what else the document says is said once
    if usage is not None:
        yield _event({**base, "choices": [], "usage": usage})
    yield _DONE


def _deltas(choice: Object, *, pieces: bool) -> Iterator[Object]:
    """Yield the chunks of a choice: its role, its message field by field, and its end."""
    message = dict(choice.pop("message", None) or {})
    index, finish = choice.pop("index", 0), choice.pop("finish_reason", None)
    logprobs = choice.pop("logprobs", None)

    def chunk(delta: Object, logprobs: Any = None, finish: Any = None) -> Object:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    yield chunk({"role": message.pop("role", "assistant"), "content": ""})
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    for name in sorted(message, key=lambda name: _TURNS.get(name, 0)):
        for part in _parts(message[name], pieces=pieces):
            if part is not None and (part != "" or name != "content"):
                yield chunk({name: part}, logprobs if name == "content" else None)
                logprobs = None if name == "content" else logprobs
    yield {**choice, **chunk({}, logprobs, finish)}


def _texts(choice: Object, *, pieces: bool) -> Iterator[Object]:
    """Yield the chunks of a choice of a completion."""
    text, logprobs = choice.pop("text", ""), choice.pop("logprobs", None)
    for part in _parts(text, pieces=pieces):
        yield {"index": choice.get("index", 0), "text": part, "logprobs": logprobs, "finish_reason": None}
        logprobs = None
    yield {**choice, "text": "", "logprobs": logprobs}


def _parts(value: Any, *, pieces: bool) -> list[Any]:
    return _WORDS(value) if pieces and isinstance(value, str) else [value]


def _event(chunk: Object) -> bytes:
    return b"data: %b\n\n" % _encode(chunk)
