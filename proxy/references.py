"""Whether the names in a configuration lead where they should: aliases, presets, groups and chains. Pure."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec

from proxy.naming import AUTO, AliasSettings

TASK = "task:"  # what a key of `fallbacks` begins with that stands for a kind of request, not for a model

Path = tuple[str | int, ...]
Wrong = Callable[[Path, str], Exception]  # makes the error for the value at a path
Aliases = Mapping[str, str | AliasSettings]

# What a request is, and what it says itself: no preset can say it for all.
_NO_DEFAULTS = frozenset(("model", "messages", "prompt", "input", "stream", "system", "instructions", "routing"))


class Names(msgspec.Struct, frozen=True):
    """What a configuration gives names to."""

    models: Collection[str]
    aliases: Aliases

    def model(self, name: str) -> str:
        """Return the one model that a name stands for, or the name itself where it stands for none or several."""
        found, seen = name, set[str]()
        while found not in self.models and found in self.aliases and found not in seen:
            seen.add(found)
            target = self.aliases[found]
            found = target if isinstance(target, str) else target.model or found
        return found if found in self.models else name

    def models_of(self, step: str) -> tuple[str, ...]:
        """Return the models that a step of a chain stands for: several where it is a group."""
        target = self.aliases.get(step, step)
        if isinstance(target, AliasSettings):
            return tuple(map(self.model, target.any_of or ()))
        return (target,)

    def all(self) -> tuple[str, ...]:
        return (*self.models, *self.aliases)


def check_aliases(names: Names, wrong: Wrong) -> None:
    """Raise what `wrong` makes for the first alias that leads nowhere, or in a circle."""
    for name in names.models:
        if name in AUTO:
            raise wrong(("models", name), f"the name is taken: {name!r} chooses among all models")
    for alias, target in names.aliases.items():
        path: Path = ("aliases", alias)
        if alias in names.models:
            raise wrong(path, "a model has this name already")
        if alias in AUTO:
            raise wrong(path, f"the name is taken: {alias!r} chooses among all models")
        if isinstance(target, str):
            _check_target(target, path, names, wrong)
        elif (target.model is None) == (target.any_of is None):
            raise wrong(path, "give either model (for a preset of it) or any_of (for a group)")
        elif target.any_of is None:
            _check_preset(alias, target, path, names, wrong)
        else:
            _check_group(alias, target, path, names, wrong)


def _check_target(target: str, path: Path, names: Names, wrong: Wrong) -> None:
    if target in names.aliases:
        known = names.model(target)
        hint = f"name its model, {known!r}" if known in names.models else "aliases lead to models, or to auto"
        raise wrong(path, f"{target!r} is itself an alias; {hint}")
    if target not in names.models and target not in AUTO:
        raise wrong(path, no_such("model", target, names.models))


def _check_preset(alias: str, preset: AliasSettings, path: Path, names: Names, wrong: Wrong) -> None:
    target = preset.model or ""
    if target == alias:
        raise wrong((*path, "model"), f"the preset loops: {alias!r} is itself")
    further = names.aliases.get(target)
    if isinstance(further, AliasSettings) and not further.is_group:
        raise wrong((*path, "model"), f"{target!r} is itself a preset; name its model, {further.model!r}")
    if target not in (*names.all(), *AUTO):
        raise wrong((*path, "model"), no_such("model or alias", target, names.all()))
    if preset.prefer is not None:
        raise wrong((*path, "prefer"), "this is for groups (any_of)")
    if taken := sorted(_NO_DEFAULTS & preset.defaults.keys()):
        raise wrong((*path, "defaults", taken[0]), "this cannot be a default: it is the request's own")


def _check_group(alias: str, group: AliasSettings, path: Path, names: Names, wrong: Wrong) -> None:
    if group.system is not None or group.defaults:
        raise wrong(path, "system and defaults are for presets (model), not for groups (any_of)")
    if not group.any_of:
        raise wrong((*path, "any_of"), "the group is empty; name its models")
    seen = set[str]()
    for i, member in enumerate(group.any_of):
        at = (*path, "any_of", i)
        if member == alias:
            raise wrong(at, f"the group loops: {alias!r} is in itself")
        _check_member(member, at, names, wrong)
        if names.model(member) in seen:
            raise wrong(at, f"{member!r} is in the group twice")
        seen.add(names.model(member))


def _check_member(member: str, at: Path, names: Names, wrong: Wrong) -> None:
    if isinstance(names.aliases.get(member), AliasSettings):
        raise wrong(at, f"{member!r} is a preset or a group itself; name its models")
    if names.aliases.get(member, member) in AUTO:
        raise wrong(at, f"{member!r} stands for all models; name some")
    if member not in names.all():
        raise wrong(at, no_such("model or alias", member, names.all()))


def check_chains(chains: Mapping[str, tuple[str, ...]], names: Names, wrong: Wrong) -> None:
    """Raise what `wrong` makes for the first chain that names what there is not, or that leads back to its start."""
    for name, chain in chains.items():
        _check_chain(name, chain, names, wrong)
    _check_loops(chains, names, wrong)


def _check_chain(name: str, chain: tuple[str, ...], names: Names, wrong: Wrong) -> None:
    path = ("fallbacks", name)
    known = (*names.all(), *AUTO)
    if name == TASK or (not name.startswith(TASK) and name not in known):
        said = no_such("model or alias", name, names.all())
        raise wrong(path, said + f", or {TASK}NAME for a kind of request")
    if not chain:
        raise wrong(path, "the chain is empty; name a model, or take the line out")
    seen = set[str]()
    for i, step in enumerate(chain):
        if step not in names.all():
            raise wrong((*path, i), no_such("model or alias", step, names.all()))
        if not names.models_of(step) or not set(names.models_of(step)) <= set(names.models):
            raise wrong((*path, i), f"{step!r} is a preset or stands for all models; name models")
        if seen.intersection(names.models_of(step)):
            raise wrong((*path, i), f"the chain loops: {step!r} is in it twice")
        seen.update(names.models_of(step))


def _check_loops(chains: Mapping[str, tuple[str, ...]], names: Names, wrong: Wrong) -> None:
    """Refuse models that stand in for each other: when one fails, its load would make the other fail, and so on.

    The members of a group do so by its nature: it takes each at most once.
    """
    leads = {
        name: {model for step in chain for model in names.models_of(step)}
        for name, chain in chains.items()
        if names.model(name) in names.models
    }
    for name in leads:
        start = names.model(name)
        reached, new = set[str](), {start}
        while new:
            after = {s for key, steps in leads.items() if names.model(key) in new for s in steps}
            reached, new = reached | after, after - reached
        if start in reached:
            raise wrong(("fallbacks", name), f"the chain loops: it leads back to {start!r}")


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that something is not there, and what comes close."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"models: {', '.join(known) or 'none'}"
    return f"there is no {kind} {name!r}; {hint}"
