"""HTTP/2 frames, as far as they must be told apart before h2 sees them (RFC 9113, section 4.1). Pure."""

from collections.abc import Iterator
from typing import NamedTuple

from proxy.errors import MalformedAnswer

MAX_FRAME = 16 * 1024  # bytes of payload: what RFC 9113 allows unless we had allowed more
_HEAD = 9
_GOAWAY = 0x07
_ID = 0x7FFFFFFF


class Frame(NamedTuple):
    """A whole frame. `wire` is all of it, `payload` what follows its head."""

    kind: int
    wire: bytes
    payload: bytes


class Frames:
    """Cuts what is received into frames."""

    def __init__(self) -> None:
        # Mutable state: the bytes of the frame that is not whole yet.
        self._rest = b""

    def __repr__(self) -> str:
        return f"<Frames {len(self._rest)} bytes kept>"

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are whole now; MalformedAnswer for one that is larger than it may be."""
        data = self._rest + data
        at = 0
        try:
            while len(data) - at >= _HEAD:
                size = int.from_bytes(data[at : at + 3])
                if size > MAX_FRAME:
                    raise MalformedAnswer("a frame is larger than it may be")
                end = at + _HEAD + size
                if len(data) < end:
                    return
                yield Frame(data[at + 3], data[at:end], data[at + _HEAD : end])
                at = end
        finally:
            self._rest = data[at:]


def last_served(frame: Frame) -> int | None:
    """Return the last stream that a GOAWAY frame says was, or will be, served; None for another kind of frame."""
    if frame.kind != _GOAWAY:
        return None
    if len(frame.payload) < 8:
        raise MalformedAnswer("a GOAWAY frame is too short")
    return int.from_bytes(frame.payload[:4]) & _ID
