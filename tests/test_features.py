"""What is read of a request before it is routed."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing import complexity, features, tasks, wishes
from proxy.routing.features import Judge
from proxy.routing.wishes import Requirements, Wishes

JUDGE = Judge(tasks.tasks(), complexity.shipped(), 0.4, 0.6)
CHAT = "/v1/chat/completions"


NO_WISHES = Wishes()


def read(path=CHAT, said=NO_WISHES, **fields):
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return features.read(path, raw, said, JUDGE)


def says(text):
    return [{"role": "user", "content": text}]


def test_the_task_is_that_of_the_last_turn_of_the_user_without_system_and_tools():
    turns = [
        {"role": "system", "content": "You are a lawyer. Contracts, courts, statutes, landlords and tenants."},
        {"role": "user", "content": "Translate this into French: good morning"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "def solve():"}}]},
        {"role": "tool", "content": "```python\nimport os\n```"},
    ]
    assert read(messages=turns).task == "translation"


def test_results_of_tools_are_no_turn_of_the_user_where_they_have_its_role():
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": []}]}
    assert read("/v1/messages", messages=[*says("Write a haiku about rain"), result]).task == "creative"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": says("Implement a function in Python")}),
        (CHAT, {"messages": says([{"type": "text", "text": "Implement a function in Python"}])}),
        ("/v1/messages", {"system": "You are a doctor", "messages": says("Implement a function in Python")}),
        ("/v1/responses", {"input": "Implement a function in Python"}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text",
                                                                   "text": "Implement a function in Python"}]}]}),
        ("/v1/completions", {"prompt": "Implement a function in Python"}),
        ("/v1/completions", {"prompt": ["Hello", "Implement a function in Python"]}),
    ],
)  # fmt: skip
def test_task_and_length_are_read_in_every_api(path, fields):
    found = read(path, **fields)
    assert found.task == "code"
    assert found.complexity is not None
    assert 7 <= found.tokens <= 20


@pytest.mark.parametrize(
    ("path", "fields", "task"),
    [
        ("/v1/embeddings", {"input": "Implement a function in Python"}, "embeddings"),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}, "rerank"),
    ],
)
def test_what_is_no_chat_has_its_operation_for_a_task(path, fields, task):
    assert (read(path, **fields).task, read(path, **fields).complexity) == (task, None)


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "image"),
        ({"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, "image"),
        ({"type": "image", "source": {"type": "base64", "data": "AAAA"}}, "image"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "audio"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}, "video"),
    ],
)
def test_what_a_turn_shows_or_plays_is_needed(part, modality):
    earlier = [*says([part, {"type": "text", "text": "What is it?"}]), *says("And now?")]
    assert read(messages=earlier).modalities == {"text", modality}
    assert read(messages=says("hi")).modalities == {"text"}


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, ()),
        ({"tools": [{"type": "function"}]}, ("tools",)),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, ()),
        ({"tools": []}, ()),
        ({"tools": None}, ()),
        ({"response_format": {"type": "json_object"}}, ("json_mode",)),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, ("json_schema",)),
        ({"response_format": {"type": "text"}}, ()),
        ({"text": {"format": {"type": "json_schema"}}}, ("json_schema",)),
        ({"logprobs": True}, ("logprobs",)),
        ({"logprobs": False}, ()),
        ({"logprobs": 0}, ("logprobs",)),
        ({"logprobs": None}, ()),
    ],
)
def test_what_an_answer_is_to_have_is_needed(fields, needs):
    assert read(messages=says("hi"), **fields).needs == needs


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [({}, None), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 8, "max_tokens": None}, 8),
     ({"max_output_tokens": 9}, 9), ({"max_tokens": "many"}, None), ({"max_tokens": -1}, None)],
)  # fmt: skip
def test_the_length_of_the_answer_is_read_by_all_its_names(fields, tokens):
    assert read(messages=says("hi"), **fields).max_tokens == tokens


def test_what_a_request_says_itself_counts_for_more_than_what_it_looks_like():
    said = Wishes(task_type="legal", complexity="complex", budget_limit=0.5, prefer="speed",
                  requirements=Requirements(max_tokens=9, languages=("ru",), modalities=("image",), tools=True,
                                            region="eu", speed=7, quality=8, context=4000))  # fmt: skip
    found = read(said=said, messages=says("Hello, what is the weather like?"), max_tokens=5)
    assert (found.task, found.level, found.complexity, found.budget_limit) == ("legal", "complex", None, 0.5)
    assert (found.prefer, found.max_tokens, found.languages, found.region) == ("speed", 9, {"ru"}, "eu")
    assert (found.modalities, found.needs) == ({"text", "image"}, ("tools",))
    assert (found.speed, found.quality, found.context) == (7, 8, 4000)


@pytest.mark.parametrize(("said", "level"), [(0.39, "simple"), (0.4, "medium"), (0.6, "complex")])
def test_a_complexity_has_a_word(said, level):
    assert read(said=Wishes(complexity=said), messages=says("hi")).level == level


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("What is the capital of France?", "en"),
        ("Какая столица у Франции?", "ru"),
        ("Яка столиця у Франції?", "uk"),
        ("フランスの首都はどこですか。", "ja"),
        ("法国的首都是哪里？", "zh"),
        ("프랑스의 수도는?", "ko"),
        ("Quelle est la capitale de la France ?", None),
        ("Was ist die Hauptstadt?", None),
        ("Wat is de hoofdstad van Frankrijk?", None),
        ("2 + 2", None),
        ("Translate the word and write it: привет", "en"),
        ("Explain what the word 'й' means in this sentence and how you would use it", "en"),
        ("", None),
    ],
)
def test_the_language_is_told_where_it_can_be(text, name):
    assert features.language(text) == name


def test_russian_and_japanese_take_more_tokens_than_english_for_each_letter():
    assert features.tokens("a" * 100) < features.tokens("я" * 100) < features.tokens("あ" * 100)


def test_pictures_do_not_count_as_long_texts():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    assert read(messages=says([picture])).tokens < 2000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "format", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(["messages", "input", "prompt", "system", "tools", "response_format", "text", "logprobs",
                         "max_tokens", "tool_choice"])  # fmt: skip


@given(st.sampled_from([CHAT, "/v1/responses", "/v1/embeddings"]), st.dictionaries(names, json_values, max_size=4))
def test_a_body_that_is_not_as_it_should_be_is_left_to_the_server_that_gets_it(path, fields):
    found = read(path, **fields)
    assert found.tokens >= 0
    assert found.task in tasks.names()


# What is said of the routing

TASKS = tasks.names({"cooking": ()})


def wish(routing=None, *headers):
    fields = {} if routing is None else {"routing": msgspec.Raw(msgspec.json.encode(routing))}
    return wishes.read(fields, [(b"host", b"x"), *headers], TASKS)


@pytest.mark.parametrize(
    ("routing", "param", "said"),
    [
        ({"task_type": "legl"}, "routing.task_type", "did you mean 'legal'"),
        ({"task_type": "zzz"}, "routing.task_type", "tasks: translation"),
        ({"task_type": 5}, "routing.task_type", "expected"),
        ({"complexity": "hard"}, "routing.complexity", "expected 0 to 1, or simple, medium, complex"),
        ({"complexity": 1.5}, "routing.complexity", "expected 0 to 1"),
        ({"budget_limit": -1}, "routing.budget_limit", ">= 0"),
        ({"budget": 1}, "routing.budget", "did you mean 'budget_limit'"),
        ({"prefer": "price"}, "routing.prefer", "none of balanced, cost"),
        ({"requirements": {"languages": ["Russian"]}}, "routing.requirements.languages[0]", "a code of ISO 639"),
        ({"requirements": {"modalities": ["smell"]}}, "routing.requirements.modalities[0]", "image"),
        ({"requirements": {"tols": True}}, "routing.requirements.tols", "did you mean 'tools'"),
        ({"requirements": {"max_tokens": 0}}, "routing.requirements.max_tokens", ">= 1"),
        ([], "routing", "expected `object`"),
    ],
)
def test_wishes_that_are_none_are_refused_with_the_field_and_what_is_allowed(routing, param, said):
    with pytest.raises(wishes.BadRequest) as caught:
        wish(routing)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ((b"x-polyvox-task", b"legl"), "did you mean 'legal'"),
        ((b"x-polyvox-complexity", b"hard"), "x-polyvox-complexity: expected 0 to 1"),
        ((b"x-polyvox-complexity", b"nan"), "x-polyvox-complexity: expected 0 to 1"),
        ((b"x-polyvox-budget", b"cheap"), "x-polyvox-budget: expected"),
        ((b"x-polyvox-budget", b"inf"), "x-polyvox-budget: expected"),
        ((b"x-polyvox-region", b"e u"), "x-polyvox-region: expected"),
        ((b"x-polyvox-languages", b"ru,,en"), "x-polyvox-languages: expected"),
        ((b"x-polyvox-prefer", b"\xff"), "x-polyvox-prefer: "),
        ((b"x-polyvox-explain", b"yes"), "x-polyvox-explain: 'yes' is none of 1, 0"),
    ],
)
def test_headers_that_say_nothing_are_refused_by_name(header, said):
    with pytest.raises(wishes.BadRequest) as caught:
        wish(None, header)
    assert said in str(caught.value)


def test_headers_say_what_the_body_may_say():
    headers = [(b"x-polyvox-task", b"cooking"), (b"x-polyvox-complexity", b"0.25"), (b"x-polyvox-budget", b"0.5"),
               (b"x-polyvox-prefer", b"cost"), (b"x-polyvox-region", b"eu"), (b"x-polyvox-languages", b"ru, en"),
               (b"x-polyvox-explain", b"1")]  # fmt: skip
    said, explains = wish(None, *headers)
    assert explains
    assert said == Wishes("cooking", 0.25, 0.5, "cost", Requirements(region="eu", languages=("ru", "en")))


def test_what_the_body_says_counts_for_more_than_headers():
    headers = [(b"x-polyvox-task", b"code"), (b"x-polyvox-region", b"us"), (b"x-polyvox-budget", b"1")]
    said, explains = wish({"task_type": "legal", "requirements": {"region": "eu"}}, *headers)
    assert not explains
    assert said == Wishes("legal", budget_limit=1.0, requirements=Requirements(region="eu"))
