"""Asks a server what it can do with a model.

Every question is a request that a client might send, small, at temperature 0, one after the other. What is asked for
is looked for in the answer: servers refuse what they do not know (4xx), fail at it (5xx), or leave it aside in silence.

1. What its list of models says: names, the context length; and the version of the server.
2. Does it answer at all? A model that does not chat is asked nothing more.
3. System messages, JSON mode, JSON schema, tools, logprobs, images.
4. A stream: what it used, and how fast it is.
5. Continuation: an answer is cut, and must go on as it did.
6. A few plain instructions, of which each is followed to the letter or not.
7. The context length, where nobody says it: the longest prompt that is taken, within a budget of tokens.
"""

from collections.abc import Awaitable, Callable
from time import monotonic, time

import msgspec

from proxy.capabilities import Capabilities, Finding
from proxy.errors import ProbeFailed
from proxy.probe import context, features, instructions, streams
from proxy.probe.asking import Asker
from proxy.registry import Endpoint
from proxy.transport import Transport

Say = Callable[[str], None]
Ready = Callable[[], Awaitable[None]]
Facts = dict[str, object]

CONTEXT_SPEND = 100_000  # tokens of prompts, where the context length has to be tried out


async def _at_once() -> None:
    return None


async def probe(
    endpoint: Endpoint,
    transport: Transport,
    say: Say = lambda line: None,
    *,
    spend: int = CONTEXT_SPEND,
    ready: Ready = _at_once,
) -> Finding:
    """Return what an endpoint can do. Raises ProbeFailed where it does not answer.

    say: gets a line after each step. spend: tokens for finding the context length, 0 for not at all. ready: awaited
    before each request.
    """
    asker = Asker(endpoint, transport, ready, monotonic)
    listed = await context.listed(asker)
    version = listed.version
    say(_line("models", _some(listed.models) if listed.models else None))
    if not await _chats(asker, listed):
        say("chat: no")
        return Finding(endpoint.serves, Capabilities(context_length=listed.context_length), time(), version)
    say(f"chat: yes{f', version {version}' if version else ''}")
    facts: Facts = {"context_length": listed.context_length}
    for step in STEPS:
        found = await step(asker)
        facts.update(found)
        for name, value in found.items():
            say(_line(name, value))
    if listed.context_length is None and spend:
        facts["context_length"] = await context.tried_out(asker, spend, say)
    say(_line("context_length", facts["context_length"]))
    return Finding(endpoint.serves, msgspec.convert(facts, Capabilities), time(), version)


async def _chats(asker: Asker, listed: context.Listed) -> bool:
    """Say whether a model chats. Raises ProbeFailed where its server does not answer, or does not let us in.

    A server may not list a model that it has, and may list one that does not chat.
    """
    said = await asker.introduce()
    if said.taken:
        return True
    if said.refused and said.status not in (401, 403) and asker.endpoint.serves in listed.models:
        return False
    raise ProbeFailed(asker.endpoint.name, said.problem)


def _some(names: tuple[str, ...], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


STEPS: tuple[Callable[[Asker], Awaitable[Facts]], ...] = (
    features.system_role,
    features.json_mode,
    features.json_schema,
    features.tools,
    features.logprobs,
    features.modalities,
    streams.stream,
    streams.continuation,
    instructions.score,
)


def _line(name: str, value: object) -> str:
    words = {None: "unknown", True: "yes", False: "no"}
    if value is None or isinstance(value, bool):
        shown = words[value]
    elif isinstance(value, float):
        shown = f"{value:.2f}"
    else:
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
    return f"{name.replace('_', ' ')}: {shown}"
