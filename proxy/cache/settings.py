"""The `cache` section of the configuration."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from proxy.secret import Secret

Scope = Literal["key", "shared"]
When = Literal["deterministic", "always", "never"]
Size = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^[0-9]{1,12} ?([KMG]i?B)?$")]
Ttl = Annotated[float, Meta(gt=0, le=1e9)]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MiB = 2**20


class Embeddings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server of embeddings that is no model of ours. url: what its paths start with, as https://HOST/v1."""

    url: str
    model: str
    api_key: Secret | None = None


class Semantic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answers to questions that mean the same, not only those that are the same.

    embeddings: the model or alias of ours that makes vectors of questions, or a server elsewhere. threshold: the cosine
    from which on two questions mean the same. max_turns: questions of the user in a chat that is still compared.
    shadow: nothing is answered so, only counted: see /admin/cache/semantic. max_entries: questions that are known.
    timeout: seconds that a search may take. vectors: where they are kept, in the memory of each worker or in vector
    sets of the cache's Redis (8.0 or newer), where max_entries is for one caller's questions with the same parameters.
    """

    embeddings: str | Embeddings
    threshold: Annotated[float, Meta(gt=0, le=1)] = 0.95
    max_turns: Annotated[int, Meta(ge=1, le=100)] = 1
    shadow: bool = False
    max_entries: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    timeout: Annotated[float, Meta(gt=0)] = 0.2
    vectors: Literal["memory", "redis"] = "memory"


class CacheRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the answers of one model or alias are kept, otherwise than the rest. What is left out is as for the rest.

    semantic: see Semantic; without it, only what is the same to the letter is answered from the cache.
    """

    ttl: Ttl | None = None
    scope: Scope | None = None
    when: When | None = None
    semantic: Semantic | None = None


class CacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answers that are given again to who asks the same.

    store: memory (of each worker its own) or redis (for several replicas), at `url`. ttl: seconds that an answer is
    kept. max_bytes: of all answers in memory, divided among the workers; a number, or as 256MiB. max_entry_bytes:
    larger answers are not kept. scope: whether an API key sees its own answers only (key) or those of all (shared).
    when: of chats, completions, responses and messages, keep those of temperature 0 or with a seed (deterministic), all
    of them (always), or nothing of anything (never). Embeddings, rankings and token lists are always the same, and kept
    unless it is never. pace: events a second at which a kept answer is given as a stream; 0: at once. models: what a
    model or alias does otherwise.
    """

    store: Literal["memory", "redis"] = "memory"
    url: Secret | None = None
    ttl: Ttl = 3600.0
    max_bytes: Size = 256 * _MiB
    max_entry_bytes: Size = 4 * _MiB
    scope: Scope = "key"
    when: When = "deterministic"
    pace: Annotated[float, Meta(ge=0)] = 0.0
    models: dict[str, CacheRule] = {}

    def semantics(self) -> dict[str, Semantic]:
        """Return the models and aliases whose questions are compared by their meaning."""
        return {name: rule.semantic for name, rule in self.models.items() if rule.semantic}

    def rule(self, name: str, model: str) -> CacheRule:
        """Return the whole rule for a request that names a model or an alias of it."""
        own, other = self.models.get(name, _NONE), self.models.get(model, _NONE)
        return CacheRule(
            own.ttl or other.ttl or self.ttl,
            own.scope or other.scope or self.scope,
            own.when or other.when or self.when,
        )


_NONE = CacheRule()


def size(value: int | str) -> int:
    """Return the bytes of a size as it may be written: 1048576, 1MiB, 64 MB."""
    if isinstance(value, int):
        return value
    digits = value.rstrip("KMGiB ")
    return int(digits) * _UNITS[value[len(digits) :].strip()]
