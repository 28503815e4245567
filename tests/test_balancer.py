"""Which endpoint gets the next request, and what it costs to hold one."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import Ask, Balancer, Board, Load, policies
from proxy.balancer.gauges import Gauges
from proxy.balancer.policies import least_loaded
from proxy.registry import Endpoint
from proxy.shared import Slot, Slots, shared_memory

ONES = [100.0, 100.0, 100.0]


def no_chance() -> float:
    return 0.0


def endpoints(count: int, **settings: object) -> list[Endpoint]:
    return [
        Endpoint(name=f"m/{i}", model="m", address="http://x", serves="m", **settings)  # type: ignore[arg-type]
        for i in range(count)
    ]


def balancer(count: int, policy: str = "predicted_ttft", board: Board | None = None) -> Balancer:
    names = {"m": [f"m/{i}" for i in range(count)]}
    tables = ["m"] if policy == "predicted_ttft" and count > 1 else []
    chance = random.Random(7).random
    return Balancer(names, {"m": policy}, board or Board(Slots.of(names, tables)), chance)  # type: ignore[dict-item]


def workers(count: int, endpoints: int) -> list[Balancer]:
    """Return the balancers of several workers that see each other's load."""
    names = {"m": [f"m/{i}" for i in range(endpoints)]}
    memory = shared_memory()
    boards = [Board(Slots.of(names, ["m"]), count, number, memory) for number in range(count)]
    os.close(memory)
    return [balancer(endpoints, board=board) for board in boards]


def ask(text: bytes) -> dict[str, bytes]:
    return {"messages": text}


class Traffic:
    """Requests that go through a balancer, at a time that only they move."""

    def __init__(self, *balancers: Balancer, count: int) -> None:
        self.balancers, self.candidates, self.now = balancers, endpoints(count), 0.0

    def send(self, text: bytes, worker: int = 0, *, streamed: bool = True):
        balancer = self.balancers[worker]
        picked = balancer.pick("m", self.candidates, balancer.prompt("m", ask(text)), self.now, streamed=streamed)
        assert picked
        return picked[0].name, picked[1]

    def finish(self, text: bytes, seconds: float = 0.1, worker: int = 0) -> str:
        name, lease = self.send(text, worker)
        self.now += seconds
        lease.token(self.now)
        lease.release(self.now)
        return name


# The policies


def test_the_endpoint_with_the_fewest_requests_in_flight_is_chosen():
    busy, idle = Load(), Load()
    busy.lease()
    assert least_loaded([busy, idle]) == 1


@pytest.mark.parametrize("policy", [policies.least_loaded, policies.round_robin])
def test_equals_take_turns(policy):
    loads = [Load(), Load(), Load()]
    chosen = []
    for number in range(1, 7):
        i = policy(loads)
        loads[i].lease(number=number).release()
        chosen.append(i)
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_round_robin_does_not_flood_an_endpoint_that_is_new():
    old, new = Load(), Load()
    for number in range(1, 100):
        old.lease(number=number).release()
    chosen = []
    for number in range(100, 104):
        chosen.append(policies.round_robin([old, new]))
        (old, new)[chosen[-1]].lease(number=number).release()
    assert chosen == [1, 0, 1, 0]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(any), st.floats(0, 1, exclude_max=True))
def test_weighted_random_never_takes_an_endpoint_of_weight_zero(weights, chance):
    assert weights[policies.weighted_random(weights, lambda: chance)] > 0


def test_weighted_random_follows_the_weights():
    chance = random.Random(1).random
    chosen = [policies.weighted_random([1.0, 3.0], chance) for _ in range(4000)]
    assert 0.72 < sum(chosen) / 4000 < 0.78


def test_adaptive_prefers_the_faster_of_two_that_are_equally_loaded():
    slow, fast = Load(), Load()
    slow.lease(now=0.0).release(2.0)
    fast.lease(now=0.0).release(1.0)
    assert policies.adaptive([slow, fast], 2.0) == 1


