"""What routing between a weak and a strong model is worth, in RouteLLM's definitions (Ong et al., 2024). Pure.

Prompts go to the strong model in the order of their scores. PGR at a share of strong calls is the part of the gap
between the models' accuracies that is closed there: (accuracy - weak) / (strong - weak).
"""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

EDGES = 10  # the area is taken over the shares 0, 1/10 .. 1


class Curve:
    """Accuracy over the share of strong calls. Equal scores count as if in random order."""

    __slots__ = ("_gains", "gap")

    def __init__(self, scores: Sequence[float], weak: Sequence[float], strong: Sequence[float]) -> None:
        """scores: highest goes to the strong model first. weak, strong: right (1) or wrong (0), for each prompt.

        Raises ValueError where there are no prompts, or where both models are right equally often.
        """
        ranked = sorted(zip(scores, strong, weak, strict=True), key=lambda row: -row[0])
        gains: list[float] = []
        for _, group in groupby(ranked, key=lambda row: row[0]):
            tied = [s - w for _, s, w in group]
            gains += [sum(tied) / len(tied)] * len(tied)
        self._gains = [0.0, *accumulate(gains)]
        self.gap = self._gains[-1]
        if abs(self.gap) < 1e-9:
            raise ValueError("both models are right equally often: there is nothing to gain by routing")

    def __repr__(self) -> str:
        return f"<Curve of {len(self._gains) - 1} prompts, APGR {self.apgr():.3f}>"

    def pgr(self, share: float) -> float:
        """Return the part of the gap that is closed when this share of calls is strong."""
        return self._gains[round(share * (len(self._gains) - 1))] / self.gap

    def apgr(self) -> float:
        """Return the mean of PGR over shares, by the trapezoid rule. Random routing has 0.5."""
        return sum((a + b) / 2 for a, b in pairwise(self.pgr(i / EDGES) for i in range(EDGES + 1))) / EDGES

    def cpt(self, part: float) -> float:
        """Return the smallest share of strong calls that closes this part of the gap."""
        n = len(self._gains) - 1
        return next(i / n for i, gain in enumerate(self._gains) if gain / self.gap >= part - 1e-9)
