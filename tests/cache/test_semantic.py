"""Questions that mean the same: what is found, what is not, and what is told of it."""

import asyncio
import json

import pytest

from proxy.cache.likeness import Tally, alike
from proxy.cache.memory import MemoryStore
from proxy.cache.semantic import Semantic
from proxy.cache.settings import Semantic as Settings
from proxy.cache.vectors import MemoryVectors
from tests.cache.entries import entry, key
from tests.cache.test_vectors import ONE, OTHER, toward

MEANING = {
    "capital of France?": 0,
    "France's capital?": 10,
    "French capital city?": 40,
    "weather?": 90,
    "and now?": 180,
}


class Cache:
    """A semantic cache whose embedding model knows some questions, and the store behind it."""

    def __init__(self, **settings):
        self.store = MemoryStore(1024 * 1024)
        self.asked = []
        self.now = 1000.0
        given = Settings(**{"embeddings": "minilm", "threshold": 0.95, "timeout": 30, **settings})
        vectors = MemoryVectors(given.max_entries)
        self.semantic = Semantic(
            "gpt", given, vectors, self.embed, self.store, Tally(), clock=lambda: self.now, chance=lambda: 0.5
        )

    async def embed(self, text, key_id):
        self.asked.append(text)
        return toward(MEANING[text])

    async def ask(self, text, answer="Paris", partition=ONE):
        """Do as a request does: look, and have the answer generated if there is none. Return what it is told."""
        search = await self.semantic.find(text, partition, "somebody")
        if search.entry is not None:
            return search.entry.body
        made = chat(answer)
        self.store.put(key(text), made)
        await self.semantic.keep(search, key(text), made)
        return None


def chat(text):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return entry(json.dumps({"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]}))


def run(coroutine):
    return asyncio.run(coroutine)


def test_a_question_that_means_the_same_gets_the_answer():
    async def scenario():
        cache = Cache()
        assert await cache.ask("capital of France?") is None
        assert b"Paris" in await cache.ask("France's capital?")
        assert await cache.ask("weather?") is None
        assert await cache.ask("capital of France?", partition=OTHER) is None

    run(scenario())


@pytest.mark.parametrize(("threshold", "found"), [(0.98, True), (0.99, False)])
def test_the_threshold_is_a_cosine(threshold, found):
    async def scenario():
        cache = Cache(threshold=threshold)  # 10 degrees: .9848
        await cache.ask("capital of France?")
        assert (await cache.ask("France's capital?") is not None) == found

    run(scenario())


def test_an_answer_that_is_gone_is_not_found_again():
    async def scenario():
        cache = Cache()
        await cache.ask("capital of France?")
        cache.store.purge()
        assert await cache.ask("France's capital?") is None
        assert await cache.ask("capital of France?") is not None

    run(scenario())


def test_a_shadow_answers_nothing_and_tells_what_would_have_been():
    async def scenario():
        cache = Cache(shadow=True)
        await cache.ask("capital of France?", "It is Paris")
        assert await cache.ask("France's capital?", "It is Paris") is None
        assert await cache.ask("French capital city?", "It was Lyon") is None
        assert await cache.ask("and now?") is None
        report = cache.semantic.report()
        assert (report.shadow, report.threshold) == (True, 0.95)
        assert (report.questions, report.unanswered, report.hits) == (4, 0, 1)
        assert [(step.least, step.questions) for step in report.steps] == [(0.98, 1), (0.86, 1), (-1.0, 1)]
        assert [step.answers_alike for step in report.steps] == [1.0, pytest.approx(0.2), None]

    run(scenario())


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("Paris.", "paris", 1.0),
        ("", "", 1.0),
        ("Paris", "", 0.0),
        ("It is Paris", "It is Lyon", 0.5),
        ("Москва", "москва!", 1),
    ],
)
def test_answers_are_alike_by_their_words(one, other, share):
    assert alike(one, other) == share


def test_an_embedding_that_fails_is_a_miss_and_soon_not_asked_for(caplog):
    async def scenario():
        cache = Cache()
        await cache.ask("capital of France?")
        for _ in range(10):
            assert await cache.ask("of what it knows nothing") is None
        assert len(cache.asked) == 4, "after three failures in a row it is left alone"
        assert cache.semantic.report().unanswered == 10
        cache.now += 60
        assert await cache.ask("France's capital?") is not None
        assert await cache.ask("capital of France?") is not None

    run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "the semantic cache of gpt fails (KeyError); questions are not compared",
        "the semantic cache of gpt works again",
    ]


def test_an_embedding_that_takes_too_long_is_a_miss():
    async def scenario():
        cache = Cache(timeout=0.01)
        never = asyncio.get_running_loop().create_future()
        cache.semantic._embed = lambda text, key_id: never
        assert await cache.ask("capital of France?") is None
        assert cache.semantic.report().unanswered == 1

    run(scenario())
