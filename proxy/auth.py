"""API key -> may it pass. Keys are kept as hashes, and compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping

import msgspec

from proxy.config import ApiKey, Secret
from proxy.errors import WrongKey


class Caller(msgspec.Struct, frozen=True):
    """Who asks.

    salt: keeps what one key sent apart from all others in an engine's prefix cache; None without keys. id: what the key
    is called where it must not be known; "" without keys. is_admin: it is one of those that may see and do everything.
    models: the names that it may ask for, None for all.
    """

    salt: str | None = None
    id: str = ""
    is_admin: bool = False
    models: frozenset[str] | None = None


class Keys:
    """The keys that a server takes. Without any everybody may pass, or, where keys are required, nobody."""

    def __init__(self, keys: Iterable[Secret], *, admins: Iterable[Secret] = (), required: bool = False) -> None:
        """admins: keys that are taken as well, and make their callers admins."""
        ordinary = list(keys)
        self._open = not ordinary and not required
        self._callers = (
            *((_digest(key.reveal().encode()), _caller(key.reveal().encode(), is_admin=True)) for key in admins),
            *(
                (_digest(key.reveal().encode()), _caller(key.reveal().encode(), models=_models(key)))
                for key in ordinary
            ),
        )

    def __repr__(self) -> str:
        return f"<Keys {len(self._callers)}>"

    def check(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Return who asks. Raises WrongKey unless the headers of a request carry one of the keys.

        Taken from `Authorization: Bearer` (OpenAI's clients) or `x-api-key` (Anthropic's).
        """
        if not self._callers and self._open:
            return _ANYBODY
        given = _digest(_presented(headers))
        found = [caller for digest, caller in self._callers if hmac.compare_digest(given, digest)]  # all compared
        if found:
            return found[0]
        if self._open:
            return _ANYBODY
        raise WrongKey


def _presented(headers: Mapping[bytes, bytes]) -> bytes:
    said = headers.get(b"authorization", b"")
    return (said[7:] if said[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")).strip()


_ANYBODY = Caller()


def _caller(key: bytes, *, is_admin: bool = False, models: frozenset[str] | None = None) -> Caller:
    return Caller(_salt(key), key_id(key), is_admin, models)


def _models(key: Secret) -> frozenset[str] | None:
    return frozenset(key.models) if isinstance(key, ApiKey) and key.models is not None else None


def key_id(key: bytes) -> str:
    """Return what a key is called in the ledger: 16 hexadecimal digits, from which nobody learns the key."""
    return hmac.new(key, b"polyvox key id", hashlib.sha256).hexdigest()[:16]


def _salt(key: bytes) -> str:
    """Derive the salt of a key: the same in every worker, on every machine and after a restart."""
    return hmac.new(key, b"polyvox cache salt", hashlib.sha256).hexdigest()


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32).digest()
