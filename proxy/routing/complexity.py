"""How hard a prompt is: what a strong model is likely to get right and a weak one wrong. Pure, but for its data files.

A linear model over a few features of the text's shape and over hashed words and pairs of words, after "RouteLLM:
Learning to Route LLMs with Preference Data" (Ong et al., 2024) in aim, and "Feature Hashing for Large Scale Multitask
Learning" (Weinberger et al., 2009) in means. What it was fitted on and what it is worth: `complexity.md`.
"""

import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import filterfalse
from pathlib import Path

import msgspec

from proxy.errors import ConfigError
from proxy.routing import reading

SHIPPED = Path(__file__).parent / "complexity.json"
_GLOSSARY = Path(__file__).parent / "glossary.txt"

BITS = 18
_MASK = (1 << BITS) - 1
_PAIR = 0x5BD1E995  # keeps the pair ("i", "t") apart from the word "it"

_HEAD, _TAIL = 700, 400  # bytes of a long prompt that are read
_FIRST, _LAST = 150, 90  # words; more of them only where every sign is one
_LONG = 2000  # characters; longer prompts are all long
_STEM = 5  # what the glossary has of fewer letters is a whole word

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# Answers to choose from, and "Answer:", are the form of an exam and not a property of the question.
_CHOICES = re.compile(r"^[ \t]*(?:\(?[a-h][.)][ \t].*|(?:answer|ответ|答え)[ \t]*:?[ \t]*)$", re.MULTILINE)
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_TOKEN = re.compile(rf"[^\W\d_{_CJK}]+|[{_CJK}]|[^\s\w]|\d|_+")
_ASCII_TOKEN = re.compile(r"[a-z]+|_+|[^\sa-z]")  # the same of such a text, in half the time

_OPERATORS = frozenset("=+*/^<>|%≤≥≠≈±×÷∑∏∫√∂∞")
_BRACKETS = frozenset("{}[]\\`;#$()")
_DEFINITION = re.compile(r"^[^\S\n]*(?:def|class|import|from|function|public|#include|select|fn|func)\b", re.MULTILINE)

SHAPE = ("numbers", "number share", "operators", "brackets", "latex", "definition", "long words", "question", "commas",
         "blank", "length")  # fmt: skip


class Reading(msgspec.Struct, frozen=True):
    """What the model sees of a prompt: buckets of its words and pairs of words, and the numbers named in SHAPE."""

    buckets: frozenset[int]
    shape: tuple[float, ...]


