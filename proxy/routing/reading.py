"""What is read of a text to judge it: of a long one the ends, since the task stands first or last. Pure.

Time is bounded whatever the length and the script.
"""

import re
import unicodedata

# Words written as one sign. To take one apart takes as long as fifty letters do.
_SQUARE = re.compile("[\u3300-\u3357\u337b-\u337f\ufdf0-\ufdff]")


def ends(text: str, head: int, tail: int) -> str:
    """Return the first and the last bytes of a text, as UTF-8 has them, with a line's end between; all of a short one.

    Bytes, since a letter that takes more of them says more: a Japanese one is half a word.
    """
    if text.isascii():
        return text if len(text) <= head + tail else f"{text[:head]}\n{text[-tail:]}"
    first, last = _bytes(text[: head + tail]), _bytes(text[-tail:])
    if len(text) <= head + tail and len(first) <= head + tail:
        return text
    return f"{first[:head].decode(errors='ignore')}\n{last[-tail:].decode(errors='ignore')}"


def plain(text: str) -> str:
    """Return a text in small letters, each in the form that Unicode calls its compatible one (NFKC)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _SQUARE.sub(" ", text))
    return text.lower()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
