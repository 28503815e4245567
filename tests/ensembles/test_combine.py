"""How several answers become one, whoever gave them."""

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ensembles import confidence, consensus, first, vote
from proxy.ensembles.answers import Answer, Verdict, read
from proxy.errors import MalformedAnswer


def answers(*texts: str, weights: Sequence[float] = ()) -> list[Answer]:
    weights = weights or [1.0] * len(texts)
    return [Answer(f"m{i}", weight, text) for i, (text, weight) in enumerate(zip(texts, weights, strict=True))]


def chosen(verdict: Verdict | None, among: Sequence[Answer]) -> str:
    assert verdict is not None and verdict.chosen is not None
    return among[verdict.chosen].text


# What all of them have in common. A member's name is its own, so that answers can be told apart in any order.

TEXTS = st.sampled_from(
    [
        "Paris",
        "paris.",
        "Москва",
        "Столица - Москва",
        "東京です",
        "京都",
        "return a - b",
        "1,000",
        "1000",
        "",
        "no idea",
    ]
)
OBJECTS = st.fixed_dictionaries(
    {"a": st.integers(0, 2)},
    optional={"b": st.sampled_from(["x", "y"]), "c": st.fixed_dictionaries({"d": st.booleans()})},
).map(json.dumps)  # fmt: skip
WEIGHTS = st.floats(0.1, 10.0)
LOGPROBS = st.one_of(st.none(), st.floats(-5.0, 0.0))


def councils(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[Answer]]:
    member = st.tuples(texts, WEIGHTS, LOGPROBS)
    return st.lists(member, min_size=1, max_size=5).map(
        lambda drawn: [Answer(f"m{i}", w, text, logprob=lp) for i, (text, w, lp) in enumerate(drawn)]
    )


def combine_first(given: Sequence[Answer]) -> Verdict:
    return first.combine(given, [len(a.text) + a.weight for a in given])


COMBINES = {
    "consensus": (consensus.combine, TEXTS), "vote": (vote.combine, TEXTS), "confidence": (confidence.combine, TEXTS),
    "fields": (vote.combine_objects, OBJECTS), "first": (combine_first, TEXTS),
}  # fmt: skip


@pytest.mark.parametrize("name", COMBINES)
@given(st.data())
def test_the_order_of_the_answers_changes_nothing(name, data):
    combine, texts = COMBINES[name]
    given_ = data.draw(councils(texts))
    other = data.draw(st.permutations(given_))
    one, two = combine(given_), combine(other)
    if one is None:
        assert two is None
        return
    assert given_[one.chosen].member == other[two.chosen].member
    assert one.details == two.details
    assert one.content == two.content
    by_member = [dict(zip([a.member for a in g], v.scores, strict=False)) for g, v in ((given_, one), (other, two))]
    assert by_member[0] == by_member[1]


@pytest.mark.parametrize("name", ["consensus", "vote", "confidence"])
@given(st.data(), st.floats(1.0, 10.0))
def test_more_weight_for_the_chosen_answer_leaves_it_chosen(name, data, more):
    combine, texts = COMBINES[name]
    council = data.draw(councils(texts))
    before = combine(council)
    if before is None:
        return
    heavier = [
        Answer(a.member, a.weight * more if i == before.chosen else a.weight, a.text, logprob=a.logprob)
        for i, a in enumerate(council)
    ]
    assert combine(heavier).chosen == before.chosen


@given(councils(TEXTS))
def test_agreement_is_between_nothing_and_all(council):
    verdict = consensus.combine(council)
    assert 0.0 <= verdict.details["agreement_score"] <= 1.0
    assert all(0.0 <= score <= answer.weight for score, answer in zip(verdict.scores, council, strict=True))


# Consensus


def test_the_answer_that_the_others_are_most_like_is_chosen():
    council = answers("I like trains.", "The capital is Paris.", "Paris is the capital.")
    assert chosen(consensus.combine(council), council) == "The capital is Paris."


def test_weight_makes_up_for_less_agreement():
    council = answers("the cat sat", "the cat ran", "a dog sat", weights=[1.0, 1.0, 4.0])
    assert chosen(consensus.combine(council), council) == "a dog sat"


def test_all_the_same_agree_wholly_and_one_alone_with_nobody():
    assert consensus.combine(answers("да", "Да", "да!")).details["agreement_score"] == 1.0
    assert consensus.combine(answers("да")).details["agreement_score"] == 0.0


def test_themes_are_what_the_weight_says_and_no_idle_words():
    council = answers(
        "Договор расторгается судом, потому что срок истёк.", "Суд расторгает договор.", "Погода хорошая.",
        weights=[2, 1, 1],
    )  # fmt: skip
    assert consensus.combine(council).details["common_themes"] == ["договор", "расторгает", "суд"]


