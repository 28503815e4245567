"""How a stream that broke is gone on with by another engine. Pure.

The text so far becomes a partial message of the assistant, which vLLM continues (`continue_final_message`), and so does
Anthropic; of /v1/completions, the end of the prompt. At temperature 0 that gives the text that the first engine would
have given, if the text is cut into tokens as the model had chosen them. What no engine can be told of is how the text
was sampled: `frequency_penalty` and `presence_penalty` start anew, and so does `seed`.

White space: transformers (5.x, `render_jinja_template`) cuts the rendered chat where a partial message ends, and takes
away the white space before that where the template trims; Anthropic refuses messages that end in white space. So
a partial message never ends in any: what was there is left out, said by the next engine once more, and left out of what
that says. A prompt is no message and is continued as it is.

A stop string that was about to be complete is none of our concern: engines hold back what may be the beginning of one.
"""

import re
from collections.abc import Mapping

import msgspec

from proxy.splice import Splice
from proxy.transcript import Transcript

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
Fields = Mapping[str, msgspec.Raw]

_OFF = (b"null", b"false")
_ONE = (b"null", b"1")
# What must not be asked for where a stream is to be resumed, and the values with which it is not.
_HARMLESS: Mapping[str, tuple[bytes, ...]] = {
    "n": _ONE, "best_of": _ONE, "use_beam_search": _OFF,  # several answers
    "logprobs": _OFF, "top_logprobs": (b"null", b"0"), "prompt_logprobs": _OFF, "return_token_ids": _OFF,
    "echo": _OFF, "suffix": (b"null", b'""'), "prompt_embeds": _OFF, "truncate_prompt_tokens": _OFF,
    "include_stop_str_in_output": _OFF,  # with it, engines hold nothing back
    "structured_outputs": _OFF, "guided_json": _OFF, "guided_regex": _OFF, "guided_choice": _OFF,
    "guided_grammar": _OFF, "structural_tag": _OFF,  # a grammar would start anew
}  # fmt: skip
_FORMAT_OF_TEXT = re.compile(rb'null|\{\s*"type"\s*:\s*"text"\s*\}').fullmatch
_BEGINS_WITH_TEXT = re.compile(rb'\s*\[?\s*"').match
_DEFAULT_OF_COMPLETIONS = 16  # max_tokens where a request has none, of OpenAI and of vLLM
_LEAST = {"max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 0}  # the least of them that a request may have

_PENDING = 16 * 1024  # bytes of events that are kept as they came
_DONE = b"data: [DONE]\n\n"
_NULL = msgspec.Raw(b"null")
_encode = msgspec.json.encode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_prompt = msgspec.json.Decoder(str | tuple[str]).decode
_decode_count = msgspec.json.Decoder(int | None).decode
_decode_content = msgspec.json.Decoder(str | list[dict[str, msgspec.Raw]] | None).decode
_decode_text = msgspec.json.Decoder(str).decode


class Continuation:
    """One stream, and what has been sent of it. `note` takes all that the client gets, of the resumed streams too.

    After a break: `resume` gives the request for the next endpoint, which must know `continue_final_message` (or be
    spoken to by a provider that does), and `splice` what its stream must pass through. If there is nothing left to
    generate, `finish` gives the end of the stream instead.
    """

    __slots__ = ("_fields", "_parts", "_path", "_size", "_transcript")

    def __init__(self, path: str, fields: Fields) -> None:
        self._path = path
        self._fields = fields
        # All mutable state: what has been read of the stream, the events not read yet, and how many bytes these are.
        self._transcript = Transcript()
        self._parts: list[bytes] = []
        self._size = 0

    def __repr__(self) -> str:
        return f"<Continuation {self._transcript!r} {self._size} bytes to be read>"

    @classmethod
    def of(cls, path: str, fields: Fields) -> "Continuation | None":
        """Return that of a streaming request; None if it asks for something that cannot be resumed."""
        if path == COMPLETIONS:
            prompt = fields.get("prompt")
            if prompt is None or not _BEGINS_WITH_TEXT(memoryview(prompt)[:64]):
                return None
        elif path != CHAT:
            return None
        return cls(path, fields) if _is_harmless(fields) else None

    def note(self, data: bytes) -> None:
        """Take whole events that the client is sent. They are read when there are many of them, or at a break."""
        self._parts.append(data)
        self._size += len(data)
        if self._size > _PENDING:
            self._read()

    def resume(self, body: bytes) -> bytes | None:
        """Return the body with which another engine goes on; None if none can.

        body: the request as that engine would get it were it the first. It is returned unchanged if no text was sent.
        """
        told = self._read()
        if told.obstacle or told.finish_reason or told.done or self._is_spent(told):
            return None
        said = self._said(told)
        if told.thoughts and not said:
            return None  # in the middle of its reasoning
        try:
            return self._extended(body, said, told) if said else body
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None  # messages or a prompt of a form that we do not know

    def splice(self) -> Splice:
        """Return what the stream of the request of `resume` must pass through on its way to the client."""
        told = self._read()
        said = self._said(told)
        return Splice(
            told.identity,
            begun=told.begun,
            answering=bool(said),
            owed=told.text[len(said) :],
            spent=self._kept_tokens(told, said),
            prompt_tokens=told.prompt_tokens,
        )

    def finish(self) -> bytes | None:
        """Return the events that are missing at the end of an answer that is whole; None if it is not.

        1. The engine has said why the answer ended: the usage, if it is known, and `[DONE]`.
        2. No token is left of `max_tokens`: the reason, "length", before these.
        """
        told = self._read()
        if told.done:
            return b""
        if told.finish_reason:
            return self._usage(told) + _DONE
        if told.obstacle is None and self._is_spent(told):
            return self._chunk(told, [self._last_choice()]) + self._usage(told) + _DONE
        return None

    def _read(self) -> Transcript:
        if self._parts:
            self._transcript.add(b"".join(self._parts))
            self._parts, self._size = [], 0
        return self._transcript

    def _said(self, told: Transcript) -> str:
        """Return what the next engine is told of the text."""
        return told.text.rstrip() if self._path == CHAT else told.text

    def _kept_tokens(self, told: Transcript, said: str) -> int:
        if not said:
            return 0
        return told.tokens - (told.blank_tokens if self._path == CHAT else 0)

    # What is left to generate

    def _is_spent(self, told: Transcript) -> bool:
        limit = self._limit()
        return limit is not None and told.tokens >= limit and told.tokens > 0

    def _limit(self) -> int | None:
        """Return the most tokens that the answer may have. What is no number the engine refused, or will."""
        default = _DEFAULT_OF_COMPLETIONS if self._path == COMPLETIONS and "max_tokens" not in self._fields else None
        try:
            counts = [_count(self._fields, name) for name in ("max_completion_tokens", "max_tokens")]
        except msgspec.DecodeError:
            return None
        return next((count for count in counts if count is not None), default)

    # The next request

    def _extended(self, body: bytes, said: str, told: Transcript) -> bytes:
        """Return the request for the rest. Raises DecodeError where it cannot be put into words."""
        fields = _decode_object(body)
        if self._path == COMPLETIONS:
            fields.setdefault("max_tokens", _raw(_DEFAULT_OF_COMPLETIONS))
            fields["prompt"] = _raw(_prompt(fields.get("prompt", _NULL)) + said)
        else:
            thoughts = {told.thoughts_name: told.thoughts} if told.thoughts else {}
            fields["messages"] = _raw(_with_partial_message(fields, said, thoughts))
            fields["continue_final_message"], fields["add_generation_prompt"] = _raw(True), _raw(False)
        for name in _LEAST.keys() & fields.keys():
            if (count := _count(fields, name)) is not None:
                fields[name] = _raw(max(count - self._kept_tokens(told, said), _LEAST[name]))
        return _encode(fields)

    # The end of the stream

    def _last_choice(self) -> dict[str, object]:
        content: dict[str, object] = {"text": ""} if self._path == COMPLETIONS else {"delta": {}}
        return {"index": 0, **content, "logprobs": None, "finish_reason": "length"}

    def _usage(self, told: Transcript) -> bytes:
        if told.prompt_tokens is None or told.usage_told:
            return b""
        total = told.prompt_tokens + told.tokens
        usage = {"prompt_tokens": told.prompt_tokens, "total_tokens": total, "completion_tokens": told.tokens}
        return self._chunk(told, [], usage=usage)

    def _chunk(self, told: Transcript, choices: list[dict[str, object]], **more: object) -> bytes:
        kind = "text_completion" if self._path == COMPLETIONS else "chat.completion.chunk"
        return b"data: %b\n\n" % _encode({"object": kind, **told.identity, "choices": choices, **more})


def _is_harmless(fields: Fields) -> bool:
    for name in fields:
        if name in _HARMLESS and bytes(fields[name]) not in _HARMLESS[name]:
            return False
    return "response_format" not in fields or bool(_FORMAT_OF_TEXT(bytes(fields["response_format"])))


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))


def _count(fields: Fields, name: str) -> int | None:
    return _decode_count(fields[name]) if name in fields else None


def _prompt(raw: msgspec.Raw) -> str:
    prompt = _decode_prompt(raw)
    return prompt if isinstance(prompt, str) else prompt[0]


def _with_partial_message(fields: Fields, said: str, thoughts: Mapping[str, str]) -> list[object]:
    """Return the messages with one more, or, where the client had the last one continued, with that one longer."""
    messages = _decode_list(fields.get("messages", _NULL))
    if messages and bytes(fields.get("continue_final_message", b"")) == b"true":
        return [*messages[:-1], _lengthened(_decode_object(messages[-1]), said)]
    return [*messages, {"role": "assistant", **thoughts, "content": said}]


def _lengthened(message: dict[str, msgspec.Raw], said: str) -> dict[str, msgspec.Raw]:
    """Append to the text of a message, or to its last part. Raises ValidationError if that is no text."""
    content = _decode_content(message.get("content", _NULL))
    if isinstance(content, list):
        *others, last = content or [{}]
        last = {**last, "text": _raw(_decode_text(last.get("text", _NULL)) + said)}
        return {**message, "content": _raw([*others, last])}
    return {**message, "content": _raw((content or "") + said)}
