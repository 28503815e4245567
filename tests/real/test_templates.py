"""Chats as text, beside the engines' own libraries: transformers, and Mistral's tokenizers."""

import json
import subprocess
from pathlib import Path

import pytest

from proxy.prompts import rendering, rewritten
from proxy.prompts.adapters import AdapterSettings, for_text, template_name
from tests.prompts.conversations import CONVERSATIONS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120, func_only=True)]

# Renders with a checkpoint's own tokenizer, which has its template.
_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chats = json.load(sys.stdin)
texts = {k: tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for k, c in chats.items()}
print(json.dumps({"texts": texts, "template": tokenizer.chat_template, "bos_token": tokenizer.bos_token,
                  "eos_token": tokenizer.eos_token}))
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


def run(interpreter: Path, script: str, argument: object) -> dict[str, str]:
    chats = json.dumps(CONVERSATIONS if script is _TRANSFORMERS else PLAIN)
    done = subprocess.run(
        [str(interpreter), "-I", "-c", script, str(argument)], input=chats, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["smollm2", "mistral", "llama", "qwen"])
def test_the_template_of_a_checkpoint_is_rendered_as_transformers_renders_it(checkpoints, interpreter, smollm2, name):
    reference = run(interpreter, _TRANSFORMERS, smollm2 if name == "smollm2" else getattr(checkpoints, name))
    form = rendering.Form(reference["template"], reference["bos_token"], reference["eos_token"])
    for title, chat in CONVERSATIONS.items():
        assert rendering.render(form, chat) == reference["texts"][title], title


@pytest.mark.parametrize(("version", "family"), [("v1", "inst")])
def test_a_chat_becomes_the_text_that_mistral_makes_of_it(interpreter, version, family):
    reference = run(interpreter, _MISTRAL, version)
    settings = AdapterSettings(family=family, bos_token="<s>")
    adapter = for_text(settings, "any", rendering.shipped(template_name(settings, "any")))
    for title, chat in PLAIN.items():
        assert rendering.render(adapter.form, rewritten(chat, adapter)) == reference[title], title
