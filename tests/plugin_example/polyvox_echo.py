"""A provider as others write theirs: it says what it is asked, through an API of its own."""

import msgspec

from proxy.config import EndpointSettings
from proxy.errors import BadRequest, PathNotServed, WrongSetting
from proxy.providers import Asked, Outgoing
from proxy.providers.translated import Document, Translated
from proxy.registry import Endpoint
from proxy.transport import Answer


class Options(msgspec.Struct, forbid_unknown_fields=True):
    region: str
    token: str = ""


class Echo:
    def check(self, settings: EndpointSettings) -> None:
        try:
            msgspec.convert(settings.options, Options)
        except msgspec.ValidationError as e:
            raise WrongSetting(("options",), str(e)) from None

    def request(self, asked: Asked, endpoint: Endpoint) -> Outgoing:
        if asked.path != "/v1/completions":
            raise PathNotServed(asked.path, "echo", ("/v1/completions",))
        if "suffix" in asked.envelope.fields:
            raise BadRequest("suffix: provider echo has none", param="suffix")
        assert endpoint.api_key
        headers = [(b"x-echo-key", endpoint.api_key.reveal().encode())]
        prompt = msgspec.json.decode(asked.body)["prompt"]
        return Outgoing(f"/echo/{endpoint.options['region']}".encode(), headers, prompt.encode())

    def answer(self, answer: Answer, asked: Asked, endpoint: Endpoint) -> Answer:
        return Translated(answer, [(b"content-type", b"application/json")], Document(_completion))


def _completion(body: bytes) -> bytes:
    choice = {"index": 0, "text": body.decode(), "finish_reason": "stop"}
    return msgspec.json.encode({"id": "echo", "object": "text_completion", "model": "echo", "choices": [choice]})
