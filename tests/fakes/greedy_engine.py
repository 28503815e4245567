"""An engine that would always give the same answer, and streams it as vLLM does, from wherever a request lets it."""

import json
from itertools import accumulate

import msgspec

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
QUESTION = "What?"
QUESTION_TOKENS = 7


def request(path: str, **fields: object) -> dict[str, object]:
    asked = {"messages": [{"role": "user", "content": QUESTION}]} if path == CHAT else {"prompt": QUESTION}
    return {"model": "m", "stream": True, **asked, **fields}


def encode(body: dict[str, object]) -> bytes:
    return json.dumps(body).encode()


class GreedyEngine(msgspec.Struct, frozen=True):
    """tokens: the whole answer. together: how many of them go into one event.

    ends_apart: "length", too, has an event of its own, as "stop" has.
    """

    path: str
    tokens: tuple[str, ...]
    together: int = 1
    ends_apart: bool = False
    continuous_usage: bool = False

    def stream(self, body: bytes, number: int = 1) -> list[bytes]:
        """Return the events of the answer to a request; each `number` has an id and a time of its own."""
        asked = json.loads(body)
        said = self._said(asked)
        left, prompt_tokens = self._left(said), QUESTION_TOKENS + self._spent(said)
        most = asked.get("max_completion_tokens") or asked.get("max_tokens") or self._default()
        assert most > 0
        given, reason = (left, "stop") if most > len(left) else (left[:most], "length")
        chunks = [given[i : i + self.together] for i in range(0, len(given), self.together)]
        taken = [*accumulate(map(len, chunks))]
        base = {"id": f"cmpl-{number}", "object": "chunk", "created": number, "model": f"m{number}"}

        def event(choices: list[object], completion: int | None = None, **more: object) -> bytes:
            usage = {} if completion is None else {"usage": self._usage(prompt_tokens, completion)}
            return b"data: %b\n\n" % encode({**base, "choices": choices, **usage, **more})

        def told(completion: int) -> int | None:
            return completion if self.continuous_usage else None

        events = [event([self._choice(role="assistant", content="")], told(0))] if self.path == CHAT else []
        apart = reason == "stop" or self.ends_apart or not chunks
        for i, (chunk, completion) in enumerate(zip(chunks, taken, strict=True)):
            last = None if apart or i < len(chunks) - 1 else reason
            events.append(event([self._choice(last, content="".join(chunk))], told(completion)))
        total = len(given) + (reason == "stop")  # the token that ends the answer is counted
        if apart:
            events.append(event([self._choice(reason, content="")], told(total)))
        return [*events, event([], total, system_fingerprint=f"f{number}"), b"data: [DONE]\n\n"]

    def _default(self) -> int:
        return 10_000 if self.path == CHAT else 16

    def _said(self, asked: dict[str, object]) -> str:
        """Return what the engine is told of its answer."""
        if self.path == COMPLETIONS:
            return asked["prompt"].removeprefix(QUESTION)
        if not asked.get("continue_final_message"):
            return ""
        assert asked["add_generation_prompt"] is False
        last = asked["messages"][-1]
        assert last["role"] == "assistant"
        said = last["content"]
        assert said
        assert said == said.rstrip(), "some templates and APIs do not take white space at the end"
        return said

    def _left(self, said: str) -> list[str]:
        """Return the tokens that follow; the first may be the rest of one."""
        answer = "".join(self.tokens)
        assert answer.startswith(said)
        ends = [*accumulate(map(len, self.tokens))]
        return [answer[max(end - len(t), len(said)) : end] for t, end in zip(self.tokens, ends, strict=True)
                if end > len(said)]  # fmt: skip

    def _spent(self, said: str) -> int:
        ends = accumulate(map(len, self.tokens))
        return sum(end <= len(said) for end in ends)

    def _choice(self, reason: str | None = None, **delta: object) -> dict[str, object]:
        content = {"delta": delta} if self.path == CHAT else {"text": delta["content"]}
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def _usage(self, prompt: int, completion: int) -> dict[str, int]:
        return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
