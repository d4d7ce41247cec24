"""Which adapters are where: disk, host memory, device slots. Pure; every state transition of an adapter is in this file.

    (absent) --want--> WANTED --host room--> FETCHING --fetched--> ON_HOST --slot--> COPYING --copied--> RESIDENT
    RESIDENT --evicted--> ON_HOST, or without a host copy: (absent), or WANTED if somebody waits
    ON_HOST --host copy dropped--> (absent)
    FETCHING, COPYING --failed--> FAILED --after a while--> (absent)

A pinned adapter counts as awaited until it is resident, and is then never evicted.

Methods change the books and return nothing; the I/O to do comes out of `actions()`. The caller performs it (files on a
loader thread, slots between steps) and reports back with `fetched`, `copied` or `failed`. An adapter is known by its
`Version`: where it lives and what its files looked like, so a re-published directory is a new adapter, and sequences
already running finish on the old one.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import Enum, auto

from engine.protocol import AdapterRef

RETRY_FAILED_S = 5.0
"""A failed adapter is tried again for requests that come this much later."""
DRAIN_AFTER_S = 1.0
"""An adapter that has waited this long for a slot stops new requests on the least recently used resident one."""


class AdapterState(Enum):
    WANTED = auto()
    FETCHING = auto()
    ON_HOST = auto()
    COPYING = auto()
    RESIDENT = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """One adapter as it was when a request asked for it. One place under two names is one adapter."""

    ref: AdapterRef
    signature: Hashable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> Hashable:
        return _place(self.ref), self.signature


def _place(ref: AdapterRef) -> Hashable:
    return (
        ref.uri.removeprefix("file://").rstrip("/"),
        ref.sha256,
        tuple((_place(part.ref), part.weight) for part in ref.parts),
    )


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read and check the adapter's files (slow; report `fetched` or `failed`)."""

    version: Version


@dataclass(frozen=True, slots=True)
class Copy:
    """Bring the host copy into device form for `slot` (slow; install it, then report `copied`, or `failed`)."""

    version: Version
    slot: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Empty the slot (at once)."""

    version: Version
    slot: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the host copy (at once)."""

    version: Version


Action = Fetch | Copy | Evict | Drop


@dataclass(slots=True)
class Entry:
    """What is known of one version. `waiting` requests wait for it, `users` sequences run with it."""

    state: AdapterState
    waiting: int = 0
    users: int = 0
    digest: str = ""
    rank: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    slot: int | None = None
    held_on_host: bool = False
    draining: bool = False
    reason: str = ""
    wanted_s: float = 0.0
    """Since when somebody waits for it."""
    used_s: float = 0.0
    """When it was last asked for or released."""


