"""How often a question is like an earlier one, and their answers alike: what a threshold is chosen by. Pure."""

import re
from typing import Final

import msgspec

LOWEST: Final = 0.70  # cosines below are counted together
_STEPS: Final = 30  # of a hundredth each
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
    """What would be hit at which threshold: all steps from its cosine on. Of the worker that was asked.

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
    """Counts for one alias."""

    def __init__(self) -> None:
        # All mutable state: what is counted, and for each step the questions, the pairs of answers that were compared,
        # and the sum of how alike they were.
        self.questions = 0
        self.unanswered = 0
        self.hits = 0
        self._near = [0] * (_STEPS + 1)
        self._compared = [0] * (_STEPS + 1)
        self._alike = [0.0] * (_STEPS + 1)

    def __repr__(self) -> str:
        return f"<Tally {self.questions} questions, {self.hits} hits>"

    def near(self, similarity: float) -> None:
        """A question was this near to an earlier one."""
        self._near[_step(similarity)] += 1

    def compared(self, similarity: float, alike: float) -> None:
        """The answers of two questions that are this near were so much alike."""
        self._compared[_step(similarity)] += 1
        self._alike[_step(similarity)] += alike

    def report(self, *, shadow: bool, threshold: float) -> Likeness:
        """Return what was counted, from the nearest step down, without those that nobody was in."""
        steps = [
            Step(_least(i), self._near[i], self._alike[i] / self._compared[i] if self._compared[i] else None)
            for i in range(_STEPS, -1, -1)
            if self._near[i]
        ]
        return Likeness(shadow, threshold, self.questions, self.unanswered, self.hits, tuple(steps))


def alike(one: str, other: str) -> float:
    """Return the share of their words that two texts have in common (the Jaccard index of the sets), from 0 to 1."""
    a, b = set(_words(one.lower())), set(_words(other.lower()))
    return len(a & b) / len(a | b) if a or b else 1.0


def _step(similarity: float) -> int:
    return min(_STEPS, max(0, int((similarity - LOWEST) * 100 + 1 + 1e-6)))


def _least(step: int) -> float:
    return round(LOWEST + (step - 1) / 100, 2) if step else -1.0
