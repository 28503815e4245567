"""How often a question is like an earlier one, and their answers alike: what a threshold is chosen by. Pure."""

import re
from collections.abc import Sequence
from typing import Final

import msgspec

LOWEST: Final = 0.70  # cosines below are counted together
STEPS: Final = 30  # of a hundredth each
# A row: three counts; then for each step, that below the lowest included, the questions, the pairs of answers that were
# compared, and the sum of how alike they were.
_QUESTIONS, _UNANSWERED, _HITS, _NEAR = range(4)
_COMPARED: Final = _NEAR + STEPS + 1
_ALIKE: Final = _COMPARED + STEPS + 1
WIDTH: Final = _ALIKE + STEPS + 1
_words = re.compile(r"\w+").findall


class Step(msgspec.Struct, frozen=True):
    """The questions whose nearest earlier one was this near. least: the cosine that they have at the least.

    answers_alike: the share of their words that the two answers had in common, on average; None where no two answers
    were compared.
    """

    least: float
    questions: int
    answers_alike: float | None


class Likeness(msgspec.Struct, frozen=True):
    """What would be hit at which threshold: all steps from its cosine on. Since the start of the server.

    questions: requests that were compared by their meaning. unanswered: those for which no vector came in time.
    hits: those that were answered from the cache, or (shadow) would have been.
    """

    shadow: bool
    threshold: float
    questions: int
    unanswered: int
    hits: int
    steps: tuple[Step, ...]


class Tally:
    """Counts for one alias, in a row of doubles of this worker, and adds up those of all."""

    def __init__(self, parts: "Sequence[memoryview[float]] | None" = None, worker: int = 0, at: int = 0) -> None:
        """parts: the doubles of each worker, all laid out alike; None: my own. at: where the row begins."""
        # All mutable state: the doubles, of which this worker writes its own row only.
        self._parts = parts or [memoryview(bytearray(8 * WIDTH)).cast("d")]
        self._own = self._parts[worker]
        self._at = at

    def __repr__(self) -> str:
        return f"<Tally {self._sum(_QUESTIONS):.0f} questions, {self._sum(_HITS):.0f} hits>"

    def asked(self) -> None:
        """A question is compared."""
        self._own[self._at + _QUESTIONS] += 1

    def unanswered(self) -> None:
        """No vector came in time."""
        self._own[self._at + _UNANSWERED] += 1

    def hit(self) -> None:
        """It is answered from the cache, or would be."""
        self._own[self._at + _HITS] += 1

    def near(self, similarity: float) -> None:
        """It is this near to an earlier one."""
        self._own[self._at + _NEAR + _step(similarity)] += 1

    def compared(self, similarity: float, alike: float) -> None:
        """The answers of two questions that are this near are so much alike."""
        self._own[self._at + _COMPARED + _step(similarity)] += 1
        self._own[self._at + _ALIKE + _step(similarity)] += alike

    def report(self, *, shadow: bool = False, threshold: float = 0.0) -> Likeness:
        """Return what all workers have counted, from the nearest step down, without those that nobody was in."""
        steps = tuple(self._reported(i) for i in range(STEPS, -1, -1) if self._sum(_NEAR + i))
        questions, unanswered, hits = (round(self._sum(i)) for i in (_QUESTIONS, _UNANSWERED, _HITS))
        return Likeness(shadow, threshold, questions, unanswered, hits, steps)

    def _reported(self, step: int) -> Step:
        compared = self._sum(_COMPARED + step)
        alike = round(self._sum(_ALIKE + step) / compared, 4) if compared else None
        return Step(least(step), round(self._sum(_NEAR + step)), alike)

    def _sum(self, where: int) -> float:
        return sum(part[self._at + where] for part in self._parts)


def alike(one: str, other: str) -> float:
    """Return the share of their words that two texts have in common (the Jaccard index of the sets), from 0 to 1."""
    a, b = set(_words(one.lower())), set(_words(other.lower()))
    return len(a & b) / len(a | b) if a or b else 1.0


def _step(similarity: float) -> int:
    return min(STEPS, max(0, int((similarity - LOWEST) * 100 + 1 + 1e-6)))


def least(step: int) -> float:
    """Return the cosine from which on a question is in a step."""
    return round(LOWEST + (step - 1) / 100, 2) if step else -1.0


def buckets(report: Likeness) -> list[tuple[str, float]]:
    """Return the questions by cosine in cumulative buckets, as Prometheus has them."""
    found = {step.least: step.questions for step in report.steps}
    made, total = [], 0
    for step in range(STEPS + 1):
        total += found.get(least(step), 0)
        made.append((str(least(step + 1)) if step < STEPS else "+Inf", float(total)))
    return made
