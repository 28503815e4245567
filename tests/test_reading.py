"""What is read of a text to judge it."""

import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from proxy.routing import reading

TEXT = st.text(st.characters(), max_size=300)  # lone surrogates too
SIZE = st.integers(1, 50)


def size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


@given(TEXT, SIZE, SIZE)
@example("яя", 1, 1)
def test_no_more_is_read_than_is_wanted_of_either_end(text, head, tail):
    read = reading.ends(text, head, tail)
    if size(text) <= head + tail:
        assert read == text
    else:
        assert size(read) <= head + 1 + tail


@given(st.text(st.sampled_from("aя語😀 "), min_size=200, max_size=300), SIZE, SIZE)
def test_what_is_read_of_a_long_text_is_its_start_and_its_end(text, head, tail):
    first, _, last = reading.ends(text, head, tail).partition("\n")
    assert text.startswith(first)
    assert text.endswith(last)
    assert size(first) > head - 4
    assert size(last) > tail - 4


def test_of_a_script_with_larger_letters_fewer_are_read():
    assert len(reading.ends("x" * 1000, 60, 30)) == 91
    assert len(reading.ends("я" * 1000, 60, 30)) == 46
    assert len(reading.ends("語" * 1000, 60, 30)) == 31


@given(TEXT)
def test_a_text_is_made_plain_as_unicode_says(text):
    text = "".join(letter for letter in text if len(unicodedata.normalize("NFKC", letter)) < 4)
    assert reading.plain(text) == unicodedata.normalize("NFKC", text).lower()


def test_words_that_are_one_sign_are_passed_over():
    assert reading.plain("a㌀ﷺﷲＢ") == "a   b"
