"""A server that can do some things, and refuses, breaks at or leaves aside others. Words are its tokens."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Way = Literal["does", "refuses", "ignores", "breaks"]

COUNTED = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ANSWERS = {
    "France": "Paris", "7 greater": "Yes.", "Zx9-quartz": "Zx9-quartz", "1 to 5": "1 2 3 4 5", "grass": "GREEN",
    "fruits": "apple, pear, plum", "столица": "Москва.", "日本": "東京",
}  # fmt: skip


@dataclass
class AbleServer:
    """ways: what it does with each feature. context: words that a prompt may have. running: requests of others.

    too_busy: answers of 429 that it begins with.
    """

    ways: dict[str, Way] = field(default_factory=dict)
    context: int = 100_000
    says_context: bool = False
    tells_limit: bool = False
    cuts_prompts: bool = False
    chats: bool = True
    obedient: bool = True
    counts: bool = True
    models: tuple[str, ...] = ("there",)
    version: str | None = "9.1"
    key: str = ""
    temperature: bool = True
    running: int = 0
    too_busy: int = 0
    address: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    def way(self, feature: str) -> Way:
        return self.ways.get(feature, "does")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().lower().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                writer.write(self._answer(first.split()[1], headers, body))
                await writer.drain()
                self.at_once -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    def _answer(self, path: str, headers: dict[str, str], body: bytes) -> bytes:
        self.heard.append(path)
        if path == "/metrics":
            return _document(200, f'vllm:num_requests_running{{model_name="there"}} {self.running}.0\n')
        if self.key and headers.get("authorization") != f"bearer {self.key}":
            return _document(401, {"error": {"message": "Incorrect API key provided"}})
        if path == "/v1/models":
            length = {"max_model_len": self.context} if self.says_context else {}
            return _document(200, {"data": [{"id": name, **length} for name in self.models]})
        if path == "/version" and self.version:
            return _document(200, {"version": self.version})
        if path != "/v1/chat/completions" or not self.chats:
            return _document(404, {"error": {"message": "Not Found"}})
        if self.too_busy:
            self.too_busy -= 1
            return _document(429, {"error": {"message": "Too Many Requests"}}, "retry-after: 0\r\n")
        asked = json.loads(body)
        self.requests.append(asked)
        return self._chat(asked)

    def _chat(self, asked: dict[str, Any]) -> bytes:
        for feature in _features(asked):
            if self.way(feature) == "refuses":
                return _document(400, {"error": {"message": f"{feature} is not supported"}})
            if self.way(feature) == "breaks":
                return _document(500, {"error": {"message": "Internal Server Error"}})
        if not self.temperature and "temperature" in asked:
            return _document(400, {"error": {"message": "temperature: only 1 is supported"}})
        words = self._words(asked)
        if words > self.context and not self.cuts_prompts:
            limit = f"This model's maximum context length is {self.context} tokens." if self.tells_limit else "no"
            return _document(400, {"error": {"message": limit}})
        message, finish = self._message(asked)
        usage = {"prompt_tokens": min(words, self.context), "completion_tokens": len(str(message["content"]).split())}
        return (
            self._whole(message, finish, usage, asked)
            if not asked.get("stream")
            else self._stream(message, usage, asked)
        )

    def _whole(self, message: dict[str, Any], finish: str, usage: dict[str, int], asked: dict[str, Any]) -> bytes:
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish}
        if asked.get("logprobs") and self.way("logprobs") == "does":
            choice["logprobs"] = {"content": [{"token": "Hello", "logprob": -0.1}]}
        return _document(200, {"id": "1", "choices": [choice], **({"usage": usage} if self.counts else {})})

    def _stream(self, message: dict[str, Any], usage: dict[str, int], asked: dict[str, Any]) -> bytes:
        chunks = [{"choices": [{"index": 0, "delta": {"content": f" {word}"}}]} for word in message["content"].split()]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if asked.get("stream_options") and self.way("stream_usage") == "does":
            chunks.append({"choices": [], "usage": usage})
        events = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(events)}\r\n\r\n"
        return head.encode() + events

    def _words(self, asked: dict[str, Any]) -> int:
        words = 0
        for message in asked["messages"]:
            if message["role"] == "system" and self.way("system_role") == "ignores":
                continue
            parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            words += sum(len(part["text"].split()) if "text" in part else self._picture() for part in parts)
        return words

    def _picture(self) -> int:
        return 50 if self.way("images") == "does" else 0

    def _message(self, asked: dict[str, Any]) -> tuple[dict[str, Any], str]:
        said = {"role": "assistant", "content": self._text(asked)}
        wanted = (asked.get("response_format") or {}).get("type")
        if wanted and self.way(wanted) == "does":
            schema = asked["response_format"].get("json_schema", {}).get("schema", {})
            whole = {name: kind["enum"][0] for name, kind in schema.get("properties", {}).items()} or {"a": 1}
            said["content"] = json.dumps(whole)
        if asked.get("tools") and self.way("tools") == "does" and (self.obedient or asked["tool_choice"] == "required"):
            said |= {
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": "{}"}}],
            }
        return said, "stop"

    def _text(self, asked: dict[str, Any]) -> str:
        *before, last = asked["messages"]
        whole = COUNTED
        if last["role"] == "assistant":
            goes_on = asked.get("continue_final_message") and self.way("continues") == "does"
            return whole.removeprefix(last["content"]) if goes_on else whole
        question = last["content"] if isinstance(last["content"], str) else ""
        if "Count" in question or "animals" in question or not self.obedient:
            return whole
        if before and before[0]["role"] == "system" and self.way("system_role") == "does":
            return before[0]["content"].removesuffix(".").split()[-1]
        return next((answer for key, answer in ANSWERS.items() if key in question), "Hello.")


def _features(asked: dict[str, Any]) -> list[str]:
    pictures = [part for m in asked["messages"] if isinstance(m["content"], list) for part in m["content"]]
    present = {
        "system_role": any(m["role"] == "system" for m in asked["messages"]),
        str((asked.get("response_format") or {}).get("type")): "response_format" in asked,
        "tools": "tools" in asked,
        "logprobs": "logprobs" in asked,
        "stream_usage": "stream_options" in asked,
        "continues": "continue_final_message" in asked,
        "images": any(part["type"] == "image_url" for part in pictures),
    }
    return [feature for feature, there in present.items() if there]


def _document(status: int, body: dict[str, Any] | str, more: str = "") -> bytes:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n{more}\r\n"
    return head.encode() + data


@asynccontextmanager
async def able_server(**settings: Any) -> AsyncIterator[AbleServer]:
    """Serve on a free port of the loopback."""
    able = AbleServer(**settings)
    server = await asyncio.start_server(able.serve, "127.0.0.1", 0)
    able.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield able
    finally:
        server.close()
