"""Servers with OpenAI's /v1/completions and no chats: a chat becomes text there, and the answer a chat again.

How it becomes text, the adapter of the model says (see proxy.prompts). Requests for /v1/completions pass as they are.
"""

from urllib.parse import urlsplit

import msgspec

from proxy.config import EndpointSettings
from proxy.errors import PathNotServed, WrongSetting
from proxy.prompts import CHAT, COMPLETIONS
from proxy.providers import Asked, Outgoing
from proxy.providers.completions.answer import Chunks, chat_completion
from proxy.providers.completions.request import completions_request
from proxy.providers.headers import authorization, upstream_headers
from proxy.providers.openai import outgoing
from proxy.providers.translated import Document, Translated, Translation
from proxy.registry import Endpoint
from proxy.transport import Answer, content_type


class Completions:
    """See the module."""

    def __repr__(self) -> str:
        return "<Completions>"

    def check(self, settings: EndpointSettings) -> None:
        if settings.api_version is not None:
            raise WrongSetting(("api_version",), "provider completions takes none; it is for azure and anthropic")
        if settings.options:
            raise WrongSetting(("options",), "provider completions takes none; its template goes into adapter")
        if urlsplit(settings.base_url).path.rstrip("/").endswith("/completions"):
            raise WrongSetting(("base_url",), "leave /completions out: it is added, as in http://HOST:PORT/v1")

    def request(self, asked: Asked, endpoint: Endpoint) -> Outgoing:
        if asked.path not in (CHAT, COMPLETIONS):
            raise PathNotServed(asked.path, "completions", (CHAT, COMPLETIONS))
        headers = upstream_headers(asked) + authorization(endpoint)
        if asked.path == CHAT:
            form = endpoint.adapter.form if endpoint.adapter else None
            assert form, "the configuration was checked for one"
            body = completions_request(asked.body, form)
            asked = msgspec.structs.replace(asked, path=COMPLETIONS, body=body)
        return outgoing(asked, endpoint, endpoint.path(COMPLETIONS).encode(), headers)

    def answer(self, answer: Answer, asked: Asked, endpoint: Endpoint) -> Answer:
        if asked.path != CHAT or answer.status >= 400:
            return answer
        streams = content_type(answer.headers).lower().startswith(b"text/event-stream")
        translation: Translation = Chunks() if streams else Document(chat_completion)
        kept = [header for header in answer.headers if header[0] != b"content-length"]
        return Translated(answer, kept, translation)
