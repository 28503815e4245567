"""What the simulator says: vLLM's documents and events for a text of "simulated token 1 simulated token 2 ...".

Pure. A token is a word, in prompts too. Every number and name in the answers has the shape that vLLM 0.32 gives it.
"""

import base64
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import msgspec

Document = Mapping[str, Any]

_encode = msgspec.json.encode
_DIMENSIONS = 8
_FINGERPRINT = {"system_fingerprint": "vllm-0.32.0-simulated"}
_NOTHING: Document = {}
DONE = b"data: [DONE]\n\n"


class Refusal(Exception):
    """A request that vLLM would refuse: status, and the fields of its error."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    def document(self) -> dict[str, object]:
        """The body of the error as every API but /v1/messages gives it."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}

    def anthropic_document(self) -> dict[str, object]:
        """The body of the error as /v1/messages gives it."""
        return {"type": "error", "error": {"type": self.kind, "message": str(self)}}


class Served(msgspec.Struct, frozen=True):
    """What is served: the name, the context length in tokens, and the tokens of an answer that nobody limits."""

    model: str
    max_model_len: int
    tokens: int


class Work(msgspec.Struct, frozen=True):
    """One answer to make: `count` tokens from number `first` on, for each of `choices` choices."""

    id: str
    created: int
    model: str
    document: Document
    prompt_tokens: int
    first: int
    count: int
    choices: int
    finish: Literal["stop", "length"]

    @property
    def text(self) -> str:
        return "".join(word(i) for i in range(self.first, self.first + self.count))

    @property
    def completion_tokens(self) -> int:
        return self.choices * self.count

    @property
    def usage(self) -> dict[str, object]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}

    @property
    def wants_usage(self) -> bool:
        options = self.document.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))


class Dialect(Protocol):
    """One generating API: how it is asked, and how it answers."""

    prefix: str

    def read(self, document: Document) -> tuple[str, int | None]:
        """Return the text of the prompt and the limit of tokens, or raise a Refusal."""
        ...

    def whole(self, work: Work) -> object:
        """Return the answer of a request that does not stream."""
        ...

    def opening(self, work: Work) -> bytes:
        """Return the events before the first token."""
        ...

    def token(self, work: Work, number: int, choice: int) -> bytes:
        """Return the event of the nth token of a choice."""
        ...

    def closing(self, work: Work) -> bytes:
        """Return the events after the last token."""
        ...


