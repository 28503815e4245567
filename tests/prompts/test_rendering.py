"""Chats as the text that a model was taught: as transformers renders them."""

import json
from pathlib import Path

import pytest

from proxy.errors import BadRequest
from proxy.prompts import adapters, rendering, rewritten
from proxy.prompts.adapters import FAMILIES, AdapterSettings, Form
from tests.prompts.conversations import ANSWER, CONVERSATIONS, QUESTION, SYSTEM

GOLDEN = json.loads((Path(__file__).parent.parent / "golden/chats.json").read_text(encoding="utf-8"))["families"]


def form_of(family: str, bos_token: str = "") -> adapters.Adapter:
    settings = AdapterSettings(family=family, bos_token=bos_token)
    return adapters.for_text(settings, "any", rendering.shipped(FAMILIES[family].template))


def render(family: str, messages: list[dict[str, str]], bos_token: str = "") -> str:
    adapter = form_of(family, bos_token)
    return rendering.render(adapter.form, rewritten(messages, adapter))


@pytest.mark.parametrize("title", CONVERSATIONS)
@pytest.mark.parametrize("family", GOLDEN)
def test_a_chat_becomes_the_text_that_transformers_makes_of_it(family, title):
    golden = GOLDEN[family]
    if golden["texts"][title] is None:  # the model's own template refuses it, where we merge the system message
        assert FAMILIES[family].merge_system and "system" in title
    else:
        assert render(family, CONVERSATIONS[title], golden["bos_token"]) == golden["texts"][title]


def test_every_family_has_a_golden_text_or_is_alpaca():
    assert set(FAMILIES) - set(GOLDEN) == {"alpaca"}  # older than chat templates: it has none in transformers


def test_an_instruction_is_put_as_alpaca_was_taught():
    # PROMPT_DICT["prompt_no_input"] of tatsu-lab/stanford_alpaca, train.py
    taught = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:"
    )
    assert render("alpaca", [QUESTION]) == taught.format(instruction=QUESTION["content"])


def test_a_system_message_takes_the_place_of_the_one_that_a_family_has():
    assert render("alpaca", [SYSTEM, QUESTION]).startswith(SYSTEM["content"] + "\n\n### Instruction:\n")
    assert "Alibaba" in render("qwen", [QUESTION]) and "Alibaba" not in render("qwen", [SYSTEM, QUESTION])


def test_a_family_without_system_role_has_it_in_the_first_turn():
    said = f"{SYSTEM['content']}\n\n{QUESTION['content']}"
    assert render("gemma", [SYSTEM, QUESTION]) == f"<start_of_turn>user\n{said}<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_is_to_be_continued_ends_the_text(family):
    whole = render(family, [QUESTION])
    adapter = form_of(family)
    opened = rendering.render(adapter.form, [QUESTION, {**ANSWER, "content": "Предло"}], opened=True)
    assert opened == whole + "Предло"


def test_a_template_of_ones_own_is_rendered_in_the_sandbox():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    )
    said = rendering.render(Form(template), [{"role": "user", "content": "é<"}])
    assert said == 'user: {"role": "user", "content": "é<"}'


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template):
    with pytest.raises(BadRequest) as caught:
        rendering.render(Form(template + "{{ raise_exception('reached') }}"), [QUESTION])
    assert "reached" not in str(caught.value)


def test_what_a_client_says_is_never_a_template():
    assert "{{ 7 * 7 }}" in render("chatml", [{"role": "user", "content": "{{ 7 * 7 }}"}])


def test_messages_that_a_template_refuses_are_a_bad_request_with_its_words():
    with pytest.raises(BadRequest) as caught:
        rendering.render(form_of("mistral").form, [ANSWER, QUESTION])
    assert caught.value.status == 400 and caught.value.param == "messages"
    assert "the user begins" in str(caught.value)


def test_a_part_that_is_no_text_is_refused_by_name():
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(BadRequest) as caught:
        rendering.render(form_of("chatml").form, [QUESTION, {"role": "user", "content": ["hi", picture]}])
    assert caught.value.param == "messages[1].content[0]"


def test_parts_of_text_are_lines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<|im_end|>" in render("chatml", [{"role": "user", "content": parts}])


def test_what_is_wrong_with_a_template_is_told_with_its_line():
    assert rendering.problem("{{ bos_token }}\n{% for %}").startswith("line 2 of it: ")
    assert rendering.problem("{{ bos_token }}") is None
