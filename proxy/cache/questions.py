"""Which requests are compared by their meaning, for all aliases of a worker that want it."""

from collections.abc import Mapping

import msgspec

from proxy import wire
from proxy.cache import Entry, key, question
from proxy.cache.likeness import Likeness
from proxy.cache.semantic import Search, Semantic
from proxy.providers import Asked
from proxy.registry import Model


class Questions:
    """The semantic caches of a worker, by alias or model."""

    def __init__(self, semantics: Mapping[str, Semantic]) -> None:
        self._semantics = semantics  # all mutable state is theirs

    def __repr__(self) -> str:
        return f"<Questions {self._semantics!r}>"

    async def find(self, asked: Asked, model: Model, scope: str, key_id: str) -> Search | None:
        """Look for the answer to a request that means the same, None for one that is not compared.

        scope: the id of the key whose answers may be given, "" for those of all. key_id: of the key that asks.
        """
        semantic = self._of(asked, model)
        if semantic is None:
            return None
        found = question.read(asked.path, asked.envelope.fields, semantic.max_turns)
        if found is None:
            return None
        rest = wire.replace_field(asked.body, "messages", msgspec.Raw(found.instructions))
        partition = key.key(msgspec.structs.replace(asked, body=rest), model.name, model.revision, scope)
        return None if partition is None else await semantic.find(found.text, partition, key_id)

    async def keep(self, search: Search, asked: Asked, model: Model, name: bytes, entry: Entry) -> None:
        """An answer was generated, and is kept under a key: let it be found by its question."""
        if semantic := self._of(asked, model):
            await semantic.keep(search, name, entry)

    def report(self) -> dict[str, Likeness]:
        """Return what would be hit at which threshold, by alias or model."""
        return {name: semantic.report() for name, semantic in self._semantics.items()}

    def _of(self, asked: Asked, model: Model) -> Semantic | None:
        return self._semantics.get(asked.envelope.model) or self._semantics.get(model.name)
