"""Azure OpenAI: where requests go, and which of its two APIs gets them."""

import json

import pytest

from proxy import providers
from proxy.config import EndpointSettings
from proxy.errors import PathNotServed, WrongSetting
from tests.providers.asking import KEY, asked, endpoint, sent

RESOURCE = "https://res.openai.azure.com"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("base_url", "version", "path", "target"),
    [
        (RESOURCE, "2024-10-21", "/v1/chat/completions",
         "/openai/deployments/there/chat/completions?api-version=2024-10-21"),
        (RESOURCE + "/openai/", "2024-10-21", "/v1/embeddings",
         "/openai/deployments/there/embeddings?api-version=2024-10-21"),
        (RESOURCE + "/gateway", "2024-10-21", "/v1/completions",
         "/gateway/openai/deployments/there/completions?api-version=2024-10-21"),
        (RESOURCE, "2025-04-01-preview", "/v1/responses", "/openai/responses?api-version=2025-04-01-preview"),
        (RESOURCE + "/openai/v1", None, "/v1/chat/completions", "/openai/v1/chat/completions"),
        (RESOURCE + "/openai/v1/", "preview", "/v1/responses", "/openai/v1/responses?api-version=preview"),
    ],
)  # fmt: skip
def test_a_request_goes_to_the_deployment_or_to_the_v1_api(base_url, version, path, target):
    there = endpoint("azure", base_url, api_version=version)
    question = asked(path, CHAT, b"api-version=of-the-client", authorization="Bearer of-the-client")
    outgoing = sent(there, question)
    assert outgoing.path.decode() == target
    assert (b"api-key", KEY.encode()) in outgoing.headers
    assert b"authorization" not in dict(outgoing.headers)
    assert json.loads(outgoing.body)["model"] == "there"


def test_a_stream_is_asked_what_it_used():
    there = endpoint("azure", RESOURCE, api_version="2024-10-21")
    outgoing = sent(there, asked("/v1/chat/completions", {**CHAT, "stream": True}))
    assert outgoing.hide_usage
    assert json.loads(outgoing.body)["stream_options"] == {"include_usage": True}


def test_the_name_of_a_deployment_cannot_leave_its_place():
    there = endpoint("azure", RESOURCE, api_version="2024-10-21", model="a/../b?c")
    assert b"/deployments/a%2F..%2Fb%3Fc/" in sent(there, asked("/v1/embeddings", {"input": "x"})).path


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/rerank", "/tokenize"])
def test_a_path_that_azure_has_not_is_refused_by_name(path):
    with pytest.raises(PathNotServed) as caught:
        sent(endpoint("azure", RESOURCE, api_version="2024-10-21"), asked(path, {}))
    assert caught.value.status == 404
    assert path in str(caught.value)
    assert "azure" in str(caught.value)


@pytest.mark.parametrize(
    ("base_url", "settings", "field", "said"),
    [
        (RESOURCE, {}, ("api_version",), "is needed"),
        (RESOURCE + "/openai/deployments/x", {"api_version": "2024-10-21"}, ("base_url",), "goes into model"),
        (RESOURCE, {"api_version": "2024-10-21", "options": {"a": 1}}, ("options",), "takes none"),
    ],
)
def test_settings_that_lead_nowhere_are_refused(base_url, settings, field, said):
    with pytest.raises(WrongSetting, match=said) as caught:
        providers.named("azure").check(EndpointSettings(base_url=base_url, provider="azure", **settings))
    assert caught.value.field == field
