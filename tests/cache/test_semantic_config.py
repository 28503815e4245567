"""What a configuration may say of comparing questions, and what is told of mistakes in it."""

import pytest

from proxy import config
from proxy.cache.settings import Embeddings
from proxy.errors import ConfigError
from proxy.secret import Secret

TEXT = """\
models:
  m: {endpoints: [{base_url: "http://127.0.0.1:1/v1"}]}
aliases: {bot: m}
cache:
  models:
    bot:
      semantic: %s
"""


def load(tmp_path, semantic, **environ):
    file = tmp_path / "polyvox.yaml"
    file.write_text(TEXT % semantic)
    return config.load(file, environ)


@pytest.mark.parametrize(
    ("semantic", "said"),
    [
        ("{embeddings: nix}", "semantic.embeddings: there is no model 'nix'"),
        ("{threshold: 0.9}", "semantic: object missing required field `embeddings`"),
        ("{embeddings: m, threshold: 1.5}", "semantic.threshold: expected `float` <= 1.0"),
        ("{embeddings: m, shadw: true}", "semantic.shadw: unknown key 'shadw'; did you mean 'shadow'?"),
        ("{embeddings: m, vectors: disk}", "semantic.vectors: 'disk' is none of memory, redis"),
        ("{embeddings: m, vectors: redis}", "semantic.vectors: they are kept in the cache's Redis"),
        ("{embeddings: {url: 'ftp://x', model: y}}", "semantic.embeddings.url: expected http://HOST[:PORT]/PATH"),
        ("{embeddings: {url: 'http://x', mode: y}}", "semantic.embeddings.mode: unknown key 'mode'"),
    ],
)
def test_a_mistake_is_refused_with_line_and_key(tmp_path, semantic, said):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, semantic)
    assert f"yaml:7: cache.models.bot.{said}" in str(caught.value)


def test_a_server_elsewhere_has_a_key_that_is_never_shown(tmp_path):
    loaded = load(tmp_path, "{embeddings: {url: 'http://x/v1', model: y, api_key: 'sk-sentinel'}, shadow: true}")
    (semantic,) = loaded.config.cache_settings().semantics().values()
    assert semantic.embeddings == Embeddings("http://x/v1", "y", Secret("sk-sentinel"))
    assert semantic.shadow
    assert "sentinel" not in repr(loaded.config) + loaded.redact("sk-sentinel")
    assert config.decode(config.encode(loaded.config)) == loaded.config
