"""Who keeps a place in a full queue."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.admission import make_room
from engine.protocol import AdapterRef, Generate, SamplingParams
from engine.sequence import Sequence


def request(adapter: str = "a", length: int = 10, priority: int = 0, tenant: str = "") -> Generate:
    ref = AdapterRef(adapter, adapter)
    return Generate("r", [1] * length, SamplingParams(5), ref, priority=priority, tenant=tenant)


def queue(*requests: Generate) -> list[Sequence]:
    return [Sequence(key=key, request=each, arrival_s=0.0) for key, each in enumerate(requests)]


def test_with_room_nobody_is_refused():
    assert make_room(request(), queue(request(), request()), 3, 30) == []


def test_a_lone_request_is_never_too_large():
    assert make_room(request(length=500), [], 1, 10) == []


def test_the_latest_of_a_flood_gives_up_its_place_to_another_adapter_or_tenant():
    flood = queue(*[request("a")] * 4)
    assert make_room(request("b"), flood, 4, 1000) == [flood[-1]]
    assert make_room(request("a", tenant="other"), flood, 4, 1000) == [flood[-1]]
    assert make_room(request("a"), flood, 4, 1000) is None


def test_flows_that_hold_as_much_as_each_other_refuse_the_newcomer():
    even = queue(request("a"), request("b"), request("a"), request("b"))
    assert make_room(request("a"), even, 4, 1000) is None
    assert make_room(request("c"), even, 4, 1000) == [even[-1]]


def test_a_full_queue_of_tokens_is_shared_by_tokens():
    small = queue(*[request("a", 10) for _ in range(10)])
    assert make_room(request("b", 20), small, 100, 100) == [small[9], small[8]]
    assert make_room(request("b", 90), small, 100, 100) is None, "it would hold more than the rest"


def test_a_better_priority_takes_the_place_of_the_worst():
    waiting = queue(request(priority=1), request(priority=2), request(priority=0))
    assert make_room(request(priority=0), waiting, 3, 1000) == [waiting[1]]
    assert make_room(request(priority=2), waiting, 3, 1000) is None


def test_who_has_tokens_already_keeps_the_place():
    waiting = queue(request("a"), request("a"), request("a"))
    waiting[2].token_ids.append(7)
    assert make_room(request("b"), waiting, 3, 1000) == [waiting[1]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.integers(0, 1)), min_size=1, max_size=40
    ),
    st.integers(1, 6),
    st.integers(20, 100),
)
def test_the_bounds_hold_and_nobody_gives_way_to_the_worse(arrivals, max_requests, max_tokens):
    waiting: list[Sequence] = []
    for key, (adapter, length, priority) in enumerate(arrivals):
        newcomer = request(adapter, length, priority)
        refused = make_room(newcomer, waiting, max_requests, max_tokens)
        if refused is None:
            continue
        assert all(sequence.request.priority >= priority for sequence in refused)
        waiting = [sequence for sequence in waiting if sequence not in refused]
        waiting.append(Sequence(key=key, request=newcomer, arrival_s=0.0))
        assert len(waiting) <= max_requests
        assert len(waiting) == 1 or sum(s.num_prompt_tokens for s in waiting) <= max_tokens


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("aaaaabc"), min_size=1, max_size=40), st.integers(3, 8))
def test_a_flow_keeps_its_share_of_a_full_queue(arrivals, places):
    waiting: list[Sequence] = []
    for key, adapter in enumerate(arrivals):
        refused = make_room(newcomer := request(adapter), waiting, places, 10_000)
        if refused is not None:
            waiting = [sequence for sequence in waiting if sequence not in refused]
            waiting.append(Sequence(key=key, request=newcomer, arrival_s=0.0))
    for adapter in "abc":
        held = sum(s.request.adapter.name == adapter for s in waiting if s.request.adapter)
        assert held >= min(arrivals.count(adapter), places // 3)
