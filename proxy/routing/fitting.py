"""Fitting the model of complexity: ridge regression over sparse rows, by conjugate gradients. Pure, in plain Python.

The algorithm is CGLS (Hestenes and Stiefel, 1952), as in Bjoerck, "Numerical Methods for Least Squares Problems", 7.4.
14,000 prompts take some seconds.
"""

import math
import random
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import mul

import msgspec

from proxy.routing.complexity import BITS, SHAPE, Coefficients, Model, Reading, norm, standard

RIDGE = 6.0
RAREST = 4  # words and pairs in fewer prompts than this are left out
ROUNDS = 30
# How freely columns other than words move: the penalty is on what they are multiplied by.
_SHAPE_SCALE, _FREE_SCALE = 0.3, 3.0
# Long prompts are harder in one set of prompts and easier in another. So length is fitted freely, that no word may
# stand for it, and only half of what it explains is kept.
_LENGTH_KEPT = 0.5
# None of these makes a prompt easier. Labels may say so where answers were judged by a form that a solution in steps
# does not keep to.
_NEVER_EASIER = frozenset(("numbers", "number share", "operators", "brackets", "latex", "definition"))

Vector = list[float]


class Example(msgspec.Struct, frozen=True):
    """A prompt and what is to be learned of it: how much better the strong model does. weight: counts as so many."""

    reading: Reading
    target: float
    weight: float = 1.0


class _Design:
    """The matrix of the regression: sparse columns, one per bucket, then dense ones."""

    def __init__(self, examples: Sequence[Example], dense: Sequence[Vector], rarest: int) -> None:
        # Nothing changes after this.
        count = Counter(bucket for e in examples for bucket in e.reading.buckets)
        self.buckets = sorted(bucket for bucket, n in count.items() if n >= rarest)
        column = {bucket: i for i, bucket in enumerate(self.buckets)}
        self.weights = [math.sqrt(e.weight) for e in examples]
        self._rows = [[column[b] for b in e.reading.buckets if b in column] for e in examples]
        self._columns: list[list[int]] = [[] for _ in self.buckets]
        for i, row in enumerate(self._rows):
            for j in row:
                self._columns[j].append(i)
        self._norms = [w / norm(e.reading) for e, w in zip(examples, self.weights, strict=True)]
        self._dense = [list(map(mul, values, self.weights)) for values in dense]

    def __repr__(self) -> str:
        return f"<_Design {len(self._rows)} x ({len(self._columns)} + {len(self._dense)})>"

    def __len__(self) -> int:
        return len(self._columns) + len(self._dense)

    def times(self, x: Vector) -> Vector:
        """Return the product with a vector over columns."""
        y = [k * sum(map(x.__getitem__, row)) for row, k in zip(self._rows, self._norms, strict=True)]
        for values, coefficient in zip(self._dense, x[len(self._columns) :], strict=True):
            y = [a + coefficient * v for a, v in zip(y, values, strict=True)]
        return y

    def transposed_times(self, y: Vector) -> Vector:
        """Return the product of the transpose with a vector over rows."""
        scaled = list(map(mul, y, self._norms))
        return [sum(map(scaled.__getitem__, rows)) for rows in self._columns] + [_dot(v, y) for v in self._dense]


def fit(
    examples: Sequence[Example], start: Model | None = None, ridge: float = RIDGE, rarest: int = RAREST
) -> Coefficients:
    """Return the coefficients that explain the targets best.

    With `start`, its score is one more feature: few examples adjust it, many replace it. Raises ValueError without
    examples.
    """
    if not examples:
        raise ValueError("no examples to fit")
    means, spreads = (start.coefficients.means, start.coefficients.spreads) if start else _moments(examples)
    shapes = [standard(e.reading.shape, means, spreads) for e in examples]
    scales = [*(_FREE_SCALE if name == "length" else _SHAPE_SCALE for name in SHAPE)]
    dense = [[row[j] * scale for row in shapes] for j, scale in enumerate(scales)]
    dense.append([_FREE_SCALE] * len(examples))
    if start:
        dense.append([_FREE_SCALE * start.raw(e.reading) for e in examples])
    design = _Design(examples, dense, rarest)
    solved = _solve(design, list(map(mul, (e.target for e in examples), design.weights)), ridge)
    words = dict(zip(design.buckets, solved, strict=False))
    rest = solved[len(words) :]
    shape = [value * scale for value, scale in zip(rest, scales, strict=False)]
    shape = [max(0.0, x) if name in _NEVER_EASIER else x for name, x in zip(SHAPE, shape, strict=True)]
    shape[SHAPE.index("length")] *= _LENGTH_KEPT
    if start:
        words, shape = _added(words, shape, start, rest[-1] * _FREE_SCALE)
    return _scaled(_packed(means, spreads, shape, words), examples)


