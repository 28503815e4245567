"""Chats as text: the template of a model, in Jinja, as transformers renders it.

The environment is that of `transformers.utils.chat_template_utils` (5.x): sandboxed and immutable, blocks trimmed,
`break` and `continue` in loops, `raise_exception`, `tojson` that escapes nothing but what JSON does. A template comes
from whoever runs the server, or from a model's makers; what clients say is only ever its data.
"""

import json
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from proxy.errors import BadRequest
from proxy.prompts import Message, text_of
from proxy.prompts.adapters import Form


class _Refused(Exception):
    """A template has called raise_exception."""


@cache
def shipped(name: str) -> str:
    """Return a template of ours."""
    return (files("proxy.prompts") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def render(form: Form, messages: list[Message], *, opened: bool = False) -> str:
    """Return the text that a model is to go on with.

    opened: the last message is the assistant's, and is continued; else its answer begins after the text. Raises
    BadRequest where the template refuses the messages, or they hold more than text.
    """
    said = [{**m, "content": text_of(m, f"messages[{i}]")} for i, m in enumerate(messages)]
    last = said.pop()["content"] if opened else ""
    if form.system and (not said or said[0].get("role") != "system"):
        said.insert(0, {"role": "system", "content": form.system})
    tokens = {"bos_token": form.bos_token, "eos_token": form.eos_token}
    try:
        text = _compiled(form.template).render(messages=said, add_generation_prompt=True, **tokens)
    except _Refused as e:
        raise BadRequest(f"messages: the model's template refuses them: {e}", param="messages") from None
    except Exception as e:  # a template may do anything with messages that its makers did not think of
        raise BadRequest(
            f"messages: the model's template cannot render them ({type(e).__name__})", param="messages"
        ) from None
    return str(text) + last


def problem(template: str) -> str | None:
    """Return what is wrong with a template, None if it is well-formed."""
    from jinja2 import TemplateSyntaxError

    try:
        _compiled(template)
    except TemplateSyntaxError as e:
        return f"line {e.lineno} of it: {e.message}"
    return None


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    # Imported here because most servers render nothing.
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(reason: str) -> None:
    raise _Refused(reason)
