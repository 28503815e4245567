"""An entry as bytes, for stores outside of this process. What was not written by this version of us is no entry.

The first bytes say the format; then comes a BLAKE2b digest of the key and of the entry, then the entry in msgpack. With
the key in the digest, an entry is only one under the key that it was written for.
"""

import hashlib

import msgspec

from proxy.cache import Entry

MAGIC = b"pvx1"  # another layout of Entry needs another
_DIGEST_BYTES = 16
_HEAD = len(MAGIC) + _DIGEST_BYTES

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


def encode(key: bytes, entry: Entry) -> bytes:
    """Return an entry as it is kept under a key."""
    data = _encode(entry)
    return b"".join((MAGIC, _digest(key, data), data))


def decode(key: bytes, data: bytes) -> Entry | None:
    """Return the entry that `encode` made for this key, None for any other bytes."""
    payload = memoryview(data)[_HEAD:]
    if data[: len(MAGIC)] != MAGIC or data[len(MAGIC) : _HEAD] != _digest(key, payload):
        return None
    try:
        return _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _digest(key: bytes, data: bytes | memoryview) -> bytes:
    hashed = hashlib.blake2b(key, digest_size=_DIGEST_BYTES)
    hashed.update(data)
    return hashed.digest()