def test_themes_of_japanese_are_its_nouns():
    council = answers("東京は日本の首都です。", "日本の首都は東京である。")
    assert sorted(consensus.combine(council).details["common_themes"]) == ["日本", "東京", "首都"]


# Votes


def test_spellings_of_one_answer_are_one_vote():
    council = answers("The answer is **1,000**.", "1000", "2000", weights=[1.0, 0.5, 1.4])
    verdict = vote.combine(council)
    assert chosen(verdict, council) == "The answer is **1,000**."
    assert verdict.details["votes"][0] == {"answer": "1000", "weight": 1.5, "members": ["m0", "m1"]}


def test_objects_are_voted_field_by_field():
    council = answers('{"a": 1, "b": {"c": "X", "d": [1]}}', '{"a": 2, "b": {"c": "x.", "d": [2]}}',
                      '```json\n{"b": {"d": [2], "c": "y"}, "a": 1.0}\n```', "not JSON")  # fmt: skip
    verdict = vote.combine_objects(council)
    assert json.loads(verdict.content) == {"a": 1, "b": {"c": "X", "d": [2]}}
    assert verdict.scores[3] is None
    assert set(verdict.details["fields"]) == {"a", "b.c", "b.d"}


def test_what_is_put_together_has_the_keys_of_one_of_the_answers():
    council = answers('{"kind": "a", "x": 1}', '{"kind": "a", "x": 2}', '{"kind": "b", "y": 1}', weights=[1, 1, 1.5])
    assert json.loads(vote.combine_objects(council).content) == {"kind": "a", "x": 1}


def test_a_number_is_not_its_text_and_true_is_not_one():
    council = answers('{"a": "1"}', '{"a": 1}', '{"a": true}', '{"a": "1.0"}')
    assert json.loads(vote.combine_objects(council).content) == {"a": "1"}


def test_without_any_object_there_is_no_vote_on_fields():
    assert vote.combine_objects(answers("x", "[1]")) is None


# Confidence, first


def test_confidence_is_the_mean_probability_times_weight():
    council = [Answer("a", 1.0, "x", logprob=math.log(0.9)), Answer("b", 2.0, "y", logprob=math.log(0.5))]
    verdict = confidence.combine(council)
    assert verdict.scores == pytest.approx((0.9, 1.0))
    assert verdict.chosen == 1


def test_an_answer_without_probabilities_comes_last_and_all_such_have_no_verdict():
    council = [Answer("a", 100.0, "x"), Answer("b", 0.1, "y", logprob=-9.0)]
    assert confidence.combine(council).chosen == 1
    assert confidence.combine(council[:1]) is None


@pytest.mark.parametrize(
    "poor",
    [
        Answer("a", 1.0, "cut", finish_reason="length"),
        Answer("a", 1.0, "", refused=True),
        Answer("a", 1.0, "filtered", finish_reason="content_filter"),
    ],
)
def test_a_good_answer_comes_before_a_faster_poor_one(poor):
    assert first.combine([poor, Answer("b", 1.0, "whole")], [0.1, 5.0]).chosen == 1


# Reading a completion


def completion(**choice: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop", **choice}]}).encode()


def test_calls_that_are_equal_are_spelled_alike():
    one, two = (
        read(completion(message={"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}), "m", 1.0)
        for arguments in ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}')
    )
    assert one.calls == two.calls
    assert not one.is_empty


def test_the_probability_of_an_answer_is_the_mean_of_its_tokens():
    logprobs = {"content": [{"token": "x", "logprob": -1.0, "bytes": None}, {"token": "y", "logprob": -3.0}]}
    assert read(completion(logprobs=logprobs), "m", 1.0).logprob == -2.0
    assert read(completion(logprobs={"content": []}), "m", 1.0).logprob is None


def test_parts_of_a_content_are_one_text():
    assert read(completion(message={"content": [{"type": "text", "text": "a"}, {"text": "b"}]}), "m", 1.0).text == "ab"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<think>6 x 7?\n</think>\n\n42", "42"),
        ("<thinking>x</thinking>42", "42"),
        ("<think>cut off", ""),
        ("Write <think> in HTML", "Write <think> in HTML"),
    ],
)
def test_what_a_model_thinks_aloud_is_not_its_answer(content, text):
    assert read(completion(message={"content": content}), "m", 1.0).text == text


@pytest.mark.parametrize(
    "document", [b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{}]}', b'{"choices":3}', b"\xff"]
)
def test_what_is_no_completion_is_refused(document):
    with pytest.raises(MalformedAnswer):
        read(document, "m", 1.0)