class Residency:
    """The books of every adapter in use, within the budgets (bytes) and the number of slots."""

    def __init__(self, slots: int, host_bytes: int, device_bytes: int, loaders: int = 1) -> None:
        self._loaders = loaders
        self.num_slots = slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self.host_budget_bytes = host_bytes
        self.device_budget_bytes = device_bytes
        self._entries: dict[Version, Entry] = {}
        self._pins: dict[Hashable, Version] = {}
        """By place, the version to keep: the newest that was asked for."""
        self._actions: list[Action] = []
        self.num_evictions = 0

    def pin(self, version: Version, now: float) -> None:
        """Load it, and keep it on the device until `unpin`; a newer version takes its place when one is wanted."""
        self._pins[_place(version.ref)] = version
        entry = self._entries.get(version)
        if entry is None or (entry.state is AdapterState.FAILED and entry.waiting == 0):
            self._entries[version] = Entry(AdapterState.WANTED, wanted_s=now, used_s=now)

    def unpin(self, ref: AdapterRef) -> None:
        """From now on it may be evicted like any other."""
        self._pins.pop(_place(ref), None)

    def pinned(self, version: Version) -> bool:
        return self._pins.get(_place(version.ref)) == version

    @property
    def num_pins(self) -> int:
        return len(self._pins)

    def want(self, version: Version, now: float) -> None:
        """A request waits for this adapter; ends with `admit` or `cancel`."""
        if _place(version.ref) in self._pins:
            self._pins[_place(version.ref)] = version
        entry = self._entries.get(version)
        if entry is not None and entry.state is AdapterState.FAILED and entry.waiting == 0:
            entry = entry if now - entry.used_s < RETRY_FAILED_S else None
        if entry is None:
            entry = self._entries[version] = Entry(AdapterState.WANTED)
        if entry.waiting == 0:
            entry.wanted_s = now
        entry.waiting += 1
        if entry.state is not AdapterState.FAILED:
            entry.used_s = now

    def ready(self, version: Version) -> bool:
        """Whether `admit` may be called: it is resident and takes new sequences."""
        entry = self._entries[version]
        return entry.state is AdapterState.RESIDENT and not entry.draining

    def failure(self, version: Version) -> str | None:
        """Why it cannot be used, or None."""
        entry = self._entries[version]
        return entry.reason if entry.state is AdapterState.FAILED else None

    def admit(self, version: Version, now: float) -> tuple[int, str]:
        """One waiting request starts to run with it: (slot, digest). Only when `ready`."""
        entry = self._entries[version]
        if entry.slot is None or not self.ready(version):
            raise ValueError(f"{version.ref.name} is not ready")
        entry.waiting -= 1
        entry.users += 1
        entry.used_s = now
        return entry.slot, entry.digest

    def cancel(self, version: Version, now: float) -> None:
        """One request less waits for it."""
        entry = self._entries[version]
        entry.waiting -= 1
        if entry.state is not AdapterState.FAILED:
            entry.used_s = now

    def release(self, version: Version, now: float) -> None:
        """One sequence less runs with it."""
        entry = self._entries[version]
        entry.users -= 1
        entry.used_s = now

    def fetched(
        self, version: Version, digest: str, host_bytes: int, device_bytes: int, now: float, rank: int = 0
    ) -> None:
        """The host copy is there."""
        entry = self._entries[version]
        for size, budget, key in (
            (host_bytes, self.host_budget_bytes, "adapter_host_mib"),
            (device_bytes, self.device_budget_bytes, "adapter_device_mib"),
        ):
            if size > budget:
                self._actions.append(Drop(version))
                needs = f"needs {size / 2**20:.1f} MiB, more than {key} ({budget / 2**20:g})"
                self.failed(version, f"The adapter {version.ref.name!r} {needs}.", now)
                return
        entry.state, entry.digest, entry.rank = AdapterState.ON_HOST, digest, rank
        entry.host_bytes, entry.device_bytes, entry.held_on_host = host_bytes, device_bytes, True
        self._make_host_room(0)
        if self._host_used() > self.host_budget_bytes:
            # Its size was not known before; it is fetched again once there is room for it.
            entry.state, entry.held_on_host = AdapterState.WANTED, False
            self._actions.append(Drop(version))

    def copied(self, version: Version) -> None:
        """It is installed in its slot."""
        self._entries[version].state = AdapterState.RESIDENT

    def failed(self, version: Version, reason: str, now: float) -> None:
        """The fetch or the copy did not work; whoever waits is to be told why."""
        entry = self._entries[version]
        if entry.slot is not None:
            self._free_slots.append(entry.slot)
        entry.slot, entry.held_on_host, entry.state = None, False, AdapterState.FAILED
        entry.reason, entry.used_s = reason, now

    def actions(self, now: float) -> list[Action]:
        """The I/O to do next. Gives slots and host memory to adapters that are wanted, evicting unused ones."""
        for version, entry in list(self._entries.items()):
            if entry.draining and entry.users == 0:
                entry.wanted_s = now  # whoever came meanwhile stands behind the one it was drained for
                self._evict(version, entry)
        for version in self._waiting_in(AdapterState.ON_HOST):
            if not self._place(version, now):
                break
        idle = self._loaders - self.count(AdapterState.FETCHING)
        for version in self._waiting_in(AdapterState.WANTED)[: max(0, idle)]:
            entry = self._entries[version]
            if not self._make_host_room(entry.host_bytes):
                break
            entry.state = AdapterState.FETCHING
            self._actions.append(Fetch(version))
        for version, entry in list(self._entries.items()):
            forgotten = entry.state is AdapterState.FAILED and now - entry.used_s >= RETRY_FAILED_S
            unwanted = entry.state is AdapterState.WANTED and not self._awaited(version, entry)
            if entry.waiting == 0 and (forgotten or unwanted):
                del self._entries[version]
        actions, self._actions = self._actions, []
        return actions

    def _waiting_in(self, state: AdapterState) -> list[Version]:
        """Adapters in a state that somebody waits for, the longest waiting first."""
        found = [v for v, entry in self._entries.items() if entry.state is state and self._awaited(v, entry)]
        return sorted(found, key=lambda version: self._entries[version].wanted_s)

    def _awaited(self, version: Version, entry: Entry) -> bool:
        return entry.waiting > 0 or self.pinned(version)

    def resident_names(self) -> list[str]:
        """Names of the adapters that can be used without loading."""
        return [v.ref.name for v, e in self._entries.items() if e.state is AdapterState.RESIDENT]

    def snapshot(self) -> list[tuple[Version, Entry]]:
        """A copy of the books. May be called from another thread than all the rest."""
        return [(version, replace(entry)) for version, entry in list(self._entries.items())]

    def is_read(self, version: Version) -> bool:
        """Whether its content is, or was, known to be usable."""
        entry = self._entries.get(version)
        return entry is not None and bool(entry.digest)

    def count(self, state: AdapterState) -> int:
        return sum(entry.state is state for entry in self._entries.values())

    def _place(self, version: Version, now: float) -> bool:
        """Reserve slot and bytes for a wanted adapter; False if it has to wait."""
        entry = self._entries[version]
        while not self._free_slots or self._device_used() + entry.device_bytes > self.device_budget_bytes:
            held = [(v, e) for v, e in self._entries.items() if e.slot is not None and not self.pinned(v)]
            if not held:
                self._actions.append(Drop(version))
                room = "adapter_slots and adapter_device_mib leave no room beside the pinned adapters"
                self.failed(version, f"The adapter {version.ref.name!r} cannot be loaded: {room}.", now)
                return True
            resident = [(v, e) for v, e in held if e.state is AdapterState.RESIDENT]
            idle = [(v, e) for v, e in resident if e.users == 0 and e.waiting == 0]
            if not idle:
                busy = [e for _, e in resident if e.users]
                if busy and now - entry.wanted_s >= DRAIN_AFTER_S and not any(e.draining for e in busy):
                    min(busy, key=lambda e: e.used_s).draining = True
                return False
            self._evict(*min(idle, key=lambda pair: pair[1].used_s))
        entry.slot = self._free_slots.pop()
        entry.state = AdapterState.COPYING
        self._actions.append(Copy(version, entry.slot))
        return True

    def _evict(self, version: Version, entry: Entry) -> None:
        if entry.slot is None:
            raise ValueError(f"{version.ref.name} is in no slot")
        self._actions.append(Evict(version, entry.slot))
        self._free_slots.append(entry.slot)
        entry.slot, entry.draining = None, False
        self.num_evictions += 1
        if entry.held_on_host:
            entry.state = AdapterState.ON_HOST
        elif entry.waiting:
            entry.state = AdapterState.WANTED
        else:
            del self._entries[version]

    def _device_used(self) -> int:
        return sum(entry.device_bytes for entry in self._entries.values() if entry.slot is not None)

    def _host_used(self) -> int:
        return sum(entry.host_bytes for entry in self._entries.values() if entry.held_on_host)

    def _make_host_room(self, num_bytes: int) -> bool:
        """Drop host copies that nobody waits for, least recently used first, until `num_bytes` more fit."""
        droppable = [
            (version, entry)
            for version, entry in self._entries.items()
            if entry.held_on_host
            and (
                entry.state is AdapterState.RESIDENT
                or (entry.state is AdapterState.ON_HOST and not self._awaited(version, entry))
            )
        ]
        droppable.sort(key=lambda pair: pair[1].used_s)
        for version, entry in droppable:
            if self._host_used() + num_bytes <= self.host_budget_bytes:
                break
            entry.held_on_host = False
            self._actions.append(Drop(version))
            if entry.state is AdapterState.ON_HOST:
                del self._entries[version]
        return self._host_used() + num_bytes <= self.host_budget_bytes
