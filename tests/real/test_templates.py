"""Chats as text, beside the engines' own libraries and their own chats: transformers, Mistral's tokenizers, vLLM."""

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from proxy import providers
from proxy.config import Config, EndpointSettings, ModelSettings
from proxy.prompts import rendering, rewritten
from proxy.prompts.adapters import AdapterSettings, for_text, template_name
from tests.fakes.checkpoints import Checkpoints
from tests.fakes.one_worker import proxying, text_of
from tests.prompts.conversations import CONVERSATIONS
from tests.serving import Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120, func_only=True)]

# Renders with the tokenizers of checkpoints, which have their templates. The import takes longer than all else.
_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
chats = json.load(sys.stdin)
def rendered(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {k: tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for k, c in chats.items()}
    return {"texts": texts, "template": tokenizer.chat_template, "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token}
print(json.dumps([rendered(folder) for folder in sys.argv[1:]]))
"""
# Its text shows spaces and line feeds as the tokenizer has them.
_MISTRAL = """
import json, sys
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
tokenizer = getattr(MistralTokenizer, sys.argv[1])()
def text(chat):
    messages = [kinds[m["role"]](content=m["content"]) for m in chat]
    encoded = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages, model="x"))
    return encoded.text.replace("\\u2581", " ").replace("<0x0A>", "\\n")
print(json.dumps({k: text(c) for k, c in json.load(sys.stdin).items()}))
"""
PLAIN = {  # in letters that Mistral's first tokenizers have
    title: [{**m, "content": " ".join(f"word{i}" for i, _ in enumerate(m["content"].split()))} for m in chat]
    for title, chat in CONVERSATIONS.items()
}


def run(interpreter: Path, script: str, chats: object, *arguments: object) -> Any:
    done = subprocess.run(
        [str(interpreter), "-I", "-c", script, *map(str, arguments)],
        input=json.dumps(chats), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


TEMPLATES = ("smollm2", "mistral", "llama", "qwen")


@pytest.fixture(scope="module")
def references(checkpoints: Checkpoints, interpreter: Path, smollm2: Path) -> dict[str, Any]:
    """What transformers makes of all conversations by the template of each checkpoint, and the template."""
    folders = {"smollm2": smollm2, **msgspec.structs.asdict(checkpoints)}
    rendered = run(interpreter, _TRANSFORMERS, CONVERSATIONS, *(folders[name] for name in TEMPLATES))
    return dict(zip(TEMPLATES, rendered, strict=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_of_a_checkpoint_is_rendered_as_transformers_renders_it(references, name):
    reference = references[name]
    form = rendering.Form(reference["template"], reference["bos_token"], reference["eos_token"])
    for title, chat in CONVERSATIONS.items():
        assert rendering.render(form, chat) == reference["texts"][title], title


@pytest.mark.parametrize(("version", "family"), [("v1", "inst")])
def test_a_chat_becomes_the_text_that_mistral_makes_of_it(interpreter, version, family):
    reference = run(interpreter, _MISTRAL, PLAIN, version)
    settings = AdapterSettings(family=family, bos_token="<s>")
    adapter = for_text(settings, "any", rendering.shipped(template_name(settings, "any")))
    for title, chat in PLAIN.items():
        assert rendering.render(adapter.form, rewritten(chat, adapter)) == reference[title], title


def test_a_real_engine_that_is_asked_for_text_answers_as_in_its_own_chat(server: Server, http: httpx2.Client) -> None:
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    asked = {"messages": messages, "temperature": 0, "max_tokens": 16}
    own = http.post("/v1/chat/completions", json={"model": "smollm2", **asked}).json()

    async def through_text() -> tuple[httpx2.Response, httpx2.Response]:
        only = EndpointSettings(base_url=f"{server.base_url}/v1", provider="completions", model="smollm2")
        config = Config(models={"m": ModelSettings(endpoints=(only,))})
        providers.prepare(config)
        async with proxying(config) as proxy:
            return await proxy.ask(**asked), await proxy.ask(stream=True, **asked)

    plain, streamed = asyncio.run(through_text())
    assert plain.json()["choices"][0]["message"]["content"] == own["choices"][0]["message"]["content"]
    assert plain.json()["usage"]["prompt_tokens"] == own["usage"]["prompt_tokens"]
    assert text_of(streamed.text) == own["choices"][0]["message"]["content"]
