"""Server-sent events, as bytes: framing, and what must be changed or read in them on the way."""

import re
from collections.abc import Callable

import msgspec

from proxy.errors import MalformedAnswer, RequestError

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r(?!\n)")
PING = b": ping\n\n"  # a comment: it shows that the connection is alive, and says nothing
_LIMIT = 16 * 1024 * 1024


class Events:
    """Cuts a stream of bytes into whole events; what is not whole yet waits for the next bytes.

    Nothing is lost or added: the events returned and `rest` are the bytes that were fed, in order.
    """

    def __init__(self) -> None:
        # All mutable state: the bytes of the event that is not complete yet.
        self.rest = b""

    def __repr__(self) -> str:
        return f"<Events {len(self.rest)} bytes waiting>"

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that these bytes complete, each with its blank line."""
        if not self.rest and data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:
            return [data]  # one event, as engines send them
        seen = max(len(self.rest) - 3, 0)  # where a blank line may have begun
        data = self.rest + data if self.rest else data
        events, start = [], 0
        for match in _BLANK_LINE.finditer(data, seen):
            events.append(data[start : match.end()])
            start = match.end()
        self.rest = data[start:]
        if len(self.rest) > _LIMIT:
            raise MalformedAnswer(f"an event of the stream is longer than {_LIMIT} bytes")
        return events


def map_data(event: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return an event with `change` applied to the JSON object of each line of data that holds one."""
    return b"".join([_map_line(line, change) for line in event.splitlines(keepends=True)])


def _map_line(line: bytes, change: Callable[[bytes], bytes]) -> bytes:
    start = _object_at(line)
    if not start:
        return line
    end = len(line.rstrip(b"\r\n"))
    return line[:start] + change(line[start:end]) + line[end:]


def _object_at(line: bytes) -> int:
    """Return where the JSON object of a `data:` line starts, or 0."""
    if line.startswith(b"data: {"):
        return 6
    return 5 if line.startswith(b"data:{") else 0


def data_of(event: bytes) -> bytes:
    """Return the data of an event: that of its `data:` lines, joined by line feeds."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2]
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines)


def error_event(error: RequestError, operation: str, last: bytes = b"") -> bytes:
    """Make the event that ends a stream which cannot be finished, as its API has it. It is never followed by `[DONE]`.

    operation: as telemetry names it. last: what was sent last; the events of /v1/responses are numbered.
    """
    if operation == "messages":
        return b"event: error\ndata: " + error.envelope(anthropic=True) + b"\n\n"
    if operation == "responses":
        return b"event: error\ndata: " + _numbered(error, last) + b"\n\n"
    return b"data: " + error.envelope() + b"\n\n"


_NUMBER = re.compile(rb'"sequence_number"\s*:\s*(\d{1,18})')


def _numbered(error: RequestError, last: bytes) -> bytes:
    """Return the `error` of /v1/responses, whose fields are at the top; OpenAI's SDK looks for them in `error`."""
    told = {"code": error.code, "message": str(error), "param": error.param}
    number = int((_NUMBER.findall(last) or [b"-1"])[-1]) + 1
    return msgspec.json.encode(
        {"type": "error", "sequence_number": number, **told, "error": {"type": error.type, **told}}
    )
