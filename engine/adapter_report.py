"""What the engine knows of its adapters, for people and routers. Pure: reads the books, changes nothing."""

from collections import Counter
from collections.abc import Iterable

from engine.protocol import AdapterReport, AdapterStatus, AdapterTier
from engine.residency import AdapterState, Entry, Residency, Version


def adapter_report(residency: Residency, using: Iterable[tuple[Version, bool]], now: float) -> AdapterReport:
    """May be called from another thread than the one that keeps the books.

    Args:
        using: For every open sequence with an adapter, its version and whether it runs.
    """
    counts = Counter(using)
    books = residency.snapshot()
    books.sort(key=lambda pair: pair[1].used_s, reverse=True)
    adapters = [_status(version, entry, counts, residency.pinned(version), now) for version, entry in books]
    return AdapterReport(
        slots=residency.num_slots,
        slots_used=sum(entry.slot is not None for _, entry in books),
        device_bytes=sum(adapter.device_bytes for adapter in adapters),
        device_budget_bytes=residency.device_budget_bytes,
        host_adapters=sum(entry.held_on_host for _, entry in books),
        host_bytes=sum(adapter.host_bytes for adapter in adapters),
        host_budget_bytes=residency.host_budget_bytes,
        evictions=residency.num_evictions,
        adapters=adapters,
    )


def _status(
    version: Version, entry: Entry, counts: Counter[tuple[Version, bool]], pinned: bool, now: float
) -> AdapterStatus:
    if entry.state is AdapterState.RESIDENT:
        tier = AdapterTier.DEVICE
    else:
        tier = AdapterTier.HOST if entry.held_on_host else AdapterTier.SOURCE
    return AdapterStatus(
        name=version.ref.name,
        state=entry.state.name.lower(),
        tier=tier,
        digest=entry.digest[:12],
        rank=entry.rank,
        host_bytes=entry.host_bytes if entry.held_on_host else 0,
        device_bytes=entry.device_bytes if entry.slot is not None else 0,
        slot=entry.slot,
        running=counts[version, True],
        waiting=counts[version, False],
        used_s_ago=round(max(0.0, now - entry.used_s), 3),
        reason=entry.reason,
        pinned=pinned,
    )
