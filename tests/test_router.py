"""Which models a plan has, in what order, and why not the others."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cost import Price
from proxy.naming import PREFERENCES
from proxy.routing import router
from proxy.routing.features import Features
from proxy.routing.router import Candidate
from proxy.routing.rules import WEIGHTS, Rule, Weights
from proxy.routing.traits import Traits

NOON = datetime(2026, 11, 21, 12, 30, tzinfo=UTC)  # a Saturday
CHEAP = Candidate("cheap", Traits(kind="fast_cheap"), price=Price(0.1, 0.4), speed=9.0)
MIDDLE = Candidate("middle", Traits(kind="balanced"), price=Price(1.0, 4.0), speed=6.0)
STRONG = Candidate("strong", Traits(kind="advanced", quality_score=9.5), price=Price(5.0, 20.0), speed=3.0)
EVERY = (STRONG, MIDDLE, CHEAP)


ANYTHING = Features()


def plan(features=ANYTHING, candidates=EVERY, prefer=None, rules=(), weights=WEIGHTS, now=NOON):
    return router.plan(features, candidates, prefer, rules, weights, now)


def change(candidate, **traits):
    return Candidate(
        **{
            **{f: getattr(candidate, f) for f in Candidate.__struct_fields__},
            **{f: traits.pop(f) for f in list(traits) if f in Candidate.__struct_fields__},
            "traits": Traits(**{f: traits.get(f, getattr(candidate.traits, f)) for f in Traits.__struct_fields__}),
        }
    )


@pytest.mark.parametrize(
    ("features", "first"),
    [
        (Features(level="simple", budget_limit=1.0), "cheap"),
        (Features(level="simple"), "middle"),
        (Features(level="medium"), "middle"),
        (Features(level="medium", budget_limit=1.0), "middle"),
        (Features(level="complex"), "strong"),
        (Features(level="complex", budget_limit=1.0), "strong"),
    ],
)
def test_simple_and_budgeted_gets_the_cheapest_complex_an_advanced_and_the_rest_a_balanced_model(features, first):
    assert plan(features).models[0] == first


@pytest.mark.parametrize(
    ("prefer", "first"), [("cost", "cheap"), ("quality", "strong"), ("speed", "cheap"), ("order", "strong")]
)
def test_the_name_that_is_asked_for_says_what_is_preferred(prefer, first):
    assert plan(prefer=prefer).models[0] == first
    assert plan(prefer=prefer).wanted is None


def test_what_a_request_prefers_itself_counts_for_more_than_its_name_and_that_for_more_than_a_rule():
    rule = Rule(prefer="order")
    assert plan(rules=(rule,)).prefer == "order"
    assert plan(prefer="cost", rules=(rule,)).prefer == "cost"
    assert plan(Features(prefer="quality"), prefer="cost", rules=(rule,)).prefer == "quality"


@pytest.mark.parametrize(("level", "first"), [("simple", "cheap"), ("medium", "strong"), ("complex", "strong")])
def test_without_a_balanced_model_what_is_simple_gets_the_lesser_one(level, first):
    assert plan(Features(level=level), (STRONG, CHEAP)).models[0] == first


def test_of_several_that_are_good_enough_the_cheapest_answers():
    dear, fair = change(STRONG, name="dear", price=Price(50, 200)), change(STRONG, name="fair")
    assert plan(Features(level="complex"), (dear, fair)).models == ["fair", "dear"]


@pytest.mark.parametrize("level", ["simple", "medium", "complex"])
def test_a_specialist_in_the_task_goes_before_others_of_its_kind(level):
    expert = Candidate("expert", Traits(kind="specialized", tasks=("legal",)), price=Price(5.0, 20.0))
    assert plan(Features(task="legal", level=level), (*EVERY, expert)).models[0] == "expert"


def test_nobody_is_a_specialist_in_what_is_general():
    either = change(STRONG, name="either", tasks=("general", "legal"))
    assert plan(candidates=(either, MIDDLE)).models == ["middle", "either"]
    assert plan(Features(task="legal"), (MIDDLE, either)).models == ["either", "middle"]


LACKS = [
    (Features(modalities=frozenset(("text", "image"))), {}, "modalities: it takes no image"),
    (Features(task="code"), {"tasks": ("legal", "medical")}, "task: it is for legal, medical only, not code"),
    (Features(languages=frozenset(("ja",))), {"languages": ("en", "ru")}, "languages: it has no ja, only en, ru"),
    (Features(needs=("tools",)), {"able": {"tools": False}}, "tools: its server does not do it"),
    (Features(needs=("json_schema",)), {"able": {"json_schema": False}}, "json_schema: its server does not do it"),
    (Features(needs=("logprobs",)), {"able": {"logprobs": False}}, "logprobs: its server does not do it"),
    (Features(region="eu"), {"region": "us"}, "region: it is in us, not eu"),
    (Features(region="eu"), {}, "region: nobody says where it runs"),
    (Features(speed=7.0), {"speed_score": 6.0}, "speed: its score is 6, not 7"),
    (Features(speed=7.0), {"speed": None}, "speed: not known yet"),
    (Features(quality=8.0), {"quality_score": 7.5}, "quality: its score is 7.5, not 8"),
    (Features(tokens=900.0, max_tokens=200), {"context": 1024}, "context: 1100 tokens are needed (about 900"),
    (Features(tokens=900.0), {"context": 1024}, "context: 1156 tokens are needed"),
    (Features(tokens=600.0, max_tokens=100), {"context": 1024, "tokens_each": 2.0}, "context: 1300 tokens are needed"),
    (Features(context=2000), {"context": 1024}, "context: 2000 tokens are needed"),
    (Features(max_tokens=4096), {"context": 1024}, "max_tokens: 4096 are more than its context of 1024"),
    (Features(budget_limit=0.001), {"price": Price(10, 100)}, "budget_limit: it costs about 0.05 USD, not 0.001"),
    (Features(budget_limit=100.0), {"price": None}, "budget_limit: nobody knows what it costs"),
    (Features(), {"refusal": "priority: not taken"}, "priority: not taken"),
]


@pytest.mark.parametrize(("features", "lacking", "said"), LACKS)
def test_a_model_that_lacks_what_is_needed_is_dropped_with_the_reason(features, lacking, said):
    able = Candidate("able", Traits(region="eu", speed_score=10, quality_score=10), None, frozenset(("text", "image")),
                     price=Price(0, 0))  # fmt: skip
    made = plan(features, (change(MIDDLE, **lacking), able))
    assert made.models == ["able"]
    assert made.failures[0].startswith(f"middle: {said}")


@pytest.mark.parametrize(
    ("features", "known"),
    [
        (Features(needs=("tools", "logprobs")), {"able": {"tools": None}}),
        (Features(needs=("tools",)), {"able": {}}),
        (Features(languages=frozenset(("ja",))), {"languages": ()}),
        (Features(tokens=1e6), {"context": None}),
        (Features(tokens=400.0), {"context": 1024}),
        (Features(task="embeddings"), {"tasks": ("embeddings",)}),
    ],
)
def test_what_is_not_known_of_a_model_is_not_held_against_it(features, known):
    assert plan(features, (change(MIDDLE, **known),)).models == ["middle"]


def test_a_model_of_unknown_price_is_never_taken_to_be_cheap():
    unknown = change(CHEAP, name="unknown", price=None)
    assert plan(prefer="cost", candidates=(unknown, *EVERY)).models[-1] == "unknown"


def test_what_costs_nothing_is_the_cheapest():
    free = change(STRONG, name="free", price=Price(0, 0))
    assert plan(prefer="cost", candidates=(CHEAP, free)).models == ["free", "cheap"]


def test_models_that_cannot_be_asked_now_go_last_and_stay():
    down, starting = change(MIDDLE, name="down", health="down"), change(MIDDLE, name="starting", health="starting")
    assert plan(candidates=(down, starting, STRONG)).models == ["strong", "starting", "down"]


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        (Rule(hours="12-13", prefer="cost"), True),
        (Rule(hours="9:00-12:30", prefer="cost"), False),
        (Rule(hours="12:30-12:31", prefer="cost"), True),
        (Rule(hours="22-6", prefer="cost"), False),
        (Rule(hours="22-13", prefer="cost"), True),
        (Rule(hours="22-24", prefer="cost"), False),
        (Rule(hours="22-6", zone="America/Los_Angeles", prefer="cost"), True),  # 04:30 there
        (Rule(weekdays=("sat", "sun"), prefer="cost"), True),
        (Rule(weekdays=("mon",), prefer="cost"), False),
        (Rule(weekdays=("sun",), hours="1-2", zone="Pacific/Auckland", prefer="cost"), True),  # 01:30 on Sunday there
        (Rule(region="eu", prefer="cost"), True),
        (Rule(region="us", prefer="cost"), False),
        (Rule(task="code", prefer="cost"), False),
        (Rule(task="general", prefer="cost"), True),
    ],
)
def test_a_rule_holds_at_its_hours_days_and_places(rule, holds):
    somewhere = [change(c, region="eu") for c in EVERY]
    assert plan(Features(region="eu"), somewhere, rules=(rule,)).prefer == ("cost" if holds else "balanced")


def test_a_rule_keeps_models_back():
    made = plan(rules=(Rule(only=("cheap", "strong")), Rule(never=("cheap",))))
    assert made.models == ["strong"]
    assert made.failures == ["middle: rules: one that holds now keeps it back",
                             "cheap: rules: one that holds now keeps it back"]  # fmt: skip


def test_nothing_that_suits_is_a_plan_without_models():
    made = plan(Features(region="mars"))
    assert made.models == []
    assert len(made.failures) == 3
    assert "none of the candidates can serve it" in made.reason


# Properties

prices = st.none() | st.builds(Price, st.floats(0, 100), st.floats(0, 100))
kinds = st.sampled_from(["fast_cheap", "balanced", "advanced", "specialized"])
some_tasks = st.lists(st.sampled_from(["general", "code", "legal"]), max_size=2, unique=True).map(tuple)
traits = st.builds(
    Traits, kind=kinds, tasks=some_tasks, languages=st.sampled_from([(), ("en",), ("ru", "en")]),
    quality_score=st.none() | st.floats(0, 10), speed_score=st.none() | st.floats(0, 10),
    region=st.sampled_from([None, "eu", "us"]),
)  # fmt: skip
candidates = st.lists(
    st.builds(
        Candidate, name=st.text("abcdef", min_size=1, max_size=3), traits=traits,
        context=st.none() | st.integers(256, 8192), price=prices,
        modalities=st.sampled_from([frozenset(("text",)), frozenset(("text", "image"))]),
        able=st.dictionaries(st.sampled_from(["tools", "logprobs"]), st.none() | st.booleans()),
        health=st.sampled_from(["ready", "starting", "down"]),
    ),
    max_size=6, unique_by=lambda c: c.name,
)  # fmt: skip
wanted = st.builds(
    Features, task=st.sampled_from(["general", "code", "legal"]),
    level=st.sampled_from(["simple", "medium", "complex"]),
    tokens=st.floats(0, 4000), max_tokens=st.none() | st.integers(1, 9000),
    modalities=st.sampled_from([frozenset(("text",)), frozenset(("text", "image"))]),
    languages=st.sampled_from([frozenset(), frozenset(("ru",))]),
    needs=st.sampled_from([(), ("tools",), ("logprobs",)]),
    region=st.sampled_from([None, "eu"]), budget_limit=st.none() | st.floats(0, 1),
    speed=st.none() | st.floats(0, 10), quality=st.none() | st.floats(0, 10),
)  # fmt: skip
preferences = st.none() | st.sampled_from(PREFERENCES)


def meets(f: Features, c: Candidate) -> bool:
    """All hard requirements in other words than the router's."""
    room = c.context is None or f.tokens + (f.max_tokens or 0) <= c.context + 0.5
    spoken = not c.traits.languages or set(f.languages) <= set(c.traits.languages)
    fast = f.speed is None or (c.traits.speed_score is not None and c.traits.speed_score >= f.speed)
    return (
        room and spoken and fast and f.modalities <= c.modalities
        and (not c.traits.tasks or f.task in c.traits.tasks)
        and all(c.able.get(need) is not False for need in f.needs)
        and (f.region is None or c.traits.region == f.region)
        and (f.budget_limit is None or c.price is not None)
    )  # fmt: skip


