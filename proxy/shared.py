"""Memory that all processes of a server share: what has a place in it keeps that place, whatever is added later."""

import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Self

import msgspec

from proxy.config import Config

_DOUBLE = 8  # bytes


def shared_memory(name: str = "metrics") -> int:
    """Return the descriptor of new memory. It ends with the last process that has it."""
    return os.memfd_create(f"polyvox-{name}")


class Shared:
    """The memory behind a descriptor, which may be closed then; -1: memory of my own."""

    def __init__(self, descriptor: int = -1) -> None:
        # All mutable state: the descriptor, until nobody holds this any more.
        self._descriptor = os.dup(descriptor) if descriptor >= 0 else shared_memory()
        weakref.finalize(self, os.close, self._descriptor)

    def __repr__(self) -> str:
        return f"<Shared {os.fstat(self._descriptor).st_size} bytes>"

    def doubles(self, count: int) -> "memoryview[float]":
        """Map the first `count` doubles, one or more; there are as many from then on, new ones are 0.0.

        Memory only grows: several processes may ask at once, and what they mapped before stays as it is.
        """
        os.posix_fallocate(self._descriptor, count * _DOUBLE - 1, 1)
        return memoryview(mmap.mmap(self._descriptor, count * _DOUBLE)).cast("d")


class Slot(msgspec.Struct, frozen=True):
    """A model for which there is room: with these endpoints, and with a table of prefixes or without."""

    model: str
    endpoints: tuple[str, ...]
    table: bool = False


class Slots(msgspec.Struct, frozen=True):
    """What has room in the memory of a server.

    given: all that ever had, in the order of their coming, by which every process finds the same places. current: those
    of the configuration's models.
    """

    given: tuple[Slot, ...]
    current: tuple[Slot, ...]

    @classmethod
    def of(cls, endpoints: Mapping[str, Sequence[str]], tables: Sequence[str], given: Sequence[Slot] = ()) -> Self:
        """Return the slots of models. endpoints: their names, by model. tables: the models with one. given: before."""
        current = tuple(Slot(model, tuple(names), model in tables) for model, names in endpoints.items())
        return cls(tuple(dict.fromkeys((*given, *current))), current)


def slots_of(config: Config, given: Sequence[Slot] = ()) -> Slots:
    """Return the slots of a configuration's models; of its ensembles, and of aliases whose questions are compared by
    their meaning, which have no endpoints.

    given: those that had room before.
    """
    names = config.endpoint_names()
    learning = [name for name in names if len(names[name]) > 1 and config.models[name].balance == "predicted_ttft"]
    cache = config.cache_settings()
    compared = [name for name in (cache.semantics() if cache else ()) if name not in names]
    return Slots.of(names | dict.fromkeys((*config.ensembles, *compared), ()), learning, given)
