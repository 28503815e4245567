"""The chat completion that a client gets of the answer that was chosen."""

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting import Usage
from proxy.ensembles import completion
from proxy.ensembles.answers import Answer, read
from proxy.ensembles.completion import Ending, Written
from tests.fakes.one_worker import DONE, ROLE, event

ENDING = Ending("council", {"strategy": "x"}, Usage(10, 5, 2))
LAST = event(finish="stop")
ODD = b'data: {"choices": 3}\n\ndata: {"half\n\n: a comment\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n'


def answer(**message: object) -> Answer:
    choice = {"message": {"role": "assistant", **message}, "finish_reason": "stop", "logprobs": {"content": []}}
    body = {"id": "i", "created": 3, "system_fingerprint": None, "choices": [choice], "service_tier": "fast"}
    return read(json.dumps(body).encode(), "m", 1.0)


@given(st.lists(st.integers(0, 400)))
def test_a_stream_of_a_writer_is_passed_the_same_however_it_is_cut(cuts):
    stream = ROLE + event(content="Hel") + ODD + event(content="lo") + LAST + USAGE + DONE
    bounds = [0, *sorted(cuts), len(stream)]
    written = Written()
    passed = b"".join(written.feed(stream[a:b]) for a, b in pairwise(bounds))
    assert passed == ROLE + event(content="Hel") + ODD + event(content="lo")
    assert written.is_whole
    assert written.finish_reason == "stop"


def test_the_end_of_a_written_stream_has_details_then_sums_then_done():
    written = Written()
    written.feed(ROLE + event(content="x") + LAST)
    last, usage, done = written.end(ENDING).strip().split(b"\n\n")
    assert json.loads(last[6:])["ensemble"] == {"strategy": "x"}
    assert json.loads(usage[6:])["usage"]["total_tokens"] == 15
    assert done == b"data: [DONE]"


def test_a_stream_without_its_end_is_not_whole():
    written = Written()
    written.feed(ROLE + event(content="x"))
    assert not written.is_whole
    assert written.finish_reason == "error"


def test_a_document_keeps_what_a_model_said_beside_its_answer():
    kept = completion.with_content(answer(content="x", reasoning="hm"), None, keep_logprobs=True)
    body = json.loads(completion.document(kept, ENDING))
    assert body["choices"][0]["message"]["reasoning"] == "hm"
    assert body["choices"][0]["logprobs"] == {"content": []}
    assert (body["id"], body["model"], body["service_tier"]) == ("i", "council", "fast")
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_another_text_takes_the_place_of_the_answer_s_and_has_no_probabilities():
    changed = completion.with_content(answer(content="x"), "y", keep_logprobs=True)
    (choice,) = json.loads(completion.document(changed, ENDING))["choices"]
    assert choice["message"]["content"] == "y"
    assert choice["logprobs"] is None


def test_events_say_nothing_of_what_is_empty():
    kept = completion.with_content(answer(content=None, refusal="no", tool_calls=[]), None, keep_logprobs=False)
    role, message, last, usage, done = completion.events(kept, ENDING).strip().split(b"\n\n")
    assert json.loads(role[6:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert json.loads(message[6:])["choices"][0]["delta"] == {"refusal": "no"}
    assert "system_fingerprint" not in json.loads(last[6:])
    assert json.loads(usage[6:])["choices"] == []
    assert done == b"data: [DONE]"


def test_the_cost_of_a_stream_stands_in_its_usage_where_it_is_told():
    assert Ending("c", {}, Usage(1, 1), 0.5).told_usage()["cost"] == 0.5
    assert "cost" not in Ending("c", {}, Usage(1, 1)).told_usage()
    assert completion.total([None, None]) is None
    assert completion.total([Usage(1, 2, 3), None, Usage(1, 1)]) == Usage(2, 3, 3)
