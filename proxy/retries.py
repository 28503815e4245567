"""How much may be tried again, and when. Pure: time and chance are arguments."""

from proxy.config import RetrySettings

_SAVED = 10.0  # seconds of the guaranteed rate that can be saved up; Finagle's ttl
ROUNDS = 3  # times that the same endpoints are asked again by one request
_BACKOFF = 0.25  # seconds, at most, before the first of them


class Budget:
    """A token bucket that each request adds its share to and each further attempt takes one from.

    So retries stay a share of the traffic when all of it fails, where a count for each request would multiply it
    (Finagle's RetryBudget; Envoy's `retry_budget`). A guaranteed rate is for those who have little traffic.
    """

    __slots__ = ("_at", "_most", "_rate", "_share", "_tokens")

    def __init__(self, settings: RetrySettings) -> None:
        # All mutable state: the settings, what may be tried now, and when the guaranteed rate was last added.
        self.follow(settings)
        self._tokens = _SAVED * settings.per_second
        self._at = 0.0

    def __repr__(self) -> str:
        return f"<Budget {self._tokens:.1f} retries>"

    def follow(self, settings: RetrySettings) -> None:
        """Go by other settings from now on."""
        self._share = settings.share
        self._rate = settings.per_second
        self._most = _SAVED * settings.per_second + 100 * settings.share

    def earn(self) -> None:
        """A request has come."""
        if self._tokens < self._most:
            self._tokens += self._share

    def spend(self, now: float) -> bool:
        """Take the right to one more attempt; say whether there was one."""
        if self._at:
            self._tokens = min(self._most, self._tokens + self._rate * (now - self._at))
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def backoff(times: int, chance: float) -> float:
    """Return the seconds before the same endpoints are asked again for the first, second, ... time.

    Exponential with full jitter, as AWS' architects advise.
    """
    return _BACKOFF * 2.0 ** (times - 1) * chance