def test_adaptive_weighs_load_more_than_time():
    fast, slow = Load(), Load()
    fast.lease(now=0.0).release(1.0)
    slow.lease(now=0.0).release(1.5)
    fast.lease(now=2.0)
    assert policies.adaptive([fast, slow], 2.0) == 1


def test_adaptive_avoids_an_endpoint_that_fails_until_that_fades():
    failing, good = Load(), Load()
    failing.lease(now=0.0, number=1).release(1.0, failed=True)
    good.lease(now=0.0, number=2).release(1.0)
    assert policies.adaptive([failing, good], 1.0) == 1
    assert policies.adaptive([failing, good], 1000.0) == 0


def test_a_success_takes_back_half_of_a_failure():
    load = Load()
    load.lease(now=0.0).release(0.0, failed=True)
    load.lease(now=0.0).release(0.0)
    assert load.failures(0.0) == 1.0


def test_predicted_ttft_goes_where_the_prompt_is_cached():
    assert policies.predicted_ttft([Load(), Load(), Load()], [1000.0, 1.0, 1000.0], no_chance) == 1


def test_predicted_ttft_leaves_a_cache_whose_endpoint_has_too_much_to_do():
    busy, idle = Load(), Load()
    busy.lease(Ask(40000, 10000.0, 10000.0, True))
    assert policies.predicted_ttft([busy, idle], [1.0, 1000.0], no_chance) == 1


def test_predicted_ttft_gives_an_endpoint_at_half_speed_half_as_much():
    slow, fast = Load(), Load()
    slow.rate, fast.rate = 1000.0, 2000.0
    given_to = [0, 0]
    for _ in range(300):
        i = policies.predicted_ttft([slow, fast], [500.0, 500.0], no_chance)
        (slow, fast)[i].lease(Ask(2000, 500.0, 500.0, True))
        given_to[i] += 1
    assert 1.8 < given_to[1] / given_to[0] < 2.2


def test_predicted_ttft_avoids_an_engine_whose_cache_is_full_or_that_others_keep_busy():
    for figure, value in (("kv_usage", 1.0), ("foreign", 20.0), ("foreign_tokens", 5000.0)):
        told, idle = Load(), Load()
        told.weigh(**{figure: value})
        assert policies.predicted_ttft([told, idle], [100.0, 100.0], no_chance) == 1, figure


@given(st.data())
def test_every_policy_chooses_one_of_what_it_is_given(data):
    count = data.draw(st.integers(1, 6))
    loads = [Load() for _ in range(count)]
    for number, i in enumerate(data.draw(st.lists(st.integers(0, count - 1), max_size=20))):
        loads[i].lease(Ask(10, 3.0, data.draw(st.floats(0, 3)), True), float(number), number)
    uncached = [data.draw(st.floats(0, 1e7)) for _ in loads]
    chance = data.draw(st.floats(0, 1, exclude_max=True))
    for choice in (
        policies.round_robin(loads),
        policies.least_loaded(loads),
        policies.adaptive(loads, 30.0),
        policies.weighted_random([1.0] * count, lambda: chance),
        policies.predicted_ttft(loads, uncached, lambda: chance),
    ):
        assert 0 <= choice < count


# Leases


@given(st.lists(st.sampled_from(["take", "token", "release", "release again"]), max_size=50))
def test_what_is_under_way_is_what_is_held_however_often_a_lease_is_settled(steps):
    load, held, released, pending = Load(), [], [], 0
    for number, step in enumerate(steps):
        if step == "take":
            held.append(load.lease(Ask(400, 100.0, 100.0, True), float(number)))
        elif step == "token" and held:
            held[0].token(float(number))
        elif step == "release" and held:
            released.append(held.pop(0))
            released[-1].release(float(number))
        elif released:
            released[-1].release(float(number))
            released[-1].token(float(number))
        pending = sum(lease.pending for lease in held)
    assert load.in_flight == len(held)
    assert load.tokens == pending


def test_tokens_are_given_back_with_the_first_token_and_the_request_with_its_end():
    traffic = Traffic(balancer(2), count=2)
    _, lease = traffic.send(b"x" * 4000)
    loads = traffic.balancers[0].loads("m")
    assert sum(load.tokens for load in loads) == pytest.approx(1000)
    lease.token(1.0)
    assert sum(load.tokens for load in loads) == pytest.approx(0)
    assert sum(load.in_flight for load in loads) == 1