def word(i: int) -> str:
    """Return token number i, with the space that parts it from the one before."""
    return ("" if i == 0 else " ") + ("simulated", "token", str(i // 3 + 1))[i % 3]


def words(value: object) -> int:
    """Count the words in all strings of a document's part."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, Mapping):
        return sum(words(part) for key, part in value.items() if key not in ("role", "type"))
    return sum(words(part) for part in value) if isinstance(value, list) else 0


def check_model(document: Document, served: Served) -> None:
    """Raise what vLLM answers for a model that it does not serve; no model is its own."""
    model = document.get("model")
    if model and model != served.model:
        message = f"The model `{model}` does not exist. Valid aliases: {served.model}."
        raise Refusal(404, "NotFoundError", message, "model")


def plan(dialect: Dialect, document: Document, served: Served, suffix: str, created: int) -> Work:
    """Return the work that a request asks for, or raise a Refusal. `suffix` makes its id unique."""
    prompt, limit = dialect.read(document)
    check_model(document, served)
    prompt_tokens = words(prompt)
    _check_length(prompt_tokens, limit, served.max_model_len)
    first = _tokens_so_far(document)
    wanted = max(served.tokens - first, 0)
    allowed = served.max_model_len - prompt_tokens if limit is None else limit
    return Work(
        id=dialect.prefix + suffix,
        created=created,
        model=served.model,
        document=document,
        prompt_tokens=prompt_tokens,
        first=first,
        count=min(wanted, allowed),
        choices=_integer(document, "n") or 1,
        finish="stop" if wanted <= allowed else "length",
    )


def event(data: object, name: str | None = None) -> bytes:
    """Frame a server-sent event."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + _encode(data) + b"\n\n"


class Chat:
    """/v1/chat/completions"""

    prefix = "chatcmpl-"

    def read(self, document: Document) -> tuple[str, int | None]:
        messages = _required_list(document, "messages")
        limit = _integer(document, "max_completion_tokens")
        return _joined(messages), _integer(document, "max_tokens") if limit is None else limit

    def whole(self, work: Work) -> object:
        nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
        message = {"role": "assistant", "content": work.text, **nothing}
        choice = {"message": message, "logprobs": None, "finish_reason": work.finish, "stop_reason": None}
        choices = [{"index": i, **choice, "token_ids": None} for i in range(work.choices)]
        return {
            **_base(work, "chat.completion"),
            "choices": choices,
            **_FINGERPRINT,
            "usage": work.usage,
            "metrics": None,
        }

    def opening(self, work: Work) -> bytes:
        delta = {"role": "assistant", "content": ""}
        extra: Document = {"prompt_token_ids": None, "prompt_text": None}
        return b"".join(self._chunk(work, i, delta, extra) for i in range(work.choices))

    def token(self, work: Work, number: int, choice: int) -> bytes:
        return self._chunk(work, choice, {"content": word(number)}, last=_is_last(work, number))

    def closing(self, work: Work) -> bytes:
        empty = b"" if work.count else self._chunk(work, 0, {"content": ""}, last=True)
        return empty + _usage_chunk(work, "chat.completion.chunk") + DONE

    def _chunk(self, work: Work, index: int, delta: object, extra: Document = _NOTHING, *, last: bool = False) -> bytes:
        finish = {"finish_reason": work.finish, "stop_reason": None} if last else {"finish_reason": None}
        choice = {"index": index, "delta": delta, "logprobs": None, **finish}
        return event(
            {**_base(work, "chat.completion.chunk"), "choices": [choice], **extra, **_fingerprint(work, last=last)}
        )


class Completion:
    """/v1/completions"""

    prefix = "cmpl-"

    def read(self, document: Document) -> tuple[str, int | None]:
        prompt = document.get("prompt")
        if not prompt:
            message = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
            raise Refusal(400, "BadRequestError", message, "prompt")
        limit = _integer(document, "max_tokens")
        return _joined(prompt), 16 if limit is None else limit

    def whole(self, work: Work) -> object:
        choice = {"text": work.text, "logprobs": None, "finish_reason": work.finish, "stop_reason": None}
        choices = [{"index": i, **choice} for i in range(work.choices)]
        return {
            **_base(work, "text_completion"),
            "choices": choices,
            **_FINGERPRINT,
            "usage": work.usage,
            "metrics": None,
        }

    def opening(self, work: Work) -> bytes:
        return b""

    def token(self, work: Work, number: int, choice: int) -> bytes:
        return self._chunk(work, choice, word(number), last=_is_last(work, number))

    def closing(self, work: Work) -> bytes:
        empty = b"" if work.count else self._chunk(work, 0, "", last=True)
        return empty + _usage_chunk(work, "text_completion") + DONE

    def _chunk(self, work: Work, index: int, text: str, *, last: bool) -> bytes:
        finish = work.finish if last else None
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
        return event({**_base(work, "text_completion"), "choices": [choice], **_fingerprint(work, last=last)})


class Responses:
    """/v1/responses"""

    prefix = "resp_"

    def read(self, document: Document) -> tuple[str, int | None]:
        if "input" not in document:
            raise _missing(document, "input")
        return _joined([document.get("instructions"), document["input"]]), _integer(document, "max_output_tokens")

    def whole(self, work: Work) -> object:
        cut = work.finish == "length"
        usage = {
            "input_tokens": work.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": work.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": work.prompt_tokens + work.completion_tokens,
        }
        return {
            **self._response(work, "incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(work, "completed", [self._part(work.text)])],
            "usage": usage,
        }

    def opening(self, work: Work) -> bytes:
        response = {**self._response(work, "in_progress"), "output": [], "usage": None}
        item = self._item(work, "in_progress", [])
        return b"".join(
            (
                self._event(0, "response.created", response=response),
                self._event(1, "response.in_progress", response=response),
                self._event(2, "response.output_item.added", item=item, output_index=0),
                self._event(3, "response.content_part.added", **self._place(work), part=self._part("")),
            )
        )

    def token(self, work: Work, number: int, choice: int) -> bytes:
        sequence = 4 + number - work.first
        delta = {"delta": word(number), "logprobs": []}
        return self._event(sequence, "response.output_text.delta", **self._place(work), **delta)

    def closing(self, work: Work) -> bytes:
        at = 4 + work.count
        item = self._item(work, "completed", [self._part(work.text)])
        place = self._place(work)
        return b"".join(
            (
                self._event(at, "response.output_text.done", **place, text=work.text, logprobs=[]),
                self._event(at + 1, "response.content_part.done", **place, part=self._part(work.text)),
                self._event(at + 2, "response.output_item.done", item=item, output_index=0),
                self._event(at + 3, "response.completed", response=self.whole(work)),
            )
        )

    def _event(self, sequence: int, kind: str, **fields: object) -> bytes:
        return event({**fields, "sequence_number": sequence, "type": kind}, kind)

    def _response(self, work: Work, status: str) -> dict[str, object]:
        asked = {key: work.document.get(key) for key in ("instructions", "metadata", "max_output_tokens")}
        return {
            "id": work.id,
            "created_at": work.created,
            "incomplete_details": None,
            "model": work.model,
            "object": "response",
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0,
            "status": status,
            **asked,
        }

    def _item(self, work: Work, status: str, content: list[object]) -> dict[str, object]:
        return {"id": self._item_id(work), "content": content, "role": "assistant", "status": status, "type": "message"}

    def _place(self, work: Work) -> dict[str, object]:
        return {"content_index": 0, "item_id": self._item_id(work), "output_index": 0}

    def _item_id(self, work: Work) -> str:
        return "msg_" + work.id.removeprefix(self.prefix)

    def _part(self, text: str) -> dict[str, object]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}


class Messages:
    """/v1/messages"""

    prefix = "chatcmpl-"

    def read(self, document: Document) -> tuple[str, int | None]:
        messages = _required_list(document, "messages")
        limit = _integer(document, "max_tokens")
        if limit is None:
            raise _missing(document, "max_tokens")
        return _joined([document.get("system"), *messages]), limit

    def whole(self, work: Work) -> object:
        content = [{"type": "text", "text": work.text}]
        usage = {"input_tokens": work.prompt_tokens, "output_tokens": work.count}
        return {**self._message(work, content), "stop_reason": self._stop_reason(work), "usage": usage}

    def opening(self, work: Work) -> bytes:
        stop = {"stop_reason": None, "stop_sequence": None}
        usage = {"input_tokens": work.prompt_tokens, "output_tokens": 0}
        message = {**self._message(work, []), **stop, "usage": usage}
        block = {"type": "text", "text": ""}
        return self._event("message_start", message=message) + self._event(
            "content_block_start", content_block=block, index=0
        )

    def token(self, work: Work, number: int, choice: int) -> bytes:
        return self._event("content_block_delta", delta={"type": "text_delta", "text": word(number)}, index=0)

    def closing(self, work: Work) -> bytes:
        delta = {"stop_reason": self._stop_reason(work), "stop_sequence": None}
        usage = {"input_tokens": work.prompt_tokens, "output_tokens": work.count}
        return b"".join(
            (
                self._event("content_block_stop", index=0),
                self._event("message_delta", delta=delta, usage=usage),
                self._event("message_stop"),
            )
        )

    def _event(self, kind: str, **fields: object) -> bytes:
        return event({"type": kind, **fields}, kind)

    def _message(self, work: Work, content: object) -> dict[str, object]:
        return {"id": work.id, "type": "message", "role": "assistant", "content": content, "model": work.model}

    def _stop_reason(self, work: Work) -> str:
        return "max_tokens" if work.finish == "length" else "end_turn"


def embeddings(document: Document, served: Served, suffix: str, created: int) -> object:
    """Answer /v1/embeddings: vectors that depend on nothing but their text."""
    if "input" not in document:
        raise _missing(document, "input")
    texts = _texts(document["input"])
    as_base64 = document.get("encoding_format") == "base64"
    data = [
        {"index": i, "object": "embedding", "embedding": _packed(text) if as_base64 else list(_vector(text))}
        for i, text in enumerate(texts)
    ]
    head = {"id": "embd-" + suffix, "object": "list", "created": created, "model": served.model}
    return {**head, "data": data, "usage": _input_usage(document["input"])}


def rerank(document: Document, served: Served, suffix: str, created: int) -> object:
    """Answer /v1/rerank: the best first, by a score that depends on nothing but the two texts."""
    query, documents = _joined(document.get("query")), _texts(_required_list(document, "documents"))
    results: list[dict[str, Any]] = [
        {"index": i, "document": {"text": text}, "relevance_score": _score(query, text)}
        for i, text in enumerate(documents)
    ]
    best = sorted(results, key=lambda result: -result["relevance_score"])[: document.get("top_n") or None]
    usage = _input_usage([query, *documents])
    short = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
    return {"id": "rerank-" + suffix, "model": served.model, "usage": short, "results": best}


def score(document: Document, served: Served, suffix: str, created: int) -> object:
    """Answer /v1/score: one score for each pair; a single first text goes with every second one."""
    pairs = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
    named = next((pair for pair in pairs if pair[0] in document and pair[1] in document), None)
    if named is None:
        raise _missing(document, "text_1")
    left, right = _texts(document[named[0]]), _texts(document[named[1]])
    both = zip(left * len(right) if len(left) == 1 else left, right, strict=False)
    data = [{"index": i, "object": "score", "score": _score(a, b)} for i, (a, b) in enumerate(both)]
    head = {"id": "embd-" + suffix, "object": "list", "created": created, "model": served.model}
    return {**head, "data": data, "usage": _input_usage([*left, *right])}


def tokenize(document: Document, served: Served, suffix: str, created: int) -> object:
    """Answer /tokenize: words are numbered by what they are."""
    if not ("prompt" in document or "messages" in document):
        raise _missing(document, "prompt")
    parts = _joined(document.get("prompt") or document.get("messages")).split()
    tokens = [zlib.crc32(part.encode()) % 50_000 for part in parts]
    strings = parts if document.get("return_token_strs") else None
    length = served.max_model_len
    return {"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": strings}


def detokenize(document: Document, served: Served, suffix: str, created: int) -> object:
    """Answer /detokenize: as many simulated tokens as there are numbers."""
    count = len(_required_list(document, "tokens"))
    return {"prompt": "".join(word(i) for i in range(count))}


def count_tokens(document: Document, served: Served, suffix: str, created: int) -> object:
    """Answer /v1/messages/count_tokens."""
    count = words(_required_list(document, "messages")) + words(document.get("system"))
    return {"input_tokens": count, "context_management": {"original_input_tokens": count}}


def form_fields(body: bytes, content_type: bytes) -> dict[str, bytes]:
    """Return the fields of a multipart form by name, files too; empty where it is none."""
    _, _, boundary = content_type.partition(b"boundary=")
    fields = {}
    for part in body.split(b"--" + boundary.strip(b'"'))[1:-1] if boundary else []:
        head, _, content = part.partition(b"\r\n\r\n")
        _, _, name = head.partition(b' name="')
        fields[name.partition(b'"')[0].decode("latin-1")] = content.removesuffix(b"\r\n")
    return fields


def transcription(body: bytes, content_type: bytes, served: Served) -> object:
    """Answer /v1/audio/transcriptions with the size of the file."""
    fields = form_fields(body, content_type)
    if "file" not in fields:
        raise _missing(fields, "file")
    check_model({"model": fields.get("model", b"").decode("utf-8", "replace")}, served)
    text = f"simulated transcription of {len(fields['file'])} bytes"
    return {"text": text, "usage": {"type": "duration", "seconds": 0}}


def decoded(body: bytes) -> Document:
    """Decode the body of a request to an object, or raise what vLLM answers."""
    try:
        document = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        detail = f"{{'type': 'json_invalid', 'loc': 'body.0', 'msg': 'JSON decode error', 'ctx': {str(error)!r}}}"
        raise _validation("body.0", detail) from error
    if not isinstance(document, dict):
        detail = "{'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be a valid dictionary'}"
        raise _validation("body", detail)
    return document


def _check_length(prompt_tokens: int, limit: int | None, length: int) -> None:
    if limit is not None and limit < 0:
        text = f"max_tokens must be at least 1, got {limit}. (parameter=max_tokens, value={limit})"
        raise Refusal(400, "BadRequestError", text, "max_tokens")
    if limit is not None and limit > length:
        text = f"max_tokens={limit} cannot be greater than max_model_len={length}. Please request fewer output tokens."
        raise Refusal(400, "BadRequestError", f"{text} (parameter=max_tokens, value={limit})", "max_tokens")
    if prompt_tokens >= length:
        text = f"This model's maximum context length is {length} tokens. However, your prompt contains"
        text += f" {prompt_tokens} input tokens. Please reduce the length of the input prompt."
        raise Refusal(400, "BadRequestError", text, "input_tokens")


def _tokens_so_far(document: Document) -> int:
    """Count the tokens that an earlier answer had given, if this request asks to go on with it."""
    messages = document.get("messages")
    if not document.get("continue_final_message") or not messages:
        return 0
    return words(messages[-1])


def _base(work: Work, kind: str) -> dict[str, object]:
    return {"id": work.id, "object": kind, "created": work.created, "model": work.model}


def _fingerprint(work: Work, *, last: bool) -> Document:
    """What the last event of a choice says of the engine, unless the usage after it will."""
    return _FINGERPRINT if last and not work.wants_usage else _NOTHING


def _usage_chunk(work: Work, kind: str) -> bytes:
    return event({**_base(work, kind), "choices": [], "usage": work.usage, **_FINGERPRINT}) if work.wants_usage else b""


def _is_last(work: Work, number: int) -> bool:
    return number == work.first + work.count - 1


def _required_list(document: Document, name: str) -> list[Any]:
    if name not in document:
        raise _missing(document, name)
    value = document[name]
    if not isinstance(value, list):
        detail = f"{{'type': 'list_type', 'loc': 'body.{name}', 'msg': 'Input should be a valid list'}}"
        raise _validation(f"body.{name}", detail)
    return value


def _integer(document: Document, name: str) -> int | None:
    value = document.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    detail = f"{{'type': 'int_parsing', 'loc': 'body.{name}', 'msg': 'Input should be a valid integer'}}"
    raise _validation(f"body.{name}", detail)


def _missing(document: Mapping[str, object], name: str) -> Refusal:
    size = f"<dict of {len(document)} items>"
    detail = f"{{'type': 'missing', 'loc': 'body.{name}', 'msg': 'Field required', 'input': '{size}'}}"
    return _validation(f"body.{name}", detail)


def _validation(param: str, detail: str) -> Refusal:
    return Refusal(400, "Bad Request", f"1 validation error:\n  {detail}", param)


def _joined(value: object) -> str:
    return " ".join(_strings(value))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in ("role", "type"):
                yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, int):
        yield str(value)


def _texts(value: object) -> list[str]:
    """Return one text for each input; a list of numbers is one input."""
    if isinstance(value, list) and not (value and isinstance(value[0], int)):
        return [_joined(part) for part in value]
    return [_joined(value)]


def _vector(text: str) -> tuple[float, ...]:
    return tuple(zlib.crc32(f"{i} {text}".encode()) / 2**32 for i in range(_DIMENSIONS))


def _packed(text: str) -> str:
    return base64.b64encode(struct.pack(f"<{_DIMENSIONS}f", *_vector(text))).decode()


def _score(a: str, b: str) -> float:
    return zlib.crc32(f"{a}\n{b}".encode()) / 2**32


def _input_usage(value: object) -> dict[str, object]:
    tokens = words(_joined(value))
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
