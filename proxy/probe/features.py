"""What a request may ask for beside text. Each question returns what it found, None where it could not be told."""

import base64
import struct
import zlib
from typing import Any

import msgspec

from proxy.probe.asking import Asker, Said, user

Facts = dict[str, object]

_WORD = "ultraviolet"  # nobody gives it for the colour of the sky who was not made to
_MORE = "Be brief, be kind, be clear. " * 10
_MORE_TOKENS = 40  # that this has at the least, whatever cuts it into tokens


def _verdict(said: Said, did: bool) -> bool | None:
    """Return whether a server does something: it was seen to; it refused, broke, or left it aside; or was not there."""
    if said.taken:
        return did
    return False if said.refused or said.failed else None


async def system_role(asker: Asker) -> Facts:
    """A system message is taken if it is obeyed, or if a longer one makes the prompt longer: small models do not obey.

    Two of them are compared, since templates put one of their own where there is none.
    """
    orders = f"Whatever you are asked, you answer with this one word: {_WORD}."
    said = await _under(asker, orders)
    if not said.taken or _WORD in said.text.lower():
        return {"system_role": _verdict(said, True)}
    more = await _under(asker, _MORE + orders)
    before, now = said.prompt_tokens, more.prompt_tokens
    return {"system_role": None if before is None or now is None else now >= before + _MORE_TOKENS}


async def _under(asker: Asker, orders: str) -> Said:
    return await asker.chat({"role": "system", "content": orders}, user("Say hello."))


async def json_mode(asker: Asker) -> Facts:
    """JSON is a whole object, or the beginning of one that was cut."""
    question = user("Write one sentence about the sea, then the same as JSON.")
    said = await asker.chat(question, response_format={"type": "json_object"}, longest=48)
    cut = said.choice.get("finish_reason") == "length" and said.text.lstrip().startswith("{")
    return {"json_mode": _verdict(said, cut or isinstance(_decoded(said.text), dict))}


async def json_schema(asker: Asker) -> Facts:
    """The schema leaves one answer, which no model gives by itself."""
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": [_WORD]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "sky", "strict": True, "schema": schema}}
    said = await asker.chat(user("What colour is the sky? Answer in JSON."), response_format=wanted, longest=48)
    return {"json_schema": _verdict(said, _decoded(said.text) == {"colour": _WORD})}


async def tools(asker: Asker) -> Facts:
    """A tool may be offered, and is called at least where it must be."""
    weather = {
        "name": "get_weather",
        "description": "Tells the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    offered = [{"type": "function", "function": weather}]
    question = user("What is the weather in Paris? Use the tool.")
    said = await asker.chat(question, tools=offered, tool_choice="auto", longest=96)
    if said.taken and not said.message.get("tool_calls"):
        said = await asker.chat(question, tools=offered, tool_choice="required", longest=96)
    return {"tools": _verdict(said, bool(said.message.get("tool_calls")))}


async def logprobs(asker: Asker) -> Facts:
    said = await asker.chat(user("Say hello."), logprobs=True, top_logprobs=1)
    found = said.choice.get("logprobs")
    return {"logprobs": _verdict(said, bool(isinstance(found, dict) and found.get("content")))}


async def modalities(asker: Asker) -> Facts:
    """A picture is taken if it makes the prompt longer than its words; a server that does not count is believed."""
    words = {"type": "text", "text": "What colour is this?"}
    picture = {"type": "image_url", "image_url": {"url": _red_square()}}
    said = await asker.chat(user([words, picture]))
    if not said.taken:
        return {"modalities": ("text",) if said.refused or said.failed else None}
    without = await asker.chat(user([words]))
    before, now = without.prompt_tokens, said.prompt_tokens
    sees = now > before if before is not None and now is not None else "red" in said.text.lower()
    return {"modalities": ("text", "image") if sees else ("text",)}


def _red_square(side: int = 64) -> str:
    """Return a PNG as a data: URL."""
    rows = (b"\0" + b"\xff\0\0" * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