def test_an_answer_that_is_no_stream_gives_its_tokens_back_when_its_prompt_should_be_computed():
    traffic = Traffic(balancer(2), count=2)
    traffic.send(b"x" * 40000, streamed=False)
    traffic.now = 3600.0
    _, second = traffic.send(b"y" * 400)
    loads = traffic.balancers[0].loads("m")
    assert sum(load.tokens for load in loads) == pytest.approx(100)
    second.release(3600.0)


# What a balancer learns


def test_a_conversation_stays_where_it_is():
    traffic = Traffic(balancer(8), count=8)
    text = b"a conversation " * 200
    first = traffic.finish(text)
    for turn in range(10):
        text += b" and turn %d of it " % turn * 20
        assert traffic.finish(text) == first


def test_a_conversation_about_a_picture_is_cached_as_a_whole_and_no_more():
    traffic = Traffic(balancer(2), count=2)
    text = b'"data:image/png;base64,' + b"QUJD" * 100_000 + b'"' + b"what is this? " * 500
    traffic.finish(text)
    _, lease = traffic.send(text)
    assert 0 <= lease.pending < 0.2 * len(b"what is this? " * 500)


def test_prompts_that_are_all_new_go_everywhere():
    traffic = Traffic(balancer(4), count=4)
    under_way = [traffic.send(bytes([i]) * 4000)[0] for i in range(40)]
    assert [under_way.count(f"m/{i}") for i in range(4)] == [10, 10, 10, 10]


def test_a_prompt_that_everybody_shares_does_not_keep_all_requests_at_one_endpoint():
    traffic = Traffic(balancer(4), count=4)
    traffic.finish(b"a system prompt" * 500)
    used = {traffic.send(b"a system prompt" * 500 + b"question %d" % i * 40)[0] for i in range(200)}
    assert used == {"m/0", "m/1", "m/2", "m/3"}


def test_an_endpoint_that_is_half_as_fast_gets_less():
    traffic = Traffic(balancer(2), count=2)
    for i in range(0, 200, 8):
        done = {"m/0": traffic.now, "m/1": traffic.now}
        for name, lease in [traffic.send(b"%06d" % n * 1000) for n in range(i, i + 8)]:
            done[name] += 2.0 if name == "m/0" else 1.0
            lease.token(done[name])
            lease.release(done[name])
        traffic.now = max(done.values())
    names = [traffic.send(b"%06d" % i * 1000)[0] for i in range(1000, 1300)]
    assert 1.7 < names.count("m/1") / names.count("m/0") < 2.3


def test_an_endpoint_that_was_slow_once_is_tried_again():
    traffic = Traffic(balancer(2), count=2)
    name, lease = traffic.send(b"x" * 4000)
    traffic.now = 300.0
    lease.token(traffic.now)
    lease.release(traffic.now)
    traffic.now = 1500.0
    assert name in {traffic.send(b"%06d" % i * 1000)[0] for i in range(4)}


def test_an_endpoint_that_is_new_gets_requests_at_once():
    shared = balancer(3)
    traffic = Traffic(shared, count=3)
    traffic.candidates = endpoints(2)
    for i in range(50):
        traffic.send(b"%06d" % i * 1000)
    traffic.candidates = endpoints(3)
    assert [traffic.send(b"%06d" % i * 1000)[0] for i in range(1000, 1020)].count("m/2") == 20


def test_what_an_engine_does_not_find_in_its_cache_is_not_relied_on():
    traffic = Traffic(balancer(2), count=2)
    text = b"once more " * 2000
    for look in range(30):
        for _ in range(5):
            traffic.finish(text)
        for name in ("m/0", "m/1"):
            traffic.balancers[0].told("m", name, Gauges(0, 0, 0, 1e4 * (look + 1), 0, 0))
    traffic.now += 10.0
    _, lease = traffic.send(text)
    assert lease.pending > 0.9 * len(text) / 4


