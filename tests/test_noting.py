"""What was found out of a model, in its configuration."""

from proxy.capabilities import Capabilities
from proxy.commands.noting import noted

ONE = Capabilities(context_length=4096, modalities=("text", "image"), continues=True, stream_usage=False)
TWO = Capabilities(context_length=8192, modalities=("text",), continues=False)


def test_what_was_found_of_each_endpoint_and_of_all_is_written():
    settings = {"kind": "advanced", "endpoints": [{"base_url": "http://a"}, {"base_url": "http://b"}]}
    written, lines = noted(settings, [ONE, TWO])
    assert written == {
        "kind": "advanced",
        "context": 4096,
        "modalities": ["text"],
        "endpoints": [
            {"base_url": "http://a", "continues": True, "stream_usage": False},
            {"base_url": "http://b", "continues": False},
        ],
    }
    assert lines == [
        "context: 4096", "modalities: [text]", "endpoints[0].continues: true", "endpoints[0].stream_usage: false",
        "endpoints[1].continues: false",
    ]  # fmt: skip


def test_what_is_configured_stays():
    settings = {
        "context": 1,
        "modalities": ["text"],
        "endpoints": [{"base_url": "x", "continues": False, "stream_usage": True}],
    }
    assert noted(settings, [ONE]) == (settings, [])


def test_of_an_engine_its_flags_tell_the_context():
    settings = {"engine": {"weights": "a/b"}}
    assert noted(settings, [ONE]) == ({**settings, "modalities": ["text", "image"]}, ["modalities: [text, image]"])


def test_what_is_unknown_is_not_written():
    settings = {"endpoints": [{"base_url": "x"}]}
    assert noted(settings, [Capabilities()]) == (settings, [])
