"""API key -> may it pass. Keys are kept as hashes, and compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable

from proxy.config import Secret
from proxy.errors import WrongKey


class Keys:
    """The keys that a server takes. Without any everybody may pass, or, where keys are required, nobody."""

    def __init__(self, keys: Iterable[Secret], *, required: bool = False) -> None:
        self._required = required
        self._digests = tuple(_digest(key.reveal().encode()) for key in keys)

    def __repr__(self) -> str:
        return f"<Keys {len(self._digests)}>"

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise WrongKey unless the headers of a request carry one of the keys.

        Taken from `Authorization: Bearer` (OpenAI's clients) or `x-api-key` (Anthropic's).
        """
        if not self._digests and not self._required:
            return
        given = _digest(_presented(headers))
        if not any([hmac.compare_digest(given, digest) for digest in self._digests]):  # noqa: C419 all compared
            raise WrongKey


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
