"""Where a request goes: what stands behind the name that it asks for, and who answers if that cannot."""

from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from proxy import forbidden
from proxy.limits import Limits
from proxy.providers import Asked
from proxy.registry import Ensemble, Group, Model, Preset, Registry
from proxy.routing import explanation, presets, wishes
from proxy.routing.dispatch import Dispatcher, Inquiry


class Placed(msgspec.Struct, frozen=True, gc=False):
    """Where a request goes, and what it is there: with a preset put in, for one.

    chain: the models that answer if this one cannot. chosen: see Walk. alternatives: those of the chain that the name
    itself stands for, as a group does. learn: told the model that answered and the tokens of its prompt. why: the value
    of x-polyvox-route, for a client that wants it.
    """

    asked: Asked
    model: Model
    chain: Sequence[str] = ()
    chosen: bool = False
    alternatives: Sequence[str] = ()
    learn: Callable[[str, int], None] | None = None
    why: bytes | None = None


class Placing:
    """Finds the place of each request of one worker."""

    def __init__(self, dispatcher: Dispatcher, limits: Limits) -> None:
        self._dispatcher = dispatcher
        self._limits = limits

    def __repr__(self) -> str:
        return f"<Placing by {self._dispatcher!r}>"

    def place(
        self,
        registry: Registry,
        name: str,
        target: Model | Group | Preset,
        asked: Asked,
        only: frozenset[str] | None = None,
    ) -> Placed:
        """Find the place of a request. Raises RequestError for what it may not ask, or nobody can answer.

        target: what the name stands for. only: the models that its key may have, None for all.

        1. Put a preset in.
        2. A model answers by itself, as long as nothing is demanded of it, or asked about it.
        3. The router chooses.
        """
        if isinstance(target, Preset):  # 1
            asked, target = with_preset(asked, target), target.of
        fields = asked.envelope.fields
        if isinstance(target, Model) and not wishes.are_in(fields, () if asked.ordinary else asked.headers):  # 2
            forbidden.check(fields, target.policy, self._limits, asked.plain)
            chain = registry.chains.get(name, ())
            return Placed(asked, target, chain if only is None else tuple(m for m in chain if m in only))
        inquiry = Inquiry(asked.path, fields, asked.headers, name, only)
        return _routed(asked, target, registry, self._dispatcher, inquiry)  # 3

    def called(self, registry: Registry, name: str, asked: Asked) -> Placed:
        """Find the place of a request that we make ourselves, of a model by any of its names. Raises RequestError."""
        target = registry.resolve(name)
        assert not isinstance(target, Ensemble), "the configuration names no ensemble here"
        return self.place(registry, name, target, asked)


def _routed(
    asked: Asked, target: Model | Group, registry: Registry, dispatcher: Dispatcher, inquiry: Inquiry
) -> Placed:
    routed = dispatcher.route(registry, target, inquiry)
    first, *others = routed.models
    members = target.members if isinstance(target, Group) else ()
    return Placed(
        asked.without(wishes.FIELD),
        registry.models[first],
        others,
        chosen=isinstance(target, Group),
        alternatives=tuple(name for name in others if name in members),
        learn=partial(dispatcher.learn, routed.plan.features.tokens),
        why=explanation.header(routed.plan, routed.models) if routed.explains else None,
    )


def with_preset(asked: Asked, preset: Preset) -> Asked:
    """Put what a preset says into a request."""
    fields = dict(asked.envelope.fields)
    put = presets.applied(preset, asked.path, fields)
    return asked if put is fields else asked.with_fields(put)