def out_of_fold(
    readings: Sequence[Reading], learn: Callable[[list[int]], Coefficients], folds: Sequence[int]
) -> list[float]:
    """Return a score of each prompt by a model that has not seen its fold. learn: fits the examples at these places."""
    scores = [0.0] * len(readings)
    for fold in sorted(set(folds)):
        model = Model(learn([i for i, f in enumerate(folds) if f != fold]))
        for i, f in enumerate(folds):
            if f == fold:
                scores[i] = model.score_of(readings[i])
    return scores


def shuffled_folds(size: int, folds: int = 5, seed: int = 0) -> list[int]:
    """Return a fold for each of `size` examples, all folds equally large."""
    places = [i % folds for i in range(size)]
    random.Random(seed).shuffle(places)  # noqa: S311 - nothing secret
    return places


def threshold_for_share(scores: Iterable[float], share: float) -> float:
    """Return the score from which on prompts are strong calls when this share of them shall be."""
    ranked = sorted(scores, reverse=True)
    strong = round(share * len(ranked))
    if strong == 0:
        return 1.0
    return ranked[strong - 1] if strong < len(ranked) else 0.0


def share_for_cost(cost: float, weak: float, strong: float) -> float:
    """Return the share of strong calls at which a call costs `cost` in the mean.

    weak, strong: what a call of each costs, in the same unit. Raises ValueError where no share does.
    """
    if not 0 <= weak < strong:
        raise ValueError(f"prices: a strong call must cost more than a weak one, not {strong:g} against {weak:g}")
    if not weak <= cost <= strong:
        raise ValueError(f"cost: {cost:g} is not within what calls cost, {weak:g} to {strong:g}")
    return (cost - weak) / (strong - weak)


def _solve(design: _Design, y: Vector, ridge: float) -> Vector:
    """Minimise |Ax - y|^2 + ridge |x|^2."""
    x, residual = [0.0] * len(design), y
    gradient = design.transposed_times(residual)
    direction, size = gradient, _dot(gradient, gradient)
    stop = size * 1e-8
    for _ in range(ROUNDS):
        if size <= stop:
            break
        image = design.times(direction)
        step = size / (_dot(image, image) + ridge * _dot(direction, direction))
        x = _plus(x, step, direction)
        residual = _plus(residual, -step, image)
        gradient = _plus(design.transposed_times(residual), -ridge, x)
        size, before = _dot(gradient, gradient), size
        direction = _plus(gradient, size / before, direction)
    return x


def _dot(a: Vector, b: Vector) -> float:
    return math.fsum(map(mul, a, b))


def _plus(a: Vector, factor: float, b: Vector) -> Vector:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def _moments(examples: Sequence[Example]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    columns = list(zip(*(e.reading.shape for e in examples), strict=True))
    means = [math.fsum(c) / len(c) for c in columns]
    spreads = [math.sqrt(math.fsum((x - m) ** 2 for x in c) / len(c)) for c, m in zip(columns, means, strict=True)]
    return tuple(means), tuple(s if s > 1e-9 else 1.0 for s in spreads)


def _added(words: dict[int, float], shape: Vector, start: Model, factor: float) -> tuple[dict[int, float], Vector]:
    every = range(1 << BITS)
    both = {b: value for b in every if (value := words.get(b, 0.0) + factor * start.word(b))}
    return both, _plus(shape, factor, list(start.coefficients.weights))


def _packed(
    means: tuple[float, ...], spreads: tuple[float, ...], shape: Vector, words: dict[int, float]
) -> Coefficients:
    unit = max(map(abs, words.values()), default=0.0) / 127 or 1.0
    table = array("b", bytes(1 << BITS))
    for bucket, value in words.items():
        table[bucket] = round(value / unit)
    packed = zlib.compress(table.tobytes(), 9)
    return Coefficients(BITS, means, spreads, tuple(shape), unit, packed, centre=0.0, width=1.0)


def _scaled(coefficients: Coefficients, examples: Sequence[Example]) -> Coefficients:
    """Return coefficients whose scores lie around 0.5 and use the range of 0..1."""
    model = Model(coefficients)
    raw = [model.raw(e.reading) for e in examples]
    centre = math.fsum(raw) / len(raw)
    spread = math.sqrt(math.fsum((x - centre) ** 2 for x in raw) / len(raw))
    return msgspec.structs.replace(coefficients, centre=centre, width=spread / 2 or 1.0)
