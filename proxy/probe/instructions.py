"""A small fixed set of instructions, of which each is followed to the letter or not."""

import re
from collections.abc import Callable

from proxy.probe.asking import Asker, user

Facts = dict[str, object]
Check = Callable[[str], object]


def _only(word: str) -> Check:
    """Make a check for one word, whatever its case and the full stop after it."""
    return re.compile(rf"{word}[.!。]?", re.IGNORECASE).fullmatch


_SET: tuple[tuple[str, Check], ...] = (
    ("Reply with one word and nothing else: the capital of France.", _only("Paris")),
    ("Answer with yes or no only: is 7 greater than 3?", _only("yes")),
    ("Repeat this text exactly, and write nothing else: Zx9-quartz", _only("Zx9-quartz")),
    ("Write the numbers from 1 to 5, separated by single spaces, and nothing else.", _only("1 2 3 4 5")),
    ("What colour is grass? Answer in one word, in capital letters.", re.compile(r"GREEN[.!]?").fullmatch),
    ("Write three names of fruits, separated by commas, on one line, and nothing else.",
     re.compile(r"[\w -]+, ?[\w -]+, ?(?:and )?[\w -]+\.?").fullmatch),
    ("Ответь одним словом: столица России?", _only("Москва")),
    ("一語だけで答えてください。日本の首都は？", re.compile(r"東京都?[。．.]?").fullmatch),
)  # fmt: skip


async def score(asker: Asker) -> Facts:
    """Return the share of instructions that were followed; None where the server did not answer all."""
    followed = []
    for question, check in _SET:
        said = await asker.chat(user(question))
        if not said.taken:
            return {"instruction_score": None}
        followed.append(bool(check(said.text.strip())))
    return {"instruction_score": round(sum(followed) / len(followed), 3)}
