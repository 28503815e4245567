"""What a model cannot take as it comes, and what is done about it: by the family of the model, or as configured."""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FamilyName = Literal["chatml", "qwen", "llama3", "llama3.1", "inst", "mistral", "alpaca", "gemma"]
TokenRange = tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]]
TemperatureRange = tuple[Annotated[float, Meta(ge=0, le=2)], Annotated[float, Meta(ge=0, le=2)]]


class AdapterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How requests are changed for a model. What is left out is as its family needs it, which its name tells.

    family: whose ways it has. merge_system: it knows no system role, what is said there goes in front of the first
    user's message. alternate: user and assistant must take turns, neighbours of one role are merged. developer: what a
    developer's message becomes. images: false for a model that takes none; requests with them get 400.
    stop: ends an answer, beside what the request has. max_tokens, temperature: [least, most]; what is outside is taken
    for the nearest, and the answer says so in x-polyvox-adapted.

    For endpoints with `provider: completions`, which take text only. template: of the chat, in Jinja, instead of that
    of the family. bos_token: what text begins with, for a server that does not put it there by itself.
    default_max_tokens: for requests without any; such servers would stop after 16.
    """

    family: FamilyName | None = None
    merge_system: bool | None = None
    alternate: bool | None = None
    developer: Literal["system", "developer"] | None = None
    images: bool | None = None
    stop: tuple[str, ...] = ()
    max_tokens: TokenRange | None = None
    temperature: TemperatureRange | None = None
    template: str | None = None
    bos_token: str = ""
    default_max_tokens: Annotated[int, Meta(ge=1)] = 1024


class Family(msgspec.Struct, frozen=True):
    """Models that were taught one form of chats.

    template: the name of a file in templates/. eos_token: ends what the assistant says. stop: what ends an answer where
    text alone is asked for. system: said where nobody says anything there.
    """

    template: str
    eos_token: str = ""
    stop: tuple[str, ...] = ()
    merge_system: bool = False
    alternate: bool = False
    system: str = ""


_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

FAMILIES: dict[FamilyName, Family] = {
    "chatml": Family("chatml", "<|im_end|>", ("<|im_end|>",)),
    "qwen": Family("chatml", "<|im_end|>", ("<|im_end|>",), system=_QWEN),
    "llama3": Family("llama3", "<|eot_id|>", ("<|eot_id|>",)),
    "llama3.1": Family("llama3.1", "<|eot_id|>", ("<|eot_id|>", "<|eom_id|>")),
    "inst": Family("inst", "</s>", ("</s>", "[INST]"), merge_system=True, alternate=True),
    "mistral": Family("mistral", "</s>", ("</s>", "[INST]"), alternate=True),
    "alpaca": Family("alpaca", "", ("### Instruction:", "### Input:"), system=_ALPACA),
    "gemma": Family("gemma", "<end_of_turn>", ("<end_of_turn>",), merge_system=True, alternate=True),
}

# The first that is found in a model's name tells its family. Mistral's have a system role since their tokenizer v7.
_BY_NAME: tuple[tuple[str, FamilyName], ...] = (
    (r"mistral-7b-instruct-v0\.[12]|mixtral-8x", "inst"),
    (r"(mi|vi|mini|magi|dev|code|mathe?)stral", "mistral"),
    (r"llama-?3\.[1-9]", "llama3.1"),
    (r"llama-?3", "llama3"),
    (r"qwen", "qwen"),
    (r"alpaca|wizardlm", "alpaca"),
    (r"gemma", "gemma"),
    (r"chatml|smollm|hermes|dolphin|internlm|\byi\b", "chatml"),
)


def family_of(name: str) -> FamilyName | None:
    """Return the family that the name of a model belongs to, None if it tells nothing."""
    return next((family for pattern, family in _BY_NAME if re.search(pattern, name.lower())), None)


class Adapter(msgspec.Struct, frozen=True):
    """What is done to the requests for an endpoint: AdapterSettings with all that was left out filled in."""

    merge_system: bool = False
    alternate: bool = False
    developer_is_system: bool = False
    images: bool = True
    stop: tuple[str, ...] = ()
    max_tokens: TokenRange | None = None
    temperature: TemperatureRange | None = None
    form: "Form | None" = None


class Form(msgspec.Struct, frozen=True):
    """How a chat becomes text. template: in Jinja. system: see Family."""

    template: str
    bos_token: str = ""
    eos_token: str = ""
    system: str = ""
    default_max_tokens: int = 1024


def for_chats(
    settings: AdapterSettings | None, name: str | None, *, system_role: bool | None = None, images: bool | None = None
) -> Adapter | None:
    """Return the adapter of an endpoint that takes chats, None if requests pass as they are.

    name: of the model, None for an engine, which applies the model's own template to what it gets: nothing is done
    there that was not asked for. system_role, images: whether the endpoint takes them, as far as is known.
    """
    given = settings or AdapterSettings()
    family = _family(given, name)
    adapter = Adapter(
        merge_system=_first(
            given.merge_system, None if system_role is None else not system_role, family, "merge_system"
        ),
        alternate=_first(given.alternate, None, family, "alternate"),
        developer_is_system=given.developer == "system" or (given.developer is None and family is not None),
        images=given.images if given.images is not None else images is not False,
        stop=given.stop,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
    )
    return None if adapter == Adapter() else adapter


def for_text(settings: AdapterSettings | None, name: str, template: str) -> Adapter:
    """Return the adapter of an endpoint that takes text only. template: what `template_name` names."""
    given = settings or AdapterSettings()
    family = _family(given, name) or Family("")
    form = Form(given.template or template, given.bos_token, family.eos_token, family.system, given.default_max_tokens)
    return Adapter(
        merge_system=_first(given.merge_system, None, family, "merge_system"),
        alternate=_first(given.alternate, None, family, "alternate"),
        developer_is_system=given.developer != "developer",
        images=False,
        stop=(*given.stop, *family.stop),
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        form=form,
    )


def template_name(settings: AdapterSettings | None, name: str) -> str | None:
    """Return the name of the template for a model that brings none of its own, None if its family is not known."""
    family = _family(settings or AdapterSettings(), name)
    return family.template if family else None


def _family(settings: AdapterSettings, name: str | None) -> Family | None:
    known = settings.family or (family_of(name) if name else None)
    return FAMILIES[known] if known else None


def _first(configured: bool | None, found: bool | None, family: Family | None, name: str) -> bool:
    """Return what is configured, else what was found out, else what the family needs."""
    said = configured if configured is not None else found
    return bool(getattr(family, name, False)) if said is None else said
