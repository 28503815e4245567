"""The name that a client asked for, in the events of a stream."""

import json

from hypothesis import given
from hypothesis import strategies as st

from proxy import sse, wire
from proxy.renaming import EventRenamer

CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "theirs"}
DELTAS = st.sampled_from(["hello", "\n\n", '"model":"theirs"', 'data: {"id":"chatcmpl-1"', "{", "}", "naïve ✓"])


def event(content, **fields):
    return b"data: " + json.dumps({**CHUNK, **fields, "choices": [{"delta": {"content": content}}]}).encode() + b"\n\n"


EVENTS = st.one_of(
    st.builds(event, DELTAS),
    st.builds(event, DELTAS, id=st.sampled_from(["other", '{"model":"x"}'])),
    st.builds(event, DELTAS, extra=st.just({"model": "theirs"})),
    st.builds(event, DELTAS, response=st.just({"model": "theirs"}), model=st.none()),
    st.sampled_from(
        [
            b"data: [DONE]\n\n",
            b": data: " + json.dumps(CHUNK).encode() + b"\n\n",
            b'data: {"a":{"model":"theirs"},"model":"theirs"}\r\n\r\n',
            b'data:{"model":"theirs","x":{},"model":"theirs"}\n\n',
            b'data: {"id": "model", "model" : "theirs"}\n\n',
            b'data: {"list":["model"],"model":"theirs"}\n\n',
            b'event: message_start\ndata: {"type":"message_start","message":{"model":"theirs"}}\n\n',
            b"data: not json {\n\n",
        ]
    ),
)


def one_by_one(events, name):
    return b"".join(sse.map_data(e, lambda document: wire.set_model(document, name)) for e in events)


@given(st.lists(st.lists(EVENTS, max_size=6), max_size=6), st.sampled_from(["ours", "theirs", 'a "quoted" näme']))
def test_events_renamed_together_are_those_renamed_one_by_one(pieces, name):
    rename = EventRenamer(name)
    for events in pieces:
        assert rename(b"".join(events)) == one_by_one(events, name)


def test_every_event_of_an_ordinary_stream_gets_the_name():
    rename = EventRenamer("ours")
    passed = b"".join(rename(event(word) * 3) for word in ("one", "two", '"model":"theirs"'))
    assert {json.loads(sse.data_of(e))["model"] for e in sse.Events().feed(passed)} == {"ours"}
