"""Rows to try things with."""

from proxy.ledger import Row
from proxy.telemetry import RequestFinished


def row(number: int, **changed: object) -> Row:
    """Return a row; `number` makes its id."""
    usual = {
        "id": f"r-{number}", "time": 1_800_000_000.0 + number, "day": "2027-01-15", "request_id": f"request-{number}",
        "alias": "gpt", "model": "small", "endpoint": "small/0", "key_id": "0123456789abcdef", "operation": "chat",
        "tokens_in": 10, "tokens_out": 20, "tokens_cached": 4, "usd": 0.5, "seconds": 2.0, "status": 200, "error": None,
        "finish_reason": "stop", "attempts": 1,
    }  # fmt: skip
    return Row(**{**usual, **changed})  # type: ignore[arg-type]


def finished(**changed: object) -> RequestFinished:
    """Return the end of a request."""
    usual = {
        "model": "small", "endpoint": "small/0", "operation": "chat", "status": 200, "error": None,
        "finish_reason": "stop", "seconds": 1.5, "to_first_token": 0.2, "per_token": 0.02, "overhead": 0.0001,
        "tokens_in": 10, "tokens_out": 20, "tokens_cached": 4, "usd": 0.25, "attempts": 1, "alias": "gpt",
        "key_id": "0123456789abcdef", "request_id": b"abc",
    }  # fmt: skip
    return RequestFinished(**{**usual, **changed})  # type: ignore[arg-type]
