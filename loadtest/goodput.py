"""What an open loop delivered: asked for, sent, completed, in time. Pure; knows no output format."""

from collections.abc import Iterable

import msgspec

from loadtest.metrics import total_time, tpot, ttft
from loadtest.plan import Limits, Stage
from loadtest.record import RequestRow, StageEnded

LATE_S = 0.01
"""A request sent later than this after its time in the schedule was sent late."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """The requests due in a stage's steady window; rates are requests a second."""

    requested: float
    """The rate asked for."""
    sent: float
    completed: float
    """Of the requests due in the window, those that completed before the stage ended."""
    good: float
    """Goodput: those that completed within all limits."""
    late: int
    due: int


def delivery(stage: Stage, ended: StageEnded, rows: Iterable[RequestRow], limits: Limits) -> Delivery | None:
    """Of a stage of an open loop, from its own rows; None for a closed loop or a stage without a window."""
    window_s = ended.steady_until - ended.steady_from
    if stage.rate is None or window_s <= 0:
        return None
    due = [
        row for row in rows if row.phase == "load" and ended.steady_from <= row.scheduled < ended.steady_until
    ]
    completed = [row for row in due if row.outcome == "completed"]
    return Delivery(
        requested=stage.rate,
        sent=sum(row.sent < ended.steady_until for row in due) / window_s,
        completed=len(completed) / window_s,
        good=sum(meets(row, limits) for row in completed) / window_s,
        late=sum(row.sent - row.scheduled > LATE_S for row in due),
        due=len(due),
    )


def meets(row: RequestRow, limits: Limits) -> bool:
    """Whether a completed request kept every limit that is set; what it does not have breaks none but TTFT's."""
    first, each, total = ttft(row), tpot(row), total_time(row)
    if limits.ttft_ms is not None and (first is None or first * 1000 > limits.ttft_ms):
        return False
    if limits.tpot_ms is not None and each is not None and each * 1000 > limits.tpot_ms:
        return False
    return not (limits.total_ms is not None and total is not None and total * 1000 > limits.total_ms)