def test_a_model_with_one_endpoint_has_no_prompts_read():
    assert balancer(1).prompt("m", ask(b"x" * 1000)) is None


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "weighted_random", "adaptive"])
def test_policies_that_know_nothing_of_prompts_have_none_read(policy):
    b = balancer(3, policy)
    assert b.prompt("m", ask(b"x" * 1000)) is None
    assert {b.pick("m", endpoints(3), None, float(i))[0].name for i in range(60)} == {"m/0", "m/1", "m/2"}


# Limits


@pytest.mark.parametrize("policy", ["predicted_ttft", "round_robin", "adaptive"])
@pytest.mark.parametrize("count", [1, 2])
def test_no_endpoint_gets_more_than_it_may_have(policy, count):
    b, candidates = balancer(count, policy), endpoints(count, max_in_flight=2)
    prompt = b.prompt("m", ask(b"always the same " * 100))
    picked = [b.pick("m", candidates, prompt, 0.0) for _ in range(2 * count + 1)]
    assert picked.pop() is None
    names = [endpoint.name for endpoint, _ in picked]
    assert {name: names.count(name) for name in names} == {f"m/{i}": 2 for i in range(count)}
    picked[0][1].release(1.0)
    assert b.pick("m", candidates, prompt, 1.0)[0].name == picked[0][0].name


def test_without_candidates_nothing_is_picked():
    assert balancer(2).pick("m", [], None, 0.0) is None
    assert balancer(1).pick("m", [], None, 0.0) is None


# Several workers


def test_workers_do_not_herd_on_what_is_idle():
    traffic = Traffic(*workers(4, 4), count=4)
    names = [traffic.send(b"%06d" % i * 1000, worker=i % 4)[0] for i in range(40)]
    assert {name: names.count(name) for name in names} == {f"m/{i}": 10 for i in range(4)}


def test_a_conversation_stays_where_it_is_whichever_worker_it_comes_to():
    traffic = Traffic(*workers(4, 8), count=8)
    text = b"a conversation " * 200
    first = traffic.finish(text)
    for turn in range(12):
        text += b" and turn %d of it " % turn * 20
        assert traffic.finish(text, worker=turn % 4) == first


def test_a_limit_holds_for_all_workers_together():
    first, second = workers(2, 2)
    candidates = endpoints(2, max_in_flight=1)
    held = first.pick("m", candidates, None, 0.0)
    assert second.pick("m", candidates, None, 0.0)
    assert second.pick("m", candidates, None, 0.0) is None
    held[1].release(1.0)
    assert second.pick("m", candidates, None, 1.0)[0].name == held[0].name


def test_what_a_dead_worker_had_under_way_is_forgotten_by_its_replacement():
    names = {"m": ["m/0", "m/1"]}
    memory = shared_memory()
    try:
        boards = [Board(Slots.of(names, ["m"]), 2, number, memory) for number in (0, 1)]
        dead, other = (balancer(2, board=board) for board in boards)
        candidates = endpoints(2, max_in_flight=1)
        assert dead.pick("m", candidates, None, 0.0)
        assert dead.pick("m", candidates, None, 0.0)
        assert other.pick("m", candidates, None, 0.0) is None
        Board(Slots.of(names, ["m"]), 2, 0, memory)
        assert other.pick("m", candidates, None, 1.0)
    finally:
        os.close(memory)


def test_each_endpoint_with_a_choice_is_watched_by_one_worker():
    names = {"one": ["one/0"], "three": ["three/0", "three/1", "three/2"]}
    mine = [Board(Slots.of(names, ["three"]), 2, number).mine() for number in (0, 1)]
    assert mine == [{"three": ["three/0", "three/2"]}, {"three": ["three/1"]}]


# Another configuration


