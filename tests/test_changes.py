"""What differs between two configurations, and what a running server keeps as it was."""

import msgspec
import pytest

from proxy import changes
from proxy.config import Config, EndpointSettings, LedgerSettings, ModelSettings, Queue, Secret, Server
from proxy.limits import Limits


def model(url: str = "http://x/v1", **settings: object) -> ModelSettings:
    return ModelSettings(endpoints=(EndpointSettings(url, api_key=Secret("sk-sentinel")),), **settings)  # type: ignore[arg-type]


OLD = Config(models={"a": model(), "b": model()}, aliases={"x": "a"}, fallbacks={"a": ("b",)})


def test_entries_are_told_by_name_whether_they_came_went_or_changed():
    new = Config(models={"b": model("http://y/v1"), "c": model()}, aliases={"x": "b"}, limits=Limits(n=2))
    found = changes.between(OLD, new)
    assert found.added == ("models.c",)
    assert found.removed == ("models.a", "fallbacks.a")
    assert found.changed == ("limits.n", "models.b", "aliases.x")
    assert str(found) == "added model c; removed model a, fallbacks.a; changed limits.n, model b, alias x"


def test_no_value_is_told():
    new = Config(server=Server(api_keys=(Secret("sk-sentinel"),)), models={"a": model(queue=Queue(size=1))})
    assert "sentinel" not in repr(changes.between(OLD, new))


def test_nothing_is_told_where_nothing_changed():
    assert str(changes.between(OLD, OLD)) == "nothing changed"


@pytest.mark.parametrize(
    ("new", "name"),
    [
        (Config(server=Server(host="127.0.0.2")), "server.host"),
        (Config(server=Server(port=1)), "server.port"),
        (Config(server=Server(workers=7)), "server.workers"),
        (Config(ledger=LedgerSettings(journal_bytes=2**21)), "ledger"),
    ],
)
def test_what_cannot_change_in_a_running_server_stays_and_is_told_apart(new: Config, name: str):
    assert changes.between(Config(), new) == changes.Changes(restart=(name,))
    assert changes.pinned(new, Config()) == Config()
    assert str(changes.between(Config(), new)) == f"after a restart only: {name}"


def test_all_else_of_the_server_section_changes():
    new = Config(server=Server(port=1, start_wait=5.0, api_keys=(Secret("k"),)))
    found = changes.between(Config(), new)
    assert (found.changed, found.restart) == (("server.api_keys", "server.start_wait"), ("server.port",))
    assert changes.pinned(new, Config()).server == msgspec.structs.replace(new.server, port=8000)
