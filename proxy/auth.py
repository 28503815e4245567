"""API key -> may it pass. Keys are kept as hashes, and compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable

import msgspec

from proxy.config import Secret
from proxy.errors import WrongKey


class Caller(msgspec.Struct, frozen=True):
    """Who asks. salt: keeps what one key sent apart from all others in an engine's prefix cache; None without keys."""

    salt: str | None = None


class Keys:
    """The keys that a server takes. Without any everybody may pass, or, where keys are required, nobody."""

    def __init__(self, keys: Iterable[Secret], *, required: bool = False) -> None:
        secrets = [key.reveal().encode() for key in keys]
        self._required = required
        self._callers = tuple((_digest(secret), Caller(_salt(secret))) for secret in secrets)

    def __repr__(self) -> str:
        return f"<Keys {len(self._callers)}>"

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Return who asks. Raises WrongKey unless the headers of a request carry one of the keys.

        Taken from `Authorization: Bearer` (OpenAI's clients) or `x-api-key` (Anthropic's).
        """
        if not self._callers and not self._required:
            return _ANYBODY
        given = _digest(_presented(headers))
        found = [caller for digest, caller in self._callers if hmac.compare_digest(given, digest)]  # all compared
        if not found:
            raise WrongKey
        return found[0]


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return b""


_ANYBODY = Caller()


def _salt(key: bytes) -> str:
    """Derive the salt of a key: the same in every worker, on every machine and after a restart."""
    return hmac.new(key, b"polyvox cache salt", hashlib.sha256).hexdigest()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
