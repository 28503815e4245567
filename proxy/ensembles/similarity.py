"""How alike two texts are: the share of the terms that they have in common, of all that they have. Pure.

The index of Jaccard over sets, as "token-set similarity" means it. What a term is depends on the writing:

1. Languages with spaces: a word, in one spelling, without its ending.
2. Languages without (Japanese, Chinese, Thai and others, and Korean, whose words carry particles): each pair of
   neighbouring characters.
3. Code: identifiers, numbers and operators as they are, and each pair of neighbours, so that `a - b` is not `b - a`;
   layout, brackets and quotes are style.
4. Formulas in a text: their operators.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from proxy.ensembles.answers import Answer
from proxy.ensembles.spelling import folded, numbers, stem

Terms = frozenset[str]

_IDLE_WORDS = Path(__file__).parent / "idle_words.txt"
_LONGEST = 8_000  # characters of an answer that are compared: of a longer one, both ends

_DENSE = (  # scripts without spaces between words: Thai to Khmer, Hangul, kana, Han
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff\uac00-\ud7af\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\U00020000-\U0003ffff"
)
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"  # that stand inside of words, and are not in \w
_WORD = re.compile(rf"[{_DENSE}]+|(?:[^\W_{_DENSE}]|[{_MARKS}'])+(?:\.\d+)?|[=+/^<>≤≥≠≈±×÷%]+|[\U0001f300-\U0001faff]")
_IS_DENSE = re.compile(rf"[{_DENSE}]").match
_DASH_OF_NUMBERS = re.compile(r"(?<=[\d)])\s?-\s?(?=[\d(])")
# What a line begins with is not looked for behind the lines before it: each of those would be read again for each.
_MARKUP = re.compile(r"^[^\S\n]*(?:[-*+>]|#{1,6}|\d+[.)])\s+|[*_`]{1,3}|[|]|-{3,}", re.MULTILINE)

_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_STATEMENT = re.compile(
    r"^[^\S\n]*(?:(?:async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[:({]|from\s+\S+\s+import\s|import\s+[\w.]+|#include\b|"
    r"(?:pub\s+)?fn\s+\w+|func\s+\w+\s*\(|function\s*\w*\s*\(|(?:const|let|var)\s+\w+\s*=|return\s+[^.]*$|"
    r"(?:public|private|static)\s+\w+|SELECT\s.+\sFROM\s|[^\n]*[;{}]\s*$)",
    re.MULTILINE,
)
_TOKEN = re.compile(
    r"[^\W\d]\w*|\d+(?:\.\d+)?|===|!==|\*\*=|//=|<<=|>>=|[=!<>+\-*/%&|^:]=|->|=>|\*\*|//|<<|>>|&&|\|\||::|\+\+|--|"
    r"[-+*/%<>=!&|^~?@]"
)


def terms(text: str) -> Terms:
    """Return the terms of a text: see the module."""
    text = _ends(text)
    found = set[str]()
    for piece, is_code in _pieces(text):
        found.update(_of_code(piece) if is_code else _of_prose(piece))
    return frozenset(found or [folded(text).strip()])


def jaccard(one: Terms, other: Terms) -> float:
    """Return how many terms are common to two sets, of all that are in either; 0..1."""
    return len(one & other) / len(one | other) if one or other else 1.0


def agreements(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Return for each answer how alike it is to the others, on average; 0.0 where there is no other."""
    sets = [terms(answer.said) for answer in answers]
    return tuple(_mean([jaccard(one, other) for j, other in enumerate(sets) if j != i]) for i, one in enumerate(sets))


def words(text: str) -> dict[str, str]:
    """Return the words that tell something of what a text is about, by their stems, in the order of the text."""
    found: dict[str, str] = {}
    for word in dict.fromkeys(_WORD.findall(_prose(_ends(text)))):
        for told in _NOUNS.findall(word) if _IS_DENSE(word) else [word]:
            if len(told) > 1 and told not in _idle() and (_IS_DENSE(told) or (len(told) > 2 and told[0].isalpha())):
                found.setdefault(stem(told), told)
    return found


# Of Japanese, what is written in Han characters or katakana; of the other dense scripts, runs.
_NOUNS = re.compile(
    r"[\u30a0-\u30ff]{2,}|[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff]{2,}|[\uac00-\ud7af\u0e00-\u0eff]{2,}"
)


@cache
def _idle() -> frozenset[str]:
    lines = _IDLE_WORDS.read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def _mean(values: list[float]) -> float:
    return sum(sorted(values)) / max(len(values), 1)  # sorted, so that the last bit does not depend on their order


def _ends(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}\n{text[-half:]}"


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text, and whether each is code."""
    if "```" not in text:
        yield text, bool(_STATEMENT.search(text))
        return
    at = 0
    for block in _FENCED.finditer(text):
        yield text[at : block.start()], False
        yield block[1], True
        at = block.end()
    yield text[at:], False


def _prose(text: str) -> str:
    return _MARKUP.sub(" ", numbers(folded(text)))


def _of_prose(text: str) -> Iterator[str]:
    text = _prose(text)
    if _DASH_OF_NUMBERS.search(text):
        yield "-"
    for word in set(_WORD.findall(text)):
        if _IS_DENSE(word):
            yield from (word[i : i + 2] for i in range(max(len(word) - 1, 1)))
        else:
            yield stem(word.strip("'")) or word


def _of_code(text: str) -> Iterator[str]:
    tokens = _TOKEN.findall(text)
    yield from set(tokens)
    yield from (f"{one} {other}" for one, other in set(pairwise(tokens)))
