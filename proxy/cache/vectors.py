"""Which stored question is nearest to a vector: in memory, by numpy. Imported only where a semantic cache is asked for.

A partition is what two questions must have in common before their words are compared at all. It is a digest of the
caller's scope, the model, and all of the request but the turns.
"""

from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


class Near(NamedTuple):
    """The nearest question: the key of its answer, and the cosine of the angle between the two."""

    key: bytes
    similarity: float


class Vectors(Protocol):
    """Where the vectors of questions are kept. All are of length one."""

    async def nearest(self, partition: bytes, vector: Vector) -> Near | None: ...

    async def add(self, partition: bytes, vector: Vector, key: bytes) -> None: ...

    async def forget(self, partition: bytes, key: bytes) -> None:
        """The answer is no longer there."""
        ...


class _Embedding(msgspec.Struct, frozen=True):
    embedding: list[float]


class _Embeddings(msgspec.Struct, frozen=True):
    data: list[_Embedding]


_decode = msgspec.json.Decoder(_Embeddings).decode


def read(document: bytes) -> Vector | None:
    """Return the first vector of an answer of /v1/embeddings, of length one; None where there is none."""
    try:
        vector = np.array(_decode(document).data[0].embedding)
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
        return None
    with np.errstate(over="ignore"):
        length = np.linalg.norm(vector)
    return (vector / length).astype(np.float32) if 0 < length < np.inf else None


class MemoryVectors:
    """So many vectors, all of them compared at once; the oldest gives way to a new one."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # All mutable state: a row for each vector, which gets its size from the first one; the beginnings of partitions
        # as numbers, to leave most of the rows aside; the partition and key of each row, and where a key is; how many
        # rows were ever written.
        self._clear(0)

    def __repr__(self) -> str:
        return f"<MemoryVectors {len(self._row_of)} of {self._capacity}>"

    async def nearest(self, partition: bytes, vector: Vector) -> Near | None:
        """Return the nearest of a partition, None where there is none of that size."""
        rows = np.flatnonzero(self._groups == _number(partition))
        if len(rows) == 0 or self._rows.shape[1] != len(vector):
            return None
        few = 4 * len(rows) < self._capacity  # to gather many rows takes longer than to compare all
        similarities = self._rows[rows] @ vector if few else (self._rows @ vector)[rows]
        best = int(np.argmax(similarities))
        owner = self._owners[int(rows[best])]
        if owner is None or owner[0] != partition:  # two partitions begin alike
            return None
        return Near(owner[1], float(similarities[best]))

    async def add(self, partition: bytes, vector: Vector, key: bytes) -> None:
        """Keep a vector. One of another size than the others means another model: they go."""
        if self._rows.shape[1] != len(vector):
            self._clear(len(vector))
        owner = (partition, key)
        row = self._row_of.get(owner)
        if row is None:
            row = self._written % self._capacity
            self._written += 1
            if (before := self._owners[row]) is not None:
                self._row_of.pop(before, None)
            self._row_of[owner] = row
        self._rows[row], self._groups[row], self._owners[row] = vector, _number(partition), owner

    async def forget(self, partition: bytes, key: bytes) -> None:
        """Leave a vector out from now on."""
        if (row := self._row_of.pop((partition, key), None)) is not None:
            self._groups[row], self._owners[row] = 0, None

    def _clear(self, size: int) -> None:
        self._rows: Vector = np.zeros((self._capacity, size), np.float32)
        self._groups = np.zeros(self._capacity, np.uint64)
        self._owners: list[tuple[bytes, bytes] | None] = [None] * self._capacity
        self._row_of: dict[tuple[bytes, bytes], int] = {}
        self._written = 0


def _number(partition: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(partition[:8], "little") | 1)  # 0 is for rows that are empty
