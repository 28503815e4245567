"""How long a prompt is, in tokens, as far as its bytes tell. Pure.

A token of a usual tokenizer is two to eight bytes of JSON: two of code, figures and scripts that a vocabulary has few
words of, over six of English. That is enough to tell a prompt that cannot be too long for a model from one that may be.
"""

from collections.abc import Mapping

import msgspec

_PROMPTS = ("messages", "prompt", "input", "system", "tools", "query", "documents")
_SHORTEST = 2  # bytes of a token
_LONGEST = 8
_decode_count = msgspec.json.Decoder(int).decode


class Length(msgspec.Struct, frozen=True):
    """Bounds of the tokens that a request needs room for, those of the answer included."""

    least: int
    most: int

    @classmethod
    def of(cls, fields: Mapping[str, msgspec.Raw]) -> "Length":
        """Measure the fields of a request. Pictures and the like have no length that their bytes tell."""
        prompts = [memoryview(fields[name]) for name in _PROMPTS if name in fields]
        size = sum(map(len, prompts))
        answer = max(_count(fields, "max_tokens"), _count(fields, "max_completion_tokens"))
        opaque = any(b'"data:' in bytes(prompt) for prompt in prompts)
        return cls(answer + (0 if opaque else size // _LONGEST), answer + size // _SHORTEST)


def _count(fields: Mapping[str, msgspec.Raw], name: str) -> int:
    try:
        return max(0, _decode_count(fields.get(name, b"0")))
    except msgspec.DecodeError:
        return 0
