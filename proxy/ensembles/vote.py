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

T = TypeVar("T")

_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_canonical = msgspec.json.Encoder(order="deterministic").encode


class _Ballot(NamedTuple):
    """What one answer says of one thing."""

    member: str
    weight: float
    value: Any


def combine(answers: Sequence[Answer]) -> Verdict:
    """Vote on short answers and calls of tools."""
    keys = [short_answer(a.text) + ("\n" + a.calls if a.calls else "") for a in answers]
    weights: dict[str, float] = {}
    for answer, key in sorted(zip(answers, keys, strict=True), key=lambda pair: pair[0].member):
        weights[key] = weights.get(key, 0.0) + answer.weight
    scores = tuple(weights[key] for key in keys)
    votes = [
        {"answer": key, "weight": weights[key], "members": sorted(voters)}
        for key, voters in sorted(_voters(answers, keys).items(), key=lambda item: (-weights[item[0]], item[0]))
    ]
    chosen = best(answers, scores)
    share = round(scores[chosen] / sum(weights.values()), 6)
    return Verdict(chosen, scores, {"agreement_score": share, "votes": votes})


def _voters(answers: Sequence[Answer], keys: Sequence[str]) -> dict[str, list[str]]:
    voters: dict[str, list[str]] = {}
    for answer, key in zip(answers, keys, strict=True):
        voters.setdefault(key, []).append(answer.member)
    return voters


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
    groups: dict[Hashable, list[_Ballot]] = {}
    for ballot in sorted(ballots, key=lambda b: (-b.weight, b.member)):
        groups.setdefault(spelling(ballot.value), []).append(ballot)
    most = max(groups.values(), key=_weight)  # of equals the first, which has the weightiest ballot
    return most, round(_weight(most) / _weight(ballots), 6)


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
