"""The answer that the others agree with most. Pure."""

from collections.abc import Sequence
from statistics import fmean

from proxy.ensembles.answers import Answer, Verdict, best
from proxy.ensembles.similarity import agreements, words

_THEMES = 10


def combine(answers: Sequence[Answer]) -> Verdict:
    """Choose by weight times agreement, which is how alike an answer is to each of the others, on average.

    agreement_score is the mean of all agreements, 0.0 where there is one answer only: nobody has agreed with it.
    """
    agreement = agreements(answers)
    scores = tuple(answer.weight * own for answer, own in zip(answers, agreement, strict=True))
    details = {
        "agreement_score": round(fmean(sorted(agreement)), 6),
        "agreement": {a.member: round(own, 6) for a, own in zip(answers, agreement, strict=True)},
        "common_themes": themes(answers),
    }
    return Verdict(best(answers, scores), scores, details)


def themes(answers: Sequence[Answer]) -> list[str]:
    """Return the words that most of the weight says, of those that two answers or more have in common."""
    weights: dict[str, float] = {}
    shown: dict[str, list[str]] = {}
    for answer in sorted(answers, key=lambda a: a.member):
        for stem, word in words(answer.text).items():
            weights[stem] = weights.get(stem, 0.0) + answer.weight
            shown.setdefault(stem, []).append(word)
    common = [stem for stem in weights if len(shown[stem]) > 1]
    common.sort(key=lambda stem: (-weights[stem], -len(stem), stem))
    return [min(shown[stem], key=lambda word: (len(word), word)) for stem in common[:_THEMES]]
