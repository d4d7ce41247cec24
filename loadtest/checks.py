"""Was the measurement sound? Judges a run by its own figures; pure. Knows no output format."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from loadtest.adapters import is_synthetic
from loadtest.goodput import LATE_S, delivery
from loadtest.metrics import StageFigures
from loadtest.plan import Limits, RunPlan, Stage, is_loopback
from loadtest.record import RequestRow, RunRecord, StageEnded

CPU_LIMIT = 0.8
"""Share of one core above which the load process itself delays what it times (it can use only one)."""
LAG_FLOOR_MS = 10.0
LAG_SHARE = 0.25
"""An event loop later (p99) than both this floor and this share of the average TTFT spoils the latencies."""
USERS_SHARE = 0.9
"""Fewer requests in flight than this share of the users asked for: the load was not what was asked for."""
LATE_SHARE = 0.01
"""More requests of an open loop than this share sent late: the schedule was not kept."""
LENGTH_TOLERANCE = 0.1
EVENT_TOLERANCE = 0.05
CACHE_LIMIT = 0.5
ERRORS_SHOWN = 4


class Finding(msgspec.Struct, frozen=True):
    """`invalid`: do not use the figures it names. `note`: read them with this in mind."""

    kind: Literal["invalid", "note"]
    text: str


def findings(record: RunRecord, figures: Sequence[StageFigures], rows: Iterable[RequestRow]) -> list[Finding]:
    """Everything a reader of the figures must know, the worst first."""
    found: list[Finding] = []
    if record.trouble:
        found.append(Finding("invalid", record.trouble))
    rows = list(rows)
    for ended, stage in zip(record.stages, figures, strict=True):
        planned = record.plan.stages[ended.stage]
        for reason in client_limits(ended, stage, record.plan):
            found.append(Finding("invalid", f"{planned.title}: the client was the bottleneck: {reason}."))
        if not stage.measured:
            found.append(Finding("invalid", _nothing_measured(planned, stage)))
        found += _open_loop(record.plan, planned, ended, rows)
    errors = Counter(row.error for row in rows if row.error)
    found += [
        Finding("note", f"{count} failed with: {error}") for error, count in errors.most_common(ERRORS_SHOWN)
    ]
    found += [Finding("note", text) for text in _notes(record, figures)]
    return found


def client_limits(ended: StageEnded, stage: StageFigures, plan: RunPlan) -> list[str]:
    """Why the load process, not the server, set this stage's figures; empty when it did not."""
    reasons: list[str] = []
    if ended.client_cpu_share > CPU_LIMIT:
        reasons.append(f"the load process used {ended.client_cpu_share:.0%} of a core")
    lag_ms = ended.loop_lag_ms[1]
    ttft_s = stage.ttft.average
    if ttft_s is not None and lag_ms > max(LAG_FLOOR_MS, ttft_s * 1000 * LAG_SHARE):
        reasons.append(
            f"its event loop was {lag_ms:.1f} ms late (p99), at an average TTFT of {ttft_s * 1000:.0f} ms"
        )
    if ended.interrupted:
        return reasons
    if ended.spawned_users < stage.users:
        reasons.append(f"only {ended.spawned_users} of {stage.users} users started")
    elif (
        stage.users_in_flight is not None
        and not plan.think_seconds
        and not stage.failed
        and stage.users_in_flight < USERS_SHARE * stage.users
    ):
        reasons.append(
            f"on average only {stage.users_in_flight:.1f} of {stage.users} requests were in flight"
        )
    return reasons


def _open_loop(plan: RunPlan, stage: Stage, ended: StageEnded, rows: Iterable[RequestRow]) -> list[Finding]:
    """What a stage of an open loop delivered, and whether the client kept the schedule."""
    own = [row for row in rows if (row.mode, row.users) == (stage.mode, stage.users)]
    got = delivery(stage, ended, own, plan.limits)
    if got is None or not got.due:
        return []
    found: list[Finding] = []
    if got.late > LATE_SHARE * got.due:
        found.append(
            Finding(
                "invalid",
                f"{stage.title}: the client was the bottleneck: {got.late} of {got.due} requests were sent more than "
                f"{LATE_S * 1000:.0f} ms late.",
            )
        )
    good = f", {got.good:.2f} within the limits" if plan.limits != Limits() else ""
    text = (
        f"{stage.title}: {got.requested:g} requests/s asked for, {got.sent:.2f} sent, {got.completed:.2f} "
        f"completed{good}; {got.late} of {got.due} sent late."
    )
    return [*found, Finding("note", text)]


def _nothing_measured(planned: Stage, stage: StageFigures) -> str:
    if stage.failed:
        return f"{planned.title}: no request measured, {stage.failed} failed."
    return (
        f"{planned.title}: no request was sent and completed inside the steady window ({stage.incomplete} were "
        "still running): longer stages are needed (--stage-seconds)."
    )


def _notes(record: RunRecord, figures: Sequence[StageFigures]) -> list[str]:
    plan = record.plan
    notes: list[str] = []
    if record.interrupted:
        notes.append("The run was stopped early; the last stage is shorter than planned.")
    if is_loopback(plan.base_url):
        notes.append("Load process and server shared this machine: each took CPU time from the other.")
    used = {name for stage in plan.stages if stage.adapters for name in stage.models}
    synthetic = sum(is_synthetic(name) for name in used)
    if synthetic:
        notes.append(
            f"{synthetic} of the {len(used)} adapters are random weights of the right shape, not trained ones."
        )
    by_users: dict[int, list[StageFigures]] = defaultdict(list)
    for stage in figures:
        by_users[stage.users].append(stage)
    for users, alike in by_users.items():
        lengths = {stage.mode: stage.output_tokens for stage in alike if stage.output_tokens}
        if lengths and max(lengths.values()) > (1 + LENGTH_TOLERANCE) * min(lengths.values()):
            listed = ", ".join(f"{mode} {length:.1f}" for mode, length in lengths.items())
            notes.append(
                f"At {users} user{'s' if users != 1 else ''} the answers were not equally long ({listed} tokens): total "
                "and streaming time cannot be compared; --ignore-eos makes them equal where the server allows it."
            )
    if any(stage.uncounted for stage in figures):
        notes.append("The server gave no usage for some requests: each event counted as one token there.")
    ratios = [stage.tokens_per_event for stage in figures if stage.tokens_per_event]
    if ratios and max(ratios) > 1 + EVENT_TOLERANCE:
        notes.append(
            f"Events carried up to {max(ratios):.2f} tokens on average: gaps between events are not gaps between tokens."
        )
    if any((stage.cached_share or 0) > CACHE_LIMIT for stage in figures):
        notes.append("Over half of some stage's prompt tokens came from the server's prefix cache.")
    return notes
