"""The fastest good answer. Pure."""

from collections.abc import Sequence

from proxy.ensembles.answers import Answer, Verdict


def combine(answers: Sequence[Answer], seconds: Sequence[float]) -> Verdict:
    """Choose the fastest of the answers that are whole and no refusals; where none is, the fastest of all."""
    order = sorted(range(len(answers)), key=lambda i: (not answers[i].is_good, seconds[i], answers[i].member))
    return Verdict(order[0], details={"good": answers[order[0]].is_good})
