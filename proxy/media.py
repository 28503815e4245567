"""Pictures, sounds and videos in a body, and where an engine may fetch them from. Pure.

An engine fetches what a URL names from where it stands, inside our network. So a URL passes only as `data:`, or when
its host is, letter for letter, one of those that were configured.
"""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from proxy import plain
from proxy.errors import BadRequest
from proxy.limits import Fields, Limits, too_many

Domains = frozenset[str]

# The fields below which vLLM looks for media, in any of the APIs. Tools hold schemas, and no media.
_HOLDERS = frozenset(
    ("messages", "input", "system", "instructions", "prompt", "previous_input_messages", "documents", "query",
     "queries", "items", "text_1", "text_2", "data_1", "data_2")
)  # fmt: skip
_URLS = frozenset(("image_url", "audio_url", "video_url", "file_url"))
_TENSORS = frozenset(("image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil"))
_MEDIA = _URLS | _TENSORS | {"input_image", "input_audio", "input_file"}
# Fields of a part that a client may use only where the model's `allow` has them, with what is wrong with each.
FIELDS = {
    **dict.fromkeys(_TENSORS, "has the engine load serialized tensors"),
    "file_id": "names a file of the server",
    "uuid": "names media in a cache that all clients share",
}


_decode = msgspec.json.Decoder().decode


def check(
    fields: Fields, allow: frozenset[str], domains: Domains | None, limits: Limits, known: msgspec.Raw | None = None
) -> None:
    """Raise BadRequest for media that may not be fetched, or are too many. domains: None for anywhere. known: a value
    that has none, see limits.check."""
    count = 0
    for name in fields.keys() & _HOLDERS:
        value = fields[name]
        if value is not known and plain.items(value) is None:
            count += sum(_check_part(part, allow, domains) for part in _objects(_decode(value)))
            if count > limits.images:
                raise too_many(name, f"{count} images, sounds and videos", limits.images, "images")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object below a value, but for the `input` of a tool: that is data, and may have any shape."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            yield node
            waiting.extend(inner for key, inner in node.items() if key != "input")


def _check_part(part: dict[str, Any], allow: frozenset[str], domains: Domains | None) -> bool:
    """Check one object; say whether it is a medium."""
    for key in part.keys() & _URLS:
        value = part[key]
        _check_source(key, value.get("url") if isinstance(value, dict) else value, domains)
    source = part.get("source")
    if isinstance(source, dict):
        _check_source("source.url", source.get("url"), domains)
    kind = part.get("type")
    names = {*part, kind} if isinstance(kind, str) else set(part)
    medium = isinstance(source, dict) or not names.isdisjoint(_MEDIA)
    _check_fields(names, allow, medium=medium)
    return medium


def _check_fields(names: set[str], allow: frozenset[str], *, medium: bool) -> None:
    for name in names & FIELDS.keys() - allow:
        if name != "uuid" or medium:
            raise BadRequest(f"{name}: not taken by this model: it {FIELDS[name]}.", param=name, code="not_allowed")


def _check_source(name: str, url: object, domains: Domains | None) -> None:
    if url is None or domains is None:
        return
    if not isinstance(url, str) or not may_fetch(url, domains):
        said = "only `data:` URLs are taken" + (" and those of the server's media_domains" if domains else "")
        raise BadRequest(f"{name}: {said}.", param=name, code="url_not_allowed")


# No user, no IPv6, no backslash, no space, no port but the usual: what is left all parsers read in the same way.
_URL = re.compile(r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+)(?::(?P<port>80|443))?(?:[/?][!-\[\]-~]*)?")


def may_fetch(url: str, domains: Domains) -> bool:
    """Say whether an engine may fetch a URL. Hosts are compared as text: another spelling is another host."""
    if url[:5].lower() == "data:":
        return True
    match = _URL.fullmatch(url)
    return match is not None and match["host"].lower() in domains


DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
