"""The answer with the most weight behind it. Pure.

Short answers are votes in one spelling. Answers in JSON are voted on field by field:

1. The keys of an object: the set of them that has the most weight. Who has other keys has no vote on the values, so
   that what is put together has a form that one of the answers has.
2. Each value, by the same rules if all are objects; lists, texts and numbers as a whole.
3. Where no two agree, the weightiest has it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from proxy.ensembles.answers import Answer, Verdict, best
from proxy.ensembles.spelling import numbers, short_answer

K = TypeVar("K", bound=Hashable)

_decode_object = msgspec.json.Decoder(dict[str, Any]).decode


class _Ballot(NamedTuple):
    """What one answer says of one thing."""

    member: str
    weight: float
    value: Any


def combine(answers: Sequence[Answer]) -> Verdict:
    """Vote on short answers and calls of tools."""
    ballots = [_Ballot(a.member, a.weight, _vote(a)) for a in answers]
    groups = _groups(ballots, lambda value: value)
    scores = tuple(_weight(groups[ballot.value]) for ballot in ballots)
    votes = [
        {"answer": key, "weight": _weight(group), "members": sorted(ballot.member for ballot in group)}
        for key, group in sorted(groups.items(), key=lambda item: (-_weight(item[1]), item[0]))
    ]
    chosen = best(answers, scores)
    share = round(scores[chosen] / _weight(ballots), 6)
    return Verdict(chosen, scores, {"agreement_score": share, "votes": votes})


def _vote(answer: Answer) -> str:
    return "\n".join(filter(None, (short_answer(answer.text), answer.calls)))


def combine_objects(answers: Sequence[Answer]) -> Verdict | None:
    """Vote on answers that are JSON objects, field by field; None where none is one. Others have no vote.

    The chosen answer is the one that agrees with the most of the outcome; its content is the outcome itself.
    """
    objects = {i: found for i, answer in enumerate(answers) if (found := _object(answer.text)) is not None}
    if not objects:
        return None
    ballots = [_Ballot(answers[i].member, answers[i].weight, found) for i, found in objects.items()]
    shares: dict[str, float] = {}
    outcome = _outcome(ballots, "", shares)
    scores = tuple(_agrees(objects[i], outcome) if i in objects else None for i in range(len(answers)))
    content = msgspec.json.encode(outcome).decode()
    agreement = sum(sorted(shares.values())) / len(shares) if shares else 1.0
    return Verdict(best(answers, scores), scores, {"agreement_score": round(agreement, 6), "fields": shares}, content)


def _object(text: str) -> dict[str, Any] | None:
    """Return the object that a text is, perhaps in a fence of Markdown."""
    text = text.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0]
    try:
        return _decode_object(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def _outcome(ballots: Sequence[_Ballot], path: str, shares: dict[str, float]) -> dict[str, Any]:
    """Return the object that is elected, and note the share of the weight that each value had by its path."""
    heard, _ = _elect(ballots, lambda value: frozenset(value))
    elected: dict[str, Any] = {}
    for name in heard[0].value:
        told = [ballot._replace(value=ballot.value[name]) for ballot in heard]
        where = f"{path}.{name}" if path else name
        if all(isinstance(ballot.value, dict) for ballot in told):
            elected[name] = _outcome(told, where, shares)
        else:
            alike, shares[where] = _elect(told, _spelling)
            elected[name] = alike[0].value
    return elected


def _elect(ballots: Sequence[_Ballot], spelling: Callable[[Any], Hashable]) -> tuple[list[_Ballot], float]:
    """Return the ballots that say what has the most weight, the weightiest of them first, and their share of it."""
    groups = _groups(ballots, spelling)
    most = max(groups.values(), key=_weight)  # of equals the first, which has the weightiest ballot
    return most, round(_weight(most) / _weight(ballots), 6)


def _groups(ballots: Sequence[_Ballot], spelling: Callable[[Any], K]) -> dict[K, list[_Ballot]]:
    """Return the ballots by what they say, the weightiest first."""
    groups: dict[K, list[_Ballot]] = {}
    for ballot in sorted(ballots, key=lambda b: (-b.weight, b.member)):
        groups.setdefault(spelling(ballot.value), []).append(ballot)
    return groups


def _weight(ballots: Sequence[_Ballot]) -> float:
    return sum(sorted(ballot.weight for ballot in ballots))


def _spelling(value: Any) -> Hashable:
    """Return what all spellings of a value have in common. A text is none of a number's, nor is `true` of 1's."""
    if isinstance(value, str):
        return str, short_answer(value)
    if isinstance(value, bool) or value is None:
        return bool, value
    if isinstance(value, int | float):
        return float, numbers(repr(value))
    if isinstance(value, list):
        return list, tuple(map(_spelling, value))
    return dict, frozenset((name, _spelling(item)) for name, item in value.items())


def _agrees(value: Mapping[str, Any], outcome: Mapping[str, Any]) -> float:
    """Return the share of the fields of the outcome that an object has."""
    same = sum(name in value and _spelling(value[name]) == _spelling(item) for name, item in outcome.items())
    return same / len(outcome) if outcome else 1.0
