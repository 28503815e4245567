"""Which endpoint gets the next request, and what it costs to hold one."""

from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import Load
from proxy.balancer.policies import least_loaded


def test_the_endpoint_with_the_fewest_requests_in_flight_is_chosen():
    busy, idle = Load(), Load()
    busy.lease()
    assert least_loaded([busy, idle]) == 1


def test_equals_take_turns():
    loads = [Load(), Load(), Load()]
    chosen = []
    for _ in range(6):
        i = least_loaded(loads)
        loads[i].lease().release()
        chosen.append(i)
    assert sorted(chosen[:3]) == sorted(chosen[3:]) == [0, 1, 2]


@given(st.lists(st.sampled_from(["take", "release", "release again"]), max_size=50))
def test_in_flight_is_what_is_held_however_often_a_lease_is_released(steps):
    load, held, released = Load(), [], []
    for step in steps:
        if step == "take":
            held.append(load.lease())
        elif step == "release" and held:
            released.append(held.pop())
            released[-1].release()
        elif released:
            released[-1].release()
    assert load.in_flight == len(held)
