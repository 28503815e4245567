"""What the parent process says of the caches of its workers, and has them do, for `polyvox cache`."""

import difflib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import msgspec

from proxy.cache import bulletin
from proxy.cache.bulletin import Bulletin
from proxy.cache.settings import CacheSettings
from proxy.config import Config
from proxy.errors import NoCache, RequestError, StoreUnavailable, UnknownModel

if TYPE_CHECKING:
    from proxy.cache.shield import Shield

OpenStore = Callable[[CacheSettings], AbstractAsyncContextManager["Shield | None"]]

_words = msgspec.json.Decoder(dict[str, str]).decode


class Supervision:
    """The caches of one server."""

    def __init__(self, config: Callable[[], Config], bulletin: Bulletin, open_store: OpenStore) -> None:
        """config: returns the current one. open_store: see caching.store_elsewhere."""
        self._config = config
        self._bulletin = bulletin
        self._open_store = open_store

    def __repr__(self) -> str:
        return f"<Supervision {self._bulletin!r}>"

    async def stats(self, _: bytes) -> tuple[int, bytes]:
        """Return a status, and what the caches hold and have done, as JSON; null for a server that keeps no answers."""
        settings = self._config().cache_settings()
        if settings is None:
            return 200, b"null"
        report = self._bulletin.all()
        try:
            async with self._open_store(settings) as store:
                if store is not None:
                    held = await store.stats()
                    report = msgspec.structs.replace(report, entries=held.entries, bytes=held.bytes)
        except StoreUnavailable as e:
            return e.status, e.envelope()
        return 200, msgspec.json.encode(report)

    async def purge(self, body: bytes) -> tuple[int, bytes]:
        """Have all workers drop what a body says (`model`, `key_prefix`); return a status, and how many that were."""
        try:
            settings = self._config().cache_settings()
            if settings is None:
                raise NoCache
            purge = bulletin.parse(_words(body), self._model_called)
            async with self._open_store(settings) as store:  # first: where it is away, nothing is said to be dropped
                shared = await store.purge(purge.model, purge.prefix) if store is not None else 0
        except RequestError as e:
            return e.status, e.envelope()
        return 200, msgspec.json.encode({"purged": shared + await self._bulletin.purge(purge)})

    def _model_called(self, name: str) -> str:
        config = self._config()
        model = config.names().model(name)
        if model not in config.models:
            raise UnknownModel(name, difflib.get_close_matches(name, config.models, n=3, cutoff=0.5))
        return model
