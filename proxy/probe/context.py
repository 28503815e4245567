"""How long a prompt may be: as the server says, or as it is tried out."""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from proxy.probe.asking import Asker, Said, user

# What servers call it in their list of models: vLLM, Groq, OpenRouter, Mistral and LM Studio, llama.cpp.
_NAMES = ("max_model_len", "context_window", "context_length", "max_context_length", "n_ctx")
_IN_WORDS = re.compile(r"(?:context (?:length|window|size)|maximum|limit)[^0-9]{0,60}([0-9][0-9,]{2,9})", re.IGNORECASE)

_FIRST = 1024  # words of the first prompt that is tried
_CLOSE = 1.02  # the refused prompt is so much longer than the taken one when the search ends
_FEWEST = 0.25  # tokens of a word; what counts less does not count
_GROWTH = 0.9  # of what it should have grown by: a prompt that did not is one that the server cut


class Listed(msgspec.Struct, frozen=True):
    """What a server says without being asked to generate. models: the names that it has, as far as it tells."""

    models: tuple[str, ...] = ()
    context_length: int | None = None
    version: str | None = None


async def listed(asker: Asker) -> Listed:
    """Look the model up in the server's list, and the server's version where it has one."""
    endpoint = asker.endpoint
    models = await asker.get(endpoint.path("/v1/models"))
    cards = models.body.get("data")
    known = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
    card = next((card for card in known if card.get("id") == endpoint.serves), {})
    return Listed(tuple(str(each.get("id")) for each in known), _length(card), await _version(asker))


def _length(card: dict[str, Any]) -> int | None:
    within = [card, *(part for name in ("meta", "top_provider") if isinstance(part := card.get(name), dict))]
    lengths = [part[name] for part in within for name in _NAMES if isinstance(part.get(name), int) and part[name] > 0]
    return lengths[0] if lengths else None


async def _version(asker: Asker) -> str | None:
    base = (asker.endpoint.base_path or "").removesuffix("/v1")
    for path in ("/version", "/api/version"):  # vLLM's, and Ollama's
        version = (await asker.get(base + path)).body.get("version")
        if isinstance(version, str) and version:
            return version
    return None


class _Search(msgspec.Struct, frozen=True):
    """Prompts of so many words were taken and refused. per_word: tokens. spent: tokens of those that were taken."""

    taken: int = 0
    refused: int | None = None
    per_word: float = 1.0
    spent: float = 0.0

    def next(self) -> int:
        """Return the words to try: twice as many, then the middle of what is left between."""
        if self.refused is not None:
            return (self.taken + self.refused) // 2
        return 2 * self.taken or _FIRST

    def ended(self) -> bool:
        return self.refused is not None and self.refused <= max(self.taken * _CLOSE, 1)

    def after(self, words: int, said: Said) -> "_Search":
        if said.prompt_tokens is None:
            return msgspec.structs.replace(self, refused=words)
        spent = self.spent + said.prompt_tokens
        return msgspec.structs.replace(self, taken=words, per_word=said.prompt_tokens / words, spent=spent)


async def tried_out(asker: Asker, spend: int, say: Callable[[str], None]) -> int | None:
    """Return the longest prompt that is taken, in tokens, None where it cannot be told within `spend` tokens.

    1. What a refusal says of the limit is believed.
    2. A server that cuts long prompts instead is found out by what it counts.
    3. Else lengths are doubled until one is refused, and then what is left between is halved.
    """
    search = _Search()
    while not search.ended():
        words = search.next()
        if search.spent + words * search.per_word > spend:
            say(f"context length: more than {round(search.taken * search.per_word)}; trying more would cost too much")
            return None
        said = await asker.chat(user("a " * words), longest=1)
        if not said.refused and (said.prompt_tokens or 0) < _FEWEST * words:
            return None
        if (told := _limit_told(said, words) or _limit_shown(said, words, search)) is not None:
            return told
        search = search.after(words, said)
    return round(search.taken * search.per_word) or None


def _limit_told(said: Said, words: int) -> int | None:
    found = _IN_WORDS.search(said.problem)
    told = int(found[1].replace(",", "")) if found else 0
    return told if 0 < told <= 2 * words else None  # what is more has not been reached, and is another limit


def _limit_shown(said: Said, words: int, search: _Search) -> int | None:
    """Return what is counted of a prompt, if it is less than the one before lets expect."""
    counted = said.prompt_tokens
    if counted is None or not search.taken or counted >= _GROWTH * words * search.per_word:
        return None
    return counted
