"""How long a client may take: what of a request we wait for, and when it is late."""

from typing import Literal

from proxy.config import Server

Part = Literal["head", "body"]

_RATE = 16 * 1024  # bytes of a body that give it one more second
_LINGER = 5.0  # seconds that a client may go on sending what was answered before it was whole


class Patience:
    """What one connection waits for. Only a sweep looks at the time, so a request that comes at once costs nothing."""

    __slots__ = ("loose", "part", "received", "since", "unsent", "unsent_since")

    def __init__(self) -> None:
        # All mutable state: what we wait for, the bytes of a body that have come, the bytes since that completed
        # neither a head nor a piece of a body, and since when a sweep has known of it (0: none has seen it yet). Of
        # an answer that waits for its client: the bytes that the socket does not take, and since when so many.
        self.part: Part = "head"
        self.received = 0
        self.loose = 0
        self.since = 0.0
        self.unsent = 0
        self.unsent_since = 0.0

    def __repr__(self) -> str:
        return f"<Patience for a {self.part}, {self.received or self.loose} bytes of it here>"

    def begin(self, part: Part) -> None:
        """Wait for a head or a body from now on."""
        self.part, self.received, self.loose, self.since = part, 0, 0, 0.0

    def take(self, size: int) -> None:
        """A piece of a body has come."""
        self.received += size
        self.loose = 0

    def late(self, now: float, settings: Server, *, done: bool) -> bool:
        """Say whether it takes too long. now: seconds of a monotonic clock. done: what still comes is of no use."""
        if not self.since:
            self.since = now
        return now - self.since > self._seconds(settings, done=done)

    def stalled(self, now: float, unsent: int, settings: Server) -> bool:
        """Say whether the client has taken nothing of its answer for too long. unsent: bytes that wait for it."""
        if unsent != self.unsent or not unsent:
            self.unsent, self.unsent_since = unsent, now
        return now - self.unsent_since > settings.send_timeout

    def _seconds(self, settings: Server, *, done: bool) -> float:
        if done:
            return _LINGER
        return settings.head_timeout if self.part == "head" else settings.body_timeout + self.received / _RATE
