"""What of a prompt an endpoint has in its prefix cache, told from what we sent it.

A prompt is cut into blocks, and each gets the checksum of itself and all before it, so that one mark stands for a whole
prefix (as in vLLM's and SGLang's own prefix caches). Blocks grow with the distance from the start: a sixth of it, so
the error is a sixth or half a kilobyte at most, and a prompt of 100 KB has 28 marks. CRC-32 is as fast as anything in
CPython's standard library; a collision costs one request a less than ideal endpoint.
"""

import re
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf
from zlib import crc32

import msgspec

_SMALLEST = 512  # bytes of a block
_SHARE = 6
_LONGEST = 8 * 1024 * 1024  # bytes; what is behind is taken for new

# The fields of a request that make its prompt, in the order in which templates render them.
_FIELDS = ("tools", "system", "instructions", "messages", "prompt", "input")
_MEDIA = re.compile(rb";base64,[A-Za-z0-9+/=]*")
_MEDIA_MARK = b";base64,"
_FEW = 32  # semicolons, between which a text is searched faster than for a word
_MEDIA_BYTES = 4000  # that a picture counts for: a thousand tokens, whatever its size as a file


def _ends() -> tuple[int, ...]:
    ends = [0]
    while ends[-1] < _LONGEST:
        ends.append(ends[-1] + max(_SMALLEST, ends[-1] // _SHARE))
    return tuple(ends[1:])


_ENDS = _ends()
_BLOCKS = tuple(slice(start, end) for start, end in pairwise((0, *_ENDS)))


class Prompt(msgspec.Struct, frozen=True):
    """The prompt of a request.

    size: in bytes, a picture counted as what it makes the model read. marks: of each whole block, first to last.
    share: what a byte of the text counts for, less than 1.0 where pictures are in it.
    """

    size: int
    marks: Sequence[int]
    share: float = 1.0


def read(fields: Mapping[str, bytes | msgspec.Raw], salt: str | None = None) -> Prompt:
    """Return the prompt that the fields of a request make. Equal text under another salt, ours or the client's, has
    other marks, as engines keep it apart."""
    text = b"".join([bytes(fields[name]) for name in _FIELDS if name in fields])
    mark = crc32(salt.encode()) if salt else 0
    if "cache_salt" in fields:
        mark = crc32(bytes(fields["cache_salt"]), mark)
    size = _size(text)
    return Prompt(size, _marks(text, mark), 1.0 if size == len(text) else min(size / len(text), 1.0))


def _size(text: bytes) -> int:
    if not _has_media(text):
        return len(text)
    media = _MEDIA.findall(text)
    return len(text) - sum(map(len, media)) + _MEDIA_BYTES * len(media)


def _has_media(text: bytes) -> bool:
    """Say whether a text has media in it: prose has few semicolons, and to find each costs next to nothing."""
    at = text.find(b";")
    for _ in range(_FEW):
        if at < 0 or text.startswith(_MEDIA_MARK, at):
            return at >= 0
        at = text.find(b";", at + 1)
    return at >= 0 and _MEDIA_MARK in text


def _marks(text: bytes, mark: int) -> list[int]:
    return [mark := crc32(text[block], mark) for block in _BLOCKS[: bisect_right(_ENDS, len(text))]]


class PrefixTable:
    """Which endpoint was sent which prefix, and when: a table of fixed size, in memory that all workers may share.

    A row is a mark and, for each endpoint, what its clock showed when it was last sent the prefix. The clock of an
    endpoint counts what came new into its cache, so a prefix is still there while the clock has moved by less than the
    cache holds: least recently used, without a list. A mark that shares its row with another pushes it out, which
    costs one block's accuracy, since each longer prefix has a mark of its own. Several writers need no lock: the worst
    that can happen is a wrong guess.
    """

    def __init__(self, memory: "memoryview[float]", endpoints: int) -> None:
        """Use memory of `size(endpoints)` doubles."""
        self._width = 1 + endpoints
        self._rows = len(memory) // self._width
        self._never = memoryview(array("d", [-inf] * endpoints))
        # All mutable state: the table.
        self._table = memory

    def __repr__(self) -> str:
        return f"<PrefixTable {self._rows} rows for {self._width - 1} endpoints>"

    @staticmethod
    def size(endpoints: int) -> int:
        """Return how many doubles the table for so many endpoints has."""
        return ROWS * (1 + endpoints)

    def found(self, prompt: Prompt, oldest: Sequence[float]) -> list[int]:
        """Return how many bytes of the text of a prompt each endpoint has.

        oldest: what each clock showed when the oldest that is still in its cache came, that is what it shows now less
        the bytes that the cache holds.
        """
        table, width, rows = self._table, self._width, self._rows
        found = [0] * (width - 1)
        missing: Sequence[int] = range(width - 1)
        seen: Sequence[float] = []
        for i in range(len(prompt.marks) - 1, -1, -1):
            at = prompt.marks[i] % rows * width
            if table[at] != prompt.marks[i]:
                continue
            before, seen = seen, table[at + 1 : at + width].tolist()
            if seen == before:  # as in most rows of a conversation, of which no endpoint has any but the longest part
                continue
            end, still = _ENDS[i], []
            for e in missing:
                if seen[e] > oldest[e]:
                    found[e] = end
                else:
                    still.append(e)
            if not still:
                break
            missing = still
        return found

    def note(self, prompt: Prompt, endpoint: int, clock: float) -> None:
        """The prompt was sent to an endpoint, whose clock shows so much now."""
        table, width, rows, never = self._table, self._width, self._rows, self._never
        for mark in prompt.marks:
            at = mark % rows * width
            if table[at] != mark:
                table[at] = mark
                table[at + 1 : at + width] = never
            table[at + 1 + endpoint] = clock


ROWS = 1 << 15