def test_leases_of_endpoints_that_stay_are_counted_where_they_are_now_and_given_back_there():
    board = Board(Slots.of({"m": ["m/0"]}, []))
    one = Balancer({"m": ["m/0"]}, {"m": "least_loaded"}, board)
    _, lease = one.pick("m", endpoints(1), None, 0.0)  # type: ignore[misc]
    grow(one, board, 2)
    assert [load.in_flight for load in one.loads("m")] == [1, 0]
    assert list(board.block("m").live_sums()[0]) == [1, 0]
    name, _ = one.pick("m", endpoints(2), None, 0.0)  # type: ignore[misc]
    assert name.name == "m/1"
    lease.release()
    assert list(board.block("m").live_sums()[0]) == [0, 1]


def test_what_was_learned_of_an_endpoint_that_stays_is_kept():
    board = Board(Slots.of({"m": ["m/0", "m/1"]}, ["m"]))
    one = Balancer({"m": ["m/0", "m/1"]}, {"m": "predicted_ttft"}, board)
    traffic = Traffic(one, count=2)
    _, lease = traffic.send(b"a" * 50_000)
    traffic.now = 5.0
    lease.token(5.0)
    lease.release(6.0)
    before = sum(map(sum, board.block("m").slow_sums()))
    grow(one, board, 3, given=board_slots(2, ["m"]))
    assert sum(map(sum, board.block("m").slow_sums())) == pytest.approx(before)


def test_an_endpoint_that_is_gone_is_not_chosen_by_a_request_that_still_knows_it():
    board = Board(Slots.of({"m": ["m/0", "m/1"]}, []))
    one = Balancer({"m": ["m/0", "m/1"]}, {"m": "least_loaded"}, board)
    grow(one, board, 1)
    assert one.pick("m", endpoints(2, max_in_flight=1)[1:], None, 0.0) is None


def test_requests_for_a_model_that_is_gone_can_still_be_sent():
    board = Board(Slots.of({"m": ["m/0"], "n": ["n/0"]}, []))
    one = Balancer({"m": ["m/0"], "n": ["n/0"]}, {"m": "least_loaded", "n": "least_loaded"}, board)
    board.follow(Slots.of({"n": ["n/0"]}, [], Slots.of({"m": ["m/0"], "n": ["n/0"]}, []).given))
    one.follow({"n": ["n/0"]}, {"n": "least_loaded"})
    _, lease = one.pick("m", endpoints(1), None, 0.0)  # type: ignore[misc]
    lease.release()


def board_slots(count: int, tables: list[str]) -> tuple[Slot, ...]:
    return Slots.of({"m": [f"m/{i}" for i in range(count)]}, tables).given


def grow(balancer: Balancer, board: Board, count: int, given: tuple[Slot, ...] = ()) -> tuple[Slot, ...]:
    """Have so many endpoints from now on; return all slots that there ever were."""
    names = {"m": [f"m/{i}" for i in range(count)]}
    slots = Slots.of(names, [], given or board_slots(1, []) + board_slots(2, []))
    board.follow(slots)
    balancer.follow(names, {"m": "least_loaded"})
    return slots.given


@given(st.lists(st.tuples(st.sampled_from(["pick", "release", "follow"]), st.integers(0, 3), st.integers(1, 3))))
def test_whatever_changes_what_is_under_way_is_counted_once_by_all_workers(steps: list[tuple[str, int, int]]):
    memory = shared_memory()
    given_slots = board_slots(2, [])
    boards = [Board(Slots.of({"m": ["m/0", "m/1"]}, []), 2, number, memory) for number in (0, 1)]
    os.close(memory)
    both = [Balancer({"m": ["m/0", "m/1"]}, {"m": "least_loaded"}, board) for board in boards]
    held, count = [], 2
    for what, which, size in steps:
        if what == "pick":
            picked = both[which % 2].pick("m", endpoints(count), None, 0.0)
            assert picked
            held.append((picked[0].name, picked[1]))
        elif what == "release" and held:
            held.pop(which % len(held))[1].release()
        elif what == "follow":
            count = size
            for one, board in zip(both, boards, strict=True):
                slots = grow(one, board, count, given_slots)
            given_slots = slots
        names = [name for name, _ in held]
        assert list(boards[0].block("m").live_sums()[0]) == [names.count(f"m/{i}") for i in range(count)]
