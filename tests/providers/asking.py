"""What providers are asked, without a server around them."""

import json

from engines.spec import FleetStatus
from proxy import providers, registry, wire
from proxy.config import Config, EndpointSettings, ModelSettings, Secret
from proxy.providers import Asked, Outgoing
from proxy.registry import Endpoint

KEY = "sk-sentinel-upstream"


def endpoint(provider: str, base_url: str, **settings: object) -> Endpoint:
    """Return the endpoint of a model `m` that has the name `there` at its server."""
    given = {"model": "there", "api_key": Secret(KEY), **settings}
    only = EndpointSettings(base_url=base_url, provider=provider, **given)  # type: ignore[arg-type]
    config = Config(models={"m": ModelSettings(endpoints=(only,))})
    return registry.build(config, FleetStatus(version=0)).resolve("m").endpoints[0]


def asked(path: str, body: dict[str, object], query: bytes = b"", **headers: str) -> Asked:
    """Return a request of a client for the model `m`."""
    data = json.dumps({"model": "m", **body}).encode()
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Asked(path, query, sent, data, wire.read_json(data), b"the-id")


def sent(endpoint: Endpoint, question: Asked) -> Outgoing:
    """Return what an endpoint is sent."""
    return providers.named(endpoint.provider).request(question, endpoint)
