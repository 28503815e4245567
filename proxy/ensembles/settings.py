"""The section `ensembles:` of the configuration."""

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Strategy = Literal["consensus", "vote", "confidence", "judge", "fuse", "first"]
Fault = tuple[tuple[str | int, ...], str]  # the path below the section, and what is wrong there


class EnsembleSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Models that answer together, under one name.

    members: models, aliases or groups, each with its weight; a name that is asked twice needs two aliases. strategy:
    how one answer is made of theirs. quorum: answers that there must be. timeout: seconds that the members have, and
    then once more whoever judges, or writes up to the first token. judge: who picks, for the strategy judge. writer:
    who writes, for the strategy fuse. Neither judge nor writer has to be a member.
    """

    members: dict[str, float]
    strategy: Strategy = "consensus"
    quorum: Annotated[int, Meta(ge=1)] = 1
    timeout: Annotated[float, Meta(gt=0)] = 60.0
    judge: str | None = None
    writer: str | None = None

    def names(self) -> tuple[str, ...]:
        """Return everybody who may be asked."""
        others = (name for name in (self.judge, self.writer) if name)
        return tuple(dict.fromkeys((*self.members, *others)))


def faults(name: str, ensembles: Mapping[str, EnsembleSettings], askable: Collection[str]) -> Iterator[Fault]:
    """Yield what is wrong with an ensemble. askable: the names of models, aliases and groups."""
    ensemble = ensembles[name]
    if not name or any(c.isspace() or not c.isprintable() for c in name):
        yield (name,), "an ensemble's name is one printable word"
    if name in askable:
        yield (name,), "a model or alias has this name already"
    if not ensemble.members:
        yield (name, "members"), "name the models that answer, each with its weight: {MODEL: 1.0, ...}"
    for member, weight in ensemble.members.items():
        yield from _faults_of_name((name, "members", member), member, ensembles, askable)
        if not (math.isfinite(weight) and weight > 0):
            yield (name, "members", member), f"the weight is {weight:g}; it must be a number above 0"
    if ensemble.quorum > len(ensemble.members):
        most = len(ensemble.members)
        yield (name, "quorum"), f"{ensemble.quorum} answers cannot come of {most} members; allowed: 1 to {most}"
    if ensemble.strategy == "first" and ensemble.quorum > 1:
        yield (name, "quorum"), "the strategy first ends with the first good answer; leave quorum out"
    yield from _faults_of_roles(name, ensemble, ensembles, askable)


_ROLES = {"judge": "judge", "writer": "fuse"}  # the setting, and the only strategy that has it


def _faults_of_roles(
    name: str, ensemble: EnsembleSettings, ensembles: Collection[str], askable: Collection[str]
) -> Iterator[Fault]:
    for setting, strategy in _ROLES.items():
        model = getattr(ensemble, setting)
        if ensemble.strategy == strategy and model is None:
            yield (name,), f"the strategy {strategy} needs a model: add {setting}: MODEL"
        elif ensemble.strategy != strategy and model is not None:
            yield (name, setting), f"only the strategy {strategy} has one; this is {ensemble.strategy}"
        elif model is not None:
            yield from _faults_of_name((name, setting), model, ensembles, askable)


def _faults_of_name(
    path: tuple[str, ...], name: str, ensembles: Collection[str], askable: Collection[str]
) -> Iterator[Fault]:
    if name in ensembles:
        yield path, f"{name!r} is an ensemble, and an ensemble asks no other: name a model, alias or group"
    elif name not in askable:
        near = difflib.get_close_matches(name, askable, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(askable) or 'none'}"
        yield path, f"there is no model or alias {name!r}; {hint}"
