"""What a model is said to be good for: what a request may need of it, and what speaks for it. Data."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Kind = Literal["fast_cheap", "balanced", "advanced", "specialized"]
Modality = Literal["text", "image", "audio", "video"]
Score = Annotated[float, Meta(ge=0, le=10)]
Language = Annotated[str, Meta(pattern="^[a-z]{2,3}$", description="a code of ISO 639 in small letters, as en, ru, ja")]
Region = Annotated[
    str, Meta(pattern="^[A-Za-z0-9._-]{1,64}$", description="a name of 1 to 64 letters, digits, dots, - and _, as eu")
]


class Traits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is said of a model, local or not. What is left out of languages and tasks stands for all of them.

    kind: the class of price and ability that it is of. tasks: what it is specialised in; it gets nothing else. Paths
    that are no chat have the name of their operation: embeddings, rerank and so on. languages: codes as in ISO 639.
    context: tokens that a prompt and its answer may have together; asked from the engine where left out. speed_score,
    quality_score: 0 to 10; the first is learned from traffic where left out, the second follows from the kind.
    modalities: what it takes; text only, where neither this nor the server says more. region: where it runs.
    """

    kind: Kind = "balanced"
    tasks: tuple[str, ...] = ()
    languages: tuple[Language, ...] = ()
    context: Annotated[int, Meta(ge=1)] | None = None
    speed_score: Score | None = None
    quality_score: Score | None = None
    modalities: Annotated[tuple[Modality, ...], Meta(min_length=1)] | None = None
    region: Region | None = None
