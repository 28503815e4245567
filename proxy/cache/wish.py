"""What a request says about the cache: the header `Cache-Control` and the field `cache`, of which the latter wins."""

import re
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from proxy.cache.settings import When
from proxy.errors import BadRequest

FIELD = "cache"
NAMES = frozenset((b"cache-control",))
Seconds = Annotated[float, Meta(ge=0)]

_FIELDS = "an object of no-cache, no-store (booleans), max-age, ttl (seconds), pace (events a second) and when"
_SECONDS = re.compile(r'"?([0-9]{1,9})"?').fullmatch


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """no_cache: the answer is to be made anew, and may be kept. no_store: the cache is left alone.

    max_age: a kept answer may be so old. ttl: the answer is kept so long, but no longer than the server keeps others.
    pace: events a second of a kept answer that is given as a stream. when: see CacheSettings.
    """

    no_cache: bool = False
    no_store: bool = False
    max_age: Seconds | None = None
    ttl: Annotated[float, Meta(gt=0)] | None = None
    pace: Seconds | None = None
    when: When | None = None


NONE = Wish()
_decode = msgspec.json.Decoder(Wish).decode


def read(headers: Iterable[tuple[bytes, bytes]], field: msgspec.Raw | None) -> Wish:
    """Read the wish of a request. Names of headers are lower-case. Raises BadRequest with what is wrong."""
    wish = NONE
    for name, value in headers:
        if name in NAMES:
            wish = _directives(value.decode("latin-1"), wish)
    return wish if field is None else _with_field(wish, bytes(field))


def _directives(value: str, wish: Wish) -> Wish:
    """Read the directives of RFC 9111 that we know; others do not concern us."""
    for directive in value.split(","):
        name, _, argument = directive.strip().partition("=")
        name = name.strip().lower()
        if name == "no-cache":
            wish = msgspec.structs.replace(wish, no_cache=True)
        elif name == "no-store":
            wish = msgspec.structs.replace(wish, no_store=True)
        elif name == "max-age":
            wish = msgspec.structs.replace(wish, max_age=_max_age(argument.strip()))
    return wish


def _max_age(argument: str) -> float:
    if match := _SECONDS(argument):
        return float(match[1])
    raise BadRequest("Cache-Control: max-age expects whole seconds, as in max-age=60.", param="cache-control")


def _with_field(wish: Wish, field: bytes) -> Wish:
    if field == b"null":
        return wish
    try:
        own = _decode(field)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise BadRequest(f"cache: expected {_FIELDS}: {e}", param="cache") from None
    said = {name: value for name, value in msgspec.structs.asdict(own).items() if value != getattr(NONE, name)}
    return msgspec.structs.replace(wish, **said)
