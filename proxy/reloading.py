"""Another configuration for a running server: read, checked whole, and then followed by all; or refused whole.

It comes from the file, on SIGHUP, as the file changes, or when somebody asks; or from an administrator who puts or
deletes a model, which is written to the file first.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, Self

import msgspec

from proxy import changes, config, providers
from proxy.changes import Changes
from proxy.commands.console import Console
from proxy.config import Loaded
from proxy.errors import ConfigError, NotFollowed, ServeError

log = logging.getLogger(__name__)

_POLL = 0.5  # seconds between two looks at the file; it must be the same twice, as whoever writes it is done then


class Followers(Protocol):
    """Those who go by the configuration: the workers and the engines."""

    async def check(self, new: Loaded, old: Loaded) -> None:
        """See that there is room for what is new. Raises ConfigError or ServeError."""

    async def follow(self, new: Loaded, old: Loaded) -> None:
        """Follow a configuration that was checked. Raises NotFollowed where somebody does not; all others do."""

    def refused(self) -> None:
        """The configuration in the file was refused."""


class Applied(msgspec.Struct, frozen=True):
    """What is told of a reload. generation: the number of the configuration that all workers follow now."""

    generation: int
    changes: Changes


class Shown(msgspec.Struct, frozen=True):
    """A model as it is configured. What is secret is `${NAME}`, as in the file, or masked."""

    name: str
    settings: dict[str, Any]


class _Look(msgspec.Struct, frozen=True):
    """What tells a file from what it was before, without reading it."""

    inode: int
    size: int
    changed: int

    @classmethod
    def at(cls, path: Path) -> Self | None:
        """Look at a file; None while there is none."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class Start(NamedTuple):
    """The configuration that a server started with: its file, the text that was there, and what that means."""

    file: Path
    environ: Mapping[str, str]
    text: str
    loaded: Loaded


class Reloader:
    """The configuration of a running server, and its file."""

    def __init__(self, start: Start, followers: Followers, console: Console) -> None:
        self._file, self._environ = start.file, start.environ
        self._followers = followers
        self._console = console
        # All mutable state: what is followed, and its number; one change of it at a time; the text that was last tried.
        self.loaded = start.loaded
        self._generation = 1
        self._lock = asyncio.Lock()
        self._tried = _digest(start.text)

    def __repr__(self) -> str:
        return f"<Reloader {self._file} generation {self._generation}>"

    async def reload(self) -> Applied:
        """Follow the file as it is now. Raises ConfigError or ServeError where it is refused; nothing changes then."""
        async with self._lock:
            try:
                text = config.read(self._file)
                self._tried = _digest(text)
                new = await self._checked(text)
            except (ConfigError, ServeError):
                self._followers.refused()
                raise
            return await self._apply(new)

    async def put_model(self, name: str, settings: Mapping[str, Any]) -> Applied:
        """Have a model of these settings, here and in the file. Raises the same, and the file is as it was then."""
        return await self._edit(lambda editing, text: editing.put_model(text, name, settings))

    async def delete_model(self, name: str) -> Applied:
        """Have a model no more, here and in the file. Raises the same."""
        return await self._edit(lambda editing, text: editing.remove_model(text, name))

    async def _edit(self, edit: Callable[[ModuleType, str], str]) -> Applied:
        from proxy import editing  # it takes a while to import, and most servers never need it

        async with self._lock:
            text = edit(editing, config.read(self._file))
            new = await self._checked(text)
            editing.write(self._file, text)
            self._tried = _digest(text)
            return await self._apply(new)

    def models(self) -> Iterator[Shown]:
        """Yield all models as they are configured."""
        for name, model in self.loaded.config.models.items():
            settings = msgspec.to_builtins(model, enc_hook=lambda secret: secret.reveal())
            yield Shown(name, _redacted(settings, self.loaded))

    # What all of this does: check, then apply

    async def _checked(self, text: str) -> Loaded:
        """Return what a text says, checked as at a start. Raises ConfigError or ServeError."""
        new = config.parse(text, self._file, self._environ)
        config.check_reach(changes.pinned(new.config, self.loaded.config).server, new.error)
        await asyncio.to_thread(providers.check, new)
        await self._followers.check(new, self.loaded)
        return new

    async def _apply(self, new: Loaded) -> Applied:
        """Have all follow a configuration, and say what has changed."""
        old = self.loaded
        what = changes.between(old.config, new.config)
        self.loaded = msgspec.structs.replace(new, config=changes.pinned(new.config, old.config))
        self._generation += 1
        await self._followers.follow(self.loaded, old)
        self._console.say(f"configuration {self._generation}: {what}")
        return Applied(self._generation, what)

    # Watching

    async def watch(self, asked: asyncio.Event) -> None:
        """Reload whenever the event is set and, unless `server.watch` is off, when the file has changed. For ever."""
        before = looked = None
        while True:
            try:
                await asyncio.wait_for(asked.wait(), _POLL)
                asked.clear()
                await self._reload_aloud()
            except TimeoutError:
                now = _Look.at(self._file)
                if now == before and now not in (None, looked) and self.loaded.config.server.watch:
                    looked = now
                    await self._follow_file()
                before = now

    async def _follow_file(self) -> None:
        """The file was written: follow it, unless we wrote it."""
        try:
            is_new = _digest(config.read(self._file)) != self._tried
        except ConfigError:
            is_new = True
        if is_new:
            await self._reload_aloud()

    async def _reload_aloud(self) -> None:
        try:
            await self.reload()
        except NotFollowed as e:
            self._console.say(str(e), style="red")
        except (ConfigError, ServeError) as e:
            self._console.say(f"the new configuration is refused, the one before stays: {e}", style="red")
        except Exception:  # whatever is in a file, the server goes on
            log.exception("the new configuration is refused, the one before stays")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _redacted(value: Any, loaded: Loaded) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item, loaded) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, loaded) for item in value]
    return loaded.redact(value) if isinstance(value, str) else value
