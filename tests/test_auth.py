"""Who may pass."""

import pytest

from proxy.auth import Keys
from proxy.config import ApiKey, Secret
from proxy.errors import WrongKey

KEYS = Keys([Secret("key-one"), Secret("key-two")])


@pytest.mark.parametrize(
    "header",
    [(b"authorization", b"Bearer key-one"), (b"authorization", b"bearer key-two"), (b"x-api-key", b"key-two")],
)
def test_each_key_passes_in_each_place_that_clients_put_it(header):
    KEYS.check(dict([(b"host", b"x"), header]))


@pytest.mark.parametrize(
    "value",
    [b"Bearer key-on", b"Bearer key-one2", b"Bearer", b"Bearer ", b"key-one", b"Basic key-one", b"", b"Bearer \x00",
     b"Bearer '\" OR 1=1", b"Bearer " + b"k" * 65536, "Bearer ключ".encode()],
)  # fmt: skip
def test_anything_else_is_refused_in_the_same_words(value):
    with pytest.raises(WrongKey) as caught:
        KEYS.check({b"authorization": value})
    assert caught.value.envelope() == WrongKey().envelope()


def test_no_key_at_all_is_refused():
    with pytest.raises(WrongKey):
        KEYS.check({})


def test_without_keys_everybody_passes():
    Keys([]).check({})


def test_each_key_has_a_salt_that_does_not_tell_it_and_is_the_same_in_every_worker():
    salts = [keys.check({b"x-api-key": key}).salt for keys in (KEYS, Keys([Secret("key-one"), Secret("key-two")]))
             for key in (b"key-one", b"key-two")]  # fmt: skip
    assert salts[:2] == salts[2:]
    assert len(set(salts)) == 2
    assert not any("key" in str(salt) for salt in salts)
    assert Keys([]).check({}).salt is None


def test_keys_do_not_show():
    assert "key-one" not in repr(KEYS) + repr(vars(KEYS))


def test_a_key_may_be_bound_to_some_models():
    keys = Keys([ApiKey("free"), ApiKey("bound", ("small",))])
    assert keys.check({b"x-api-key": b"free"}).models is None
    assert keys.check({b"x-api-key": b"bound"}).models == {"small"}
