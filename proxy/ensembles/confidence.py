"""The answer that its own model is surest of. Pure."""

import math
from collections.abc import Sequence

from proxy.ensembles.answers import Answer, Verdict, best


def combine(answers: Sequence[Answer]) -> Verdict | None:
    """Choose by weight times confidence; None where no answer tells the probabilities of its tokens.

    Confidence is exp(mean log probability of a token): in 0..1, so that more weight is always more. An answer without
    probabilities comes after those that have them, whatever its weight: nothing is made up for it.
    """
    confidences = [None if a.logprob is None else math.exp(min(a.logprob, 0.0)) for a in answers]
    if all(confidence is None for confidence in confidences):
        return None
    scores = tuple(None if c is None else a.weight * c for a, c in zip(answers, confidences, strict=True))
    told = {a.member: None if c is None else round(c, 6) for a, c in zip(answers, confidences, strict=True)}
    return Verdict(best(answers, scores), scores, {"confidence": told})
