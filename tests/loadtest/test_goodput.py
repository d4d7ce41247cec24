"""What an open loop delivered, by hand."""

from loadtest.goodput import delivery, meets
from loadtest.plan import Limits, Stage
from tests.loadtest.rows import ended, row

STAGE = Stage("base, 0.4/s", 0, ("m",), 0, (), 0.4)


def test_only_what_was_due_in_the_window_counts_and_late_sends_are_told() -> None:
    rows = [
        row(5.0, [5.1, 5.2]),
        row(11.0, [11.1, 11.2]),
        row(12.0, [12.1, 12.2], scheduled=11.5),
        row(13.0, [13.1], outcome="failed"),
        row(14.0, [17.0, 17.1]),
    ]
    got = delivery(STAGE, ended(10.0, 20.0), rows, Limits(ttft_ms=500))
    assert got is not None
    assert (got.due, got.late) == (4, 1)
    assert (got.requested, got.sent, got.completed, got.good) == (0.4, 0.4, 0.3, 0.1)


def test_limits_count_from_the_schedule() -> None:
    late = row(12.0, [12.1, 12.2], scheduled=11.0)
    assert meets(late, Limits())
    assert meets(late, Limits(ttft_ms=1200, tpot_ms=150, total_ms=5000))
    assert not meets(late, Limits(ttft_ms=1000))
    assert not meets(late, Limits(tpot_ms=50))
    assert not meets(late, Limits(total_ms=1000))


def test_closed_loop_has_no_delivery() -> None:
    assert delivery(Stage("base", 1, ("m",), 0), ended(), [], Limits()) is None