class Coefficients(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fitted model, as its file holds it.

    bits: of a bucket. means, spreads, weights: of each feature of SHAPE. words: a signed byte for every bucket, in
    units of `unit`, compressed by zlib. centre, width: of raw scores, so that 0.5 is a middling prompt. threshold: from
    which score on the strong model is asked, where it was calibrated.
    """

    bits: int
    means: tuple[float, ...]
    spreads: tuple[float, ...]
    weights: tuple[float, ...]
    unit: float
    words: bytes
    centre: float
    width: float
    threshold: float | None = None


class Model:
    """Scores prompts. Immutable."""

    __slots__ = ("_table", "coefficients")

    def __init__(self, coefficients: Coefficients) -> None:
        self.coefficients = coefficients
        self._table = array("b", zlib.decompress(coefficients.words))

    def __repr__(self) -> str:
        return f"<Model of complexity, {sum(map(bool, self._table))} words and pairs>"

    def score(self, prompt: str) -> float:
        """Return the complexity of a prompt, in 0..1."""
        return self.score_of(read(prompt))

    def score_of(self, reading: Reading) -> float:
        """Return the complexity of a prompt that was read before, in 0..1."""
        x = (self.raw(reading) - self.coefficients.centre) / self.coefficients.width
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, x))))

    def raw(self, reading: Reading) -> float:
        """Return the linear score of what was read, on a scale of its own."""
        c = self.coefficients
        words = sum(map(self._table.__getitem__, reading.buckets)) * c.unit / norm(reading)
        shape = standard(reading.shape, c.means, c.spreads)
        return words + sum(w * x for w, x in zip(c.weights, shape, strict=True))

    def word(self, bucket: int) -> float:
        """Return the weight of a bucket."""
        return self._table[bucket] * self.coefficients.unit


def load(file: Path = SHIPPED) -> Model:
    """Read a model. Raises ConfigError where the file is missing or is none."""
    try:
        model = Model(msgspec.json.decode(file.read_bytes(), type=Coefficients))
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}") from None
    except (msgspec.DecodeError, zlib.error) as e:
        raise ConfigError(f"{file}: not a model of complexity: {e}") from None
    c = model.coefficients
    shaped = len(c.means) == len(c.spreads) == len(c.weights) == len(SHAPE)
    if c.bits != BITS or len(model._table) != 1 << BITS or not shaped:
        raise ConfigError(f"{file}: a model of complexity for another version; make it anew with `polyvox route fit`")
    return model


@cache
def shipped() -> Model:
    """Return the model that comes with the program, read when it is first asked for."""
    return load()


def read(prompt: str) -> Reading:
    """Return what the model sees of a prompt. Time is bounded whatever its length."""
    ends = reading.ends(prompt, _HEAD, _TAIL)
    text = reading.plain(ends)[: _HEAD + _TAIL + 1]
    text = _NUMBER.sub("0", _CHOICES.sub("", text).strip() or text)
    tokens = _tokens(text)
    words = list(filter(str.isalpha, tokens))
    length = min(len(text) + len(prompt) - len(ends), _LONG)
    return Reading(_buckets(words), _shape(text, tokens, words, length))


def norm(reading: Reading) -> float:
    """Return what the sum of a prompt's words is divided by."""
    return math.sqrt(len(reading.buckets) or 1)


def standard(shape: Sequence[float], means: Sequence[float], spreads: Sequence[float]) -> list[float]:
    """Return a shape in standard deviations; what is far from all that was fitted counts as the edge of it."""
    return [max(-2.5, min(2.5, (x - m) / s)) for x, m, s in zip(shape, means, spreads, strict=True)]


def _tokens(text: str) -> list[str]:
    if text.isascii():
        return _ends_of(_ASCII_TOKEN.findall(text))
    words = _glossary()
    text = _japanese().sub(lambda match: f" {words[match.group()]} ", text)
    return _in_english(_ends_of(_TOKEN.findall(text)))


def _ends_of(tokens: list[str]) -> list[str]:
    return tokens if len(tokens) <= _FIRST + _LAST else tokens[:_FIRST] + tokens[-_LAST:]


def _buckets(words: list[str]) -> frozenset[int]:
    """Return the buckets of words and pairs. CRC-32 is the same in every process, which `hash()` is not."""
    crc32, written = zlib.crc32, " ".join(words).encode("utf-8", "surrogatepass").split(b" ")
    marks = list(map(crc32, written))
    pairs = [crc32(word, before ^ _PAIR) & _MASK for word, before in zip(written, [0, *marks], strict=False)]
    return frozenset(pairs).union([mark & _MASK for mark in marks]) if words else frozenset()


def _shape(text: str, tokens: list[str], words: list[str], length: int) -> tuple[float, ...]:
    n = len(tokens) or 1
    signs = Counter(filterfalse(str.isalpha, tokens))
    numbers = signs["0"]
    return (
        min(numbers, 12),
        numbers / n,
        min(0.2, _sum(signs, _OPERATORS) / n),
        min(0.2, _sum(signs, _BRACKETS) / n),
        "\\" in signs or "$" in signs,
        _DEFINITION.search(text) is not None,
        sum(map((8).__lt__, map(len, words))) / n,
        "?" in signs,
        (signs[","] + signs["、"]) / n,
        "_" in text,
        math.log1p(length),
    )


def _sum(signs: Counter[str], kind: frozenset[str]) -> int:
    return sum(map(signs.__getitem__, kind & signs.keys()))


def _in_english(tokens: list[str]) -> list[str]:
    """Return tokens with each Russian word that the glossary has, by its stem, replaced by the English one."""
    stems = _glossary()
    return [token if token.isascii() or len(token) == 1 else _known(token, stems) for token in tokens]


def _known(token: str, stems: dict[str, str]) -> str:
    if token in stems:
        return stems[token]
    for size in range(_STEM, min(len(token), 10)):
        if token[:size] in stems:
            return stems[token[:size]]
    return token


@cache
def _glossary() -> dict[str, str]:
    """Return the English word for each stem or word of the glossary."""
    lines = [line.partition(":") for line in _GLOSSARY.read_text("utf-8").splitlines() if not line.startswith("#")]
    return {word.strip(): english for english, _, words in lines for word in words.split(",")}


@cache
def _japanese() -> re.Pattern[str]:
    """Return a pattern of the glossary's Japanese words, which stand in a text without spaces."""
    words = sorted((word for word in _glossary() if re.match(f"[{_CJK}]", word)), key=len, reverse=True)
    return re.compile("|".join(words))
