"""Entries for tests."""

import hashlib
import time

from proxy.accounting import Usage
from proxy.cache import Entry


def key(name: object = "k", scope: str = "me") -> bytes:
    """A key as a cache makes them: whose it is, then a digest."""
    return hashlib.sha256(scope.encode()).digest()[:8] + hashlib.sha256(str(name).encode()).digest()[:24]


def entry(text: str = "Paris", *, model: str = "m", ttl: float = 60.0, **changes: object) -> Entry:
    """The answer that says something."""
    fields = {
        "model": model, "endpoint": f"{model}/0", "name": model, "operation": "chat", "stream": False,
        "content_type": b"application/json", "body": text.encode(), "stored_at": time.time(), "ttl": ttl,
        "usage": Usage(3, 4), "finish_reason": "stop",
    }  # fmt: skip
    return Entry(**{**fields, **changes})
