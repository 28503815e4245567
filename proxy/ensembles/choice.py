"""What a judge says, read as the number of an answer. Pure."""

import re

_NUMBER = re.compile(r"(?<![A-Za-z0-9_.])\d{1,3}(?![A-Za-z0-9_]|\.\d)")
_ALONE = re.compile(r"[^\w]*(?:answer|number|ответ|номер|回答)?[^\w]*(\d{1,3})[^\w]*", re.IGNORECASE)
_SAID = re.compile(
    r"(?:\b(?:best|choice|choose|chosen|pick|winner|verdict|select(?:ed)?|final)\b|лучш\w*|выбира\w*|выбор\w*|最も|最良|選)"
    r"[^\d\n]{0,40}?(\d{1,3})(?![A-Za-z0-9_]|\.\d)",
    re.IGNORECASE,
)


def read(text: str, answers: int) -> int | None:
    """Return the number, from 1, of the answer that a judge names; None where that is not clear.

    1. The number stands alone, or in JSON, or with little beside it.
    2. It is the only one that is named.
    3. It is the only one that is called the best, or the choice.
    """
    text = text.strip()
    if alone := _ALONE.fullmatch(text):
        return _valid({int(alone[1])}, answers)
    if named := _valid({int(n) for n in _NUMBER.findall(text)}, answers):
        return named
    return _valid({int(match[1]) for match in _SAID.finditer(text)}, answers)


def _valid(numbers: set[int], answers: int) -> int | None:
    """Return the only number of an answer among some."""
    valid = {number for number in numbers if 1 <= number <= answers}
    return valid.pop() if len(valid) == 1 else None
