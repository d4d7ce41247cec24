"""Adapters between disk, host and slots: budgets hold, nobody waits for ever, nothing in use is taken away."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.protocol import AdapterRef
from engine.residency import (
    DRAIN_AFTER_S,
    RETRY_FAILED_S,
    AdapterState,
    Copy,
    Drop,
    Evict,
    Fetch,
    Residency,
    Version,
)


def version(name: str, signature: int = 0) -> Version:
    return Version(AdapterRef(name, f"/adapters/{name}"), signature)


class World:
    """Performs the actions at once, and checks them against what is true."""

    def __init__(self, slots=2, host=100, device=100, sizes=None, broken=()):
        self.residency = Residency(slots, host, device)
        self.sizes = sizes or {}
        self.broken = set(broken)
        self.host: dict[Version, int] = {}
        self.slots: dict[int, Version] = {}
        self.log: list[str] = []

    def settle(self, now: float = 0.0, rounds: int = 50) -> None:
        for _ in range(rounds):
            actions = self.residency.actions(now)
            if not actions:
                return
            for action in actions:
                self.perform(action, now)
        raise AssertionError("the actions do not end")

    def perform(self, action, now: float) -> None:
        self.log.append(f"{type(action).__name__} {action.version.ref.name}")
        match action:
            case Fetch(version) if version.ref.name in self.broken:
                self.residency.failed(version, "it is broken", now)
            case Fetch(version):
                size = self.sizes.get(version.ref.name, 10)
                self.host[version] = size
                self.residency.fetched(version, f"digest of {version}", size, size, now)
            case Copy(version, slot):
                assert version in self.host, "copied from nothing"
                assert slot not in self.slots, "copied into a slot in use"
                self.slots[slot] = version
                self.residency.copied(version)
            case Evict(version, slot):
                assert self.slots.pop(slot) == version
            case Drop(version):
                self.host.pop(version, None)


def use(world: World, name: str, now: float) -> None:
    """One request, from arrival to end."""
    world.residency.want(version(name), now)
    world.settle(now)
    world.residency.admit(version(name), now)
    world.residency.release(version(name), now)


def test_a_wanted_adapter_is_fetched_copied_and_admitted():
    world, a = World(), version("a")
    world.residency.want(a, 0)
    assert not world.residency.ready(a)
    world.settle()
    assert world.log == ["Fetch a", "Copy a"]
    slot, digest = world.residency.admit(a, 0)
    assert world.slots[slot] == a and "a" in digest
    world.residency.want(a, 1)
    assert world.residency.ready(a), "the second request needs no I/O"


def test_the_least_recently_used_idle_adapter_makes_room():
    world = World()
    for now, name in enumerate("abac"):
        world.residency.want(version(name), now)
        world.settle(now)
        world.residency.admit(version(name), now)
        world.residency.release(version(name), now)
    assert set(world.residency.resident_names()) == {"a", "c"}
    assert "Evict b" in world.log


def test_an_adapter_in_use_is_never_evicted_and_the_other_waits():
    world = World(slots=1)
    world.residency.want(version("a"), 0)
    world.settle()
    world.residency.admit(version("a"), 0)
    world.residency.want(version("b"), 0)
    world.settle()
    assert world.residency.ready(version("a")) and not world.residency.ready(version("b"))
    world.residency.release(version("a"), 1)
    world.settle(1)
    assert world.residency.ready(version("b"))


def test_an_adapter_that_is_always_in_use_gives_way_after_a_while():
    world = World(slots=1)
    a, b = version("a"), version("b")
    world.residency.want(a, 0)
    world.settle()
    world.residency.admit(a, 0)
    world.residency.want(b, 0)
    world.settle(DRAIN_AFTER_S + 1)
    assert not world.residency.ready(a), "new requests for it wait"
    world.residency.want(a, 2)
    world.residency.release(a, 2)
    world.settle(3)
    assert world.residency.ready(b)
    world.residency.admit(b, 3)
    world.residency.release(b, 3)
    world.settle(4)
    assert world.residency.ready(a), "and it comes back"


def test_a_failure_is_told_and_tried_again_later():
    world, a = World(broken=["a"]), version("a")
    world.residency.want(a, 0)
    world.settle()
    assert world.residency.failure(a) == "it is broken"
    world.residency.cancel(a, 0)
    world.residency.want(a, 1)
    assert world.residency.failure(a) == "it is broken", "not read again at once"
    world.residency.cancel(a, 1)
    world.broken.clear()
    world.residency.want(a, RETRY_FAILED_S + 1)
    world.settle(RETRY_FAILED_S + 1)
    assert world.residency.ready(a)


def test_a_new_version_is_another_adapter_and_the_old_one_stays_for_its_users():
    world, old, new = World(), version("a", 1), version("a", 2)
    world.residency.want(old, 0)
    world.settle()
    slot, digest = world.residency.admit(old, 0)
    world.residency.want(new, 1)
    world.settle(1)
    other_slot, other_digest = world.residency.admit(new, 1)
    assert slot != other_slot and digest != other_digest
    assert world.slots[slot] == old


@pytest.mark.parametrize(("size", "key"), [(60, "adapter_device_mib"), (150, "adapter_host_mib")])
def test_an_adapter_beyond_the_budget_is_refused_by_name(size, key):
    world = World(host=100, device=50, sizes={"big": size})
    world.residency.want(version("big"), 0)
    world.settle()
    failure = world.residency.failure(version("big"))
    assert failure is not None and "'big'" in failure and key in failure
    assert not world.host


def test_waiting_adapters_beyond_the_host_budget_are_not_read_over_and_over():
    world = World(slots=1, host=25, device=10)
    world.residency.want(version("a"), 0)
    world.settle()
    world.residency.admit(version("a"), 0)
    for name in "bcdef":
        world.residency.want(version(name), 0)
    world.settle()
    assert world.log.count("Fetch f") <= 1
    for now, name in enumerate("abcdef"):
        if name != "a":
            world.settle(now)
            world.residency.admit(version(name), now)
        world.residency.release(version(name), now)
        world.settle(now)


def test_a_pinned_adapter_is_loaded_without_a_request_and_never_evicted():
    world, kept = World(), version("kept")
    world.residency.pin(kept, 0)
    world.settle()
    assert kept in world.slots.values() and world.residency.pinned(kept)
    for now, name in enumerate("abcab", 1):
        use(world, name, now)
        assert kept in world.slots.values(), f"evicted for {name}"
    world.residency.unpin(kept.ref)
    for now, name in enumerate("ab", 10):
        use(world, name, now)
    assert kept not in world.slots.values()


def test_a_newer_version_of_a_pinned_adapter_takes_its_place_once_it_is_wanted():
    world, old, new = World(), version("kept"), version("kept", signature=1)
    world.residency.pin(old, 0)
    world.settle()
    world.residency.want(new, 1)
    world.settle(1)
    assert world.residency.pinned(new) and not world.residency.pinned(old)
    world.residency.admit(new, 1)
    world.residency.release(new, 1)
    use(world, "a", 2)
    assert new in world.slots.values() and old not in world.slots.values()


def test_a_pin_is_known_by_its_place_however_the_place_is_written():
    world, kept = World(), version("kept")
    world.residency.pin(kept, 0)
    world.residency.unpin(AdapterRef("another name", "file:///adapters/kept/"))
    assert not world.residency.pinned(kept) and world.residency.num_pins == 0


def test_where_only_pinned_adapters_are_left_another_gets_the_reason():
    world, a = World(slots=1), version("a")
    world.residency.pin(version("kept"), 0)
    world.settle()
    world.residency.want(a, 1)
    world.settle(1)
    assert "pinned" in (world.residency.failure(a) or "")
    assert list(world.slots.values()) == [version("kept")] and a not in world.host


class Adapters(RuleBasedStateMachine):
    """Random requests over adapters of mixed sizes; time moves on; everybody is served in the end."""

    NAMES = "abcdefg"
    SIZES = {name: 5 + 6 * index for index, name in enumerate(NAMES)}

    def __init__(self):
        super().__init__()
        self.world = World(slots=3, host=90, device=70, sizes=self.SIZES)
        self.now = 0.0
        self.waiting: list[Version] = []
        self.using: list[Version] = []

    @rule(name=st.sampled_from(NAMES))
    def request(self, name):
        self.world.residency.want(version(name), self.now)
        self.waiting.append(version(name))

    @precondition(lambda self: self.using)
    @rule(data=st.data())
    def finish(self, data):
        done = data.draw(st.sampled_from(self.using))
        self.using.remove(done)
        self.world.residency.release(done, self.now)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data):
        gone = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(gone)
        self.world.residency.cancel(gone, self.now)

    @rule()
    def advance(self):
        self.now += 0.7
        self.world.settle(self.now)
        for wanted in list(self.waiting):
            if self.world.residency.ready(wanted):
                slot, _ = self.world.residency.admit(wanted, self.now)
                assert self.world.slots[slot] == wanted
                self.waiting.remove(wanted)
                self.using.append(wanted)

    @invariant()
    def within_the_budgets_and_users_keep_their_slot(self):
        slots, host = self.world.slots, self.world.host
        assert sum(self.SIZES[v.ref.name] for v in slots.values()) <= 70
        assert sum(host.values()) <= 90
        assert set(self.using) <= set(slots.values())

    def teardown(self):
        for _ in range(100):
            for done in self.using:
                self.world.residency.release(done, self.now)
            self.using.clear()
            self.advance()
        assert not self.waiting, "somebody waits for ever"
        assert self.world.residency.count(AdapterState.FETCHING) == 0


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
