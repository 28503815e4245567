"""What a name may stand for beside a model: another name of one, a preset of it, or any of several. Data."""

from typing import Any, Literal, get_args

import msgspec

Prefer = Literal["balanced", "cost", "quality", "speed", "order"]
PREFERENCES: tuple[Prefer, ...] = get_args(Prefer)

# The virtual models that choose among all there are, and what each prefers; None: what the rules say.
AUTO: dict[str, Prefer | None] = {"auto": None, "auto:cheap": "cost", "auto:best": "quality", "auto:fast": "speed"}


class AliasSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A preset (`model`) or a group (`any_of`).

    model: who answers, perhaps a group or auto. system: put in front of the client's own system prompt. defaults:
    fields of a request that leaves them out. any_of: models, of which the router takes the one that suits a request.
    prefer: what it goes by, cost, quality, speed, their order here, or all that it knows (balanced).
    """

    model: str | None = None
    system: str | None = None
    defaults: dict[str, Any] = {}
    any_of: tuple[str, ...] | None = None
    prefer: Prefer | None = None

    @property
    def is_group(self) -> bool:
        return self.any_of is not None
