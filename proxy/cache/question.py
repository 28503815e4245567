"""What of a request is compared by its meaning, and what must be the same to the letter. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

PATH = "/v1/chat/completions"
_TOOLS = ("tools", "functions")
_NULL = b"null"
_LONGEST = 8192  # characters of a question; embedding models would cut a longer one
_INSTRUCTING = ("system", "developer")


class Question(NamedTuple):
    """text: the turns, as one text for an embedding model. instructions: the messages before them, as JSON."""

    text: str
    instructions: bytes


class _Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message of words and nothing else: with pictures, tool calls or a name it is none."""

    role: str
    content: str | list[_Text]

    def words(self) -> str:
        """Return the words, those of several parts on lines of their own."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


_decode = msgspec.json.Decoder(list[_Message]).decode


def read(path: str, fields: Mapping[str, msgspec.Raw], max_turns: int) -> Question | None:
    """Return the question of a chat, None for whatever cannot be compared by its meaning.

    1. Anything but a chat, and a chat with tools.
    2. A message with more than words.
    3. More questions of the user than are compared, or roles in another order than is usual.
    4. No words, or more than an embedding model takes.
    """
    if path != PATH or any(bytes(fields.get(name, _NULL)) != _NULL for name in _TOOLS):  # 1
        return None
    try:
        messages = _decode(bytes(fields.get("messages", b"[]")))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # 2
        return None
    first = next((i for i, message in enumerate(messages) if message.role not in _INSTRUCTING), len(messages))
    turns = messages[first:]
    if not _is_talk(turns) or len(turns) > 2 * max_turns - 1:  # 3
        return None
    text = turns[0].words() if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.words()}" for turn in turns)
    if not text.strip() or len(text) > _LONGEST:  # 4
        return None
    return Question(text, msgspec.json.encode([(message.role, message.words()) for message in messages[:first]]))


def _is_talk(turns: list[_Message]) -> bool:
    """Say whether user and assistant take turns, and the user has the first and the last."""
    expected = ["assistant" if i % 2 else "user" for i in range(len(turns))]
    return len(turns) % 2 == 1 and [turn.role for turn in turns] == expected