@given(wanted, candidates, preferences)
def test_a_model_that_misses_a_hard_requirement_is_never_chosen(features, offered, prefer):
    by_name = {c.name: c for c in offered}
    made = plan(features, offered, prefer)
    assert all(meets(features, by_name[name]) for name in made.models)
    assert {option.model for option in made.options} == by_name.keys()
    assert all((option.dropped is None) == (option.score is not None) for option in made.options)


@given(wanted, candidates, preferences)
def test_a_plan_is_the_same_each_time_and_those_that_can_be_asked_come_first(features, offered, prefer):
    made = plan(features, offered, prefer)
    assert made == plan(features, offered, prefer)
    healths = [router.HEALTHS.index(option.health) for option in made.options if option.dropped is None]
    assert healths == sorted(healths)
    assert all(0 <= option.score <= 1 for option in made.options if option.score is not None)


@given(wanted, candidates, preferences, st.randoms())
def test_the_order_of_candidates_decides_between_equals_only(features, offered, prefer, chance):
    shuffled = list(offered)
    chance.shuffle(shuffled)
    scores = {o.model: (o.dropped, o.score) for o in plan(features, offered, prefer).options}
    assert scores == {o.model: (o.dropped, o.score) for o in plan(features, shuffled, prefer).options}


@pytest.mark.parametrize(
    ("weight", "part"),
    [
        ("cost", lambda c, usd, best: 0.0 if usd is None else best / usd if usd else 1.0),
        ("quality", lambda c, usd, best: router._known_quality(c)),
    ],
)
@given(offered=candidates, low=st.floats(0, 5), more=st.floats(0.01, 50))
def test_a_greater_weight_never_makes_the_choice_worse_by_it(weight, part, offered, low, more):
    offered = [change(c, health="ready") for c in offered]
    base = {"kind": 1.0, "task": 0.5, "quality": 0.4, "cost": 0.3, "speed": 0.1}
    found = []
    for value in (low, low + more):
        made = plan(candidates=offered, weights={**WEIGHTS, "balanced": Weights(**{**base, weight: value})})
        if not made.models:
            return
        first = made.options[0]
        best = min((o.usd for o in made.options if o.usd is not None and o.dropped is None), default=0.0)
        found.append(part(next(c for c in offered if c.name == first.model), first.usd, best))
    assert found[1] >= found[0] - 1e-4


times = st.integers(0, 24 * 60 - 1)


@given(times, times, times)
def test_of_a_span_of_hours_and_the_one_that_begins_where_it_ends_one_holds(start, end, minute):
    if start == end:
        return
    now = NOON.replace(hour=minute // 60, minute=minute % 60)
    spans = [f"{a // 60}:{a % 60:02}-{b // 60}:{b % 60:02}" for a, b in ((start, end), (end, start))]
    assert [Rule(hours=span).holds(now, None, "general") for span in spans].count(True) == 1
