"""Azure OpenAI, in both of its APIs. The name of a model there is that of its deployment.

With `api_version` requests go to `/openai/deployments/NAME/...?api-version=...`. Where `base_url` ends with
`/openai/v1` they go to its v1 API, which has OpenAI's paths and takes a version only for previews.
"""

from urllib.parse import quote

from proxy.config import EndpointSettings
from proxy.errors import PathNotServed, WrongSetting
from proxy.providers import Asked, Outgoing
from proxy.providers.headers import upstream_headers
from proxy.providers.openai import outgoing
from proxy.registry import Endpoint
from proxy.transport import Answer

_OF_DEPLOYMENTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/audio/transcriptions", "/v1/audio/translations",
)  # fmt: skip
_SERVED = (*_OF_DEPLOYMENTS, "/v1/responses")
_HINT = "write https://RESOURCE.openai.azure.com with an api_version, or https://RESOURCE.openai.azure.com/openai/v1"


class Azure:
    """See the module."""

    def __repr__(self) -> str:
        return "<Azure>"

    def check(self, settings: EndpointSettings) -> None:
        path = settings.base_url.rstrip("/")
        if "/deployments" in path:
            raise WrongSetting(("base_url",), f"the deployment's name goes into model; {_HINT}")
        if settings.api_version is None and not path.endswith("/v1"):
            raise WrongSetting(("api_version",), f"is needed with this base_url; {_HINT}")
        if settings.options:
            raise WrongSetting(("options",), "provider azure takes none")

    def request(self, asked: Asked, endpoint: Endpoint) -> Outgoing:
        headers = upstream_headers(asked)
        if endpoint.api_key:
            headers.append((b"api-key", endpoint.api_key.reveal().encode()))
        return outgoing(asked, endpoint, _path(asked.path, endpoint).encode(), headers)

    def answer(self, answer: Answer, asked: Asked, endpoint: Endpoint) -> Answer:
        return answer


def _path(ours: str, endpoint: Endpoint) -> str:
    if ours not in _SERVED:
        raise PathNotServed(ours, "azure", _SERVED)
    base = endpoint.base_path or ""
    version = f"?api-version={quote(endpoint.api_version, safe='')}" if endpoint.api_version else ""
    if base.endswith("/v1"):
        return base + ours[3:] + version
    deployment = f"/deployments/{quote(endpoint.serves, safe='')}" if ours in _OF_DEPLOYMENTS else ""
    return f"{base.removesuffix('/openai')}/openai{deployment}{ours[3:]}{version}"
