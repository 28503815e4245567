"""What streams tell, how fast they are, and whether an answer that was cut goes on."""

from itertools import pairwise

from proxy.probe.asking import Asker, Said, user

Facts = dict[str, object]

_LONG = 64  # tokens of the stream that is timed
_FEWEST = 8  # pieces from which a speed is worth telling
_TELLING = 12  # characters by which one text is told from another
_STORIES = ("Count from one to thirty in words.", "Name ten animals, and say something about each.")


async def stream(asker: Asker) -> Facts:
    """Ask for a stream with its usage; without, where that is refused."""
    question = user("Count from one to one hundred.")
    said = await asker.chat(question, stream=True, stream_options={"include_usage": True}, longest=_LONG)
    told = any(isinstance(event.get("usage"), dict) for _, event in said.events)
    found = told if said.taken else (False if said.refused or said.failed else None)
    if not said.taken:
        said = await asker.chat(question, stream=True, longest=_LONG)
    return {"stream_usage": found, "tokens_per_second": speed(said)}


def speed(said: Said) -> float | None:
    """Return tokens per second between the first and the last; an event has one token where nothing else is said."""
    times = [at for at, event in said.events if _says_something(event)]
    if len(times) < _FEWEST or times[-1] <= times[0]:
        return None
    counts = [tokens for _, event in said.events if (tokens := _counted(event))]
    tokens = counts[-1] if counts else len(times)
    return round((tokens - 1) / (times[-1] - times[0]), 1)


def _says_something(event: dict[str, object]) -> bool:
    match event:
        case {"choices": [{"delta": {"content": str(text)} | {"reasoning_content": str(text)}}, *_]}:
            return bool(text)
    return False


def _counted(event: dict[str, object]) -> int | None:
    match event:
        case {"usage": {"completion_tokens": int(tokens)}}:
            return tokens
    return None


async def continuation(asker: Asker) -> Facts:
    """An answer, cut in the middle, goes on as it did. Who does not know how begins it anew, or says something else."""
    for story in _STORIES:
        found = await _goes_on(asker, story)
        if found is not None:
            return {"continues": found}
    return {"continues": None}


async def _goes_on(asker: Asker, story: str) -> bool | None:
    whole = (await asker.chat(user(story), longest=48)).text
    cut = where_to_cut(whole)
    if cut is None:
        return None
    partial = {"role": "assistant", "content": whole[:cut]}
    said = await asker.chat(user(story), partial, longest=24, add_generation_prompt=False, continue_final_message=True)
    if not said.taken:
        return False if said.refused or said.failed else None
    rest = said.text.strip()
    if _same(rest, whole[cut:].strip()):
        return True
    return False if _same(rest, whole.strip()) or not rest else None


def _same(one: str, other: str) -> bool:
    return bool(one) and one[:_TELLING] == other[:_TELLING]


def where_to_cut(text: str) -> int | None:
    """Return a place before a word near the middle, after which the text is unlike its beginning; None where none is.

    Cut there, a text has the same tokens as the model had written.
    """
    begins = text.strip()[:_TELLING]
    starts = [i for i, (a, b) in enumerate(pairwise(text)) if a != " " and b == " "]
    places = [i + 1 for i in starts if len(text) - i > 2 * _TELLING and i > _TELLING]
    able = [place for place in places if not text[place:].strip().startswith(begins)]
    return min(able, key=lambda place: abs(place - len(text) // 2), default=None)
