"""The harness's judgement of its own run."""

from loadtest.checks import findings
from loadtest.metrics import StageFigures, stage_figures
from loadtest.plan import Stage, is_loopback
from loadtest.record import RequestRow, RunRecord, StageEnded
from tests.loadtest.rows import BASE, ended, record, row

BUSY = [row(10.0, [10.1, 19.9]), row(10.0, [10.1, 19.9])]


def judge(end: StageEnded, rows: list[RequestRow], **changes) -> tuple[list[str], list[str]]:
    run: RunRecord = record((BASE,), (end,), **changes)
    figures: list[StageFigures] = [stage_figures(BASE, end, rows)]
    found = findings(run, figures, rows)
    return [f.text for f in found if f.kind == "invalid"], [f.text for f in found if f.kind == "note"]


def test_sound_run_gets_no_remark() -> None:
    assert judge(ended(), BUSY) == ([], [])


def test_busy_client_is_the_bottleneck() -> None:
    invalid, _ = judge(ended(client_cpu_share=0.93), BUSY)
    assert len(invalid) == 1
    assert "93%" in invalid[0]


def test_late_event_loop_is_the_bottleneck_only_beside_the_ttft_it_spoils() -> None:
    assert judge(ended(loop_lag_ms=(1, 50.0, 60)), BUSY)[0] != []
    slow = [row(10.0, [12.0, 19.9]), row(10.0, [12.0, 19.9])]
    assert judge(ended(loop_lag_ms=(1, 50.0, 60)), slow)[0] == []


def test_missing_users_are_noticed() -> None:
    assert "1 of 2 users" in judge(ended(spawned_users=1), BUSY)[0][0]
    assert "1.0 of 2 requests" in judge(ended(), BUSY[:1])[0][0]
    assert judge(ended(), BUSY[:1], think_seconds=1.0)[0] == []


def test_stage_without_a_measured_request_is_invalid() -> None:
    running = [row(10.0, [19.0], outcome="incomplete", done=None, completion_tokens=None)] * 2
    assert "--stage-seconds" in judge(ended(), running)[0][0]
    assert "1 failed" in judge(ended(), [row(10.0, [], outcome="failed", done=None)])[0][0]


def test_what_failed_is_quoted_most_frequent_first() -> None:
    failures = [
        row(10.0, [], outcome="failed", done=None, error=error)
        for error in ("HTTP 500: tired", "cut off", "cut off")
    ]
    assert judge(ended(), BUSY + failures)[1] == ["2 failed with: cut off", "1 failed with: HTTP 500: tired"]


def test_unequal_answers_are_pointed_out() -> None:
    adapter = Stage(mode="1 adapter", users=2, models=("m/a",), adapters=1)
    ends = (ended(), ended(30.0, 40.0, stage=1))
    short = [row(30.0, [30.1, 39.0], mode="1 adapter")] * 2
    long = [row(10.0, [10.1, 15.0, 19.9])] * 2
    figures = [stage_figures(BASE, ends[0], long), stage_figures(adapter, ends[1], short)]
    notes = [f.text for f in findings(record((BASE, adapter), ends), figures, [])]
    assert any("--ignore-eos" in note and "base 3.0, 1 adapter 2.0" in note for note in notes)


def test_events_of_several_tokens_and_missing_usage_are_pointed_out() -> None:
    several = [row(10.0, [10.1, 19.9], completion_tokens=8)] * 2
    assert any("4.00 tokens" in note for note in judge(ended(), several)[1])
    uncounted = [row(10.0, [10.1, 19.9], completion_tokens=None)] * 2
    assert any("no usage" in note for note in judge(ended(), uncounted)[1])


def test_random_adapters_are_named_as_such() -> None:
    stage = Stage(mode="2 adapters", users=2, models=("m/a", "m/random-01"), adapters=2)
    rows = [row(10.0, [10.1, 19.9], mode="2 adapters")] * 2
    found = findings(record((stage,), (ended(),)), [stage_figures(stage, ended(), rows)], rows)
    assert any("1 of the 2 adapters are random" in f.text for f in found)


def test_loopback_addresses() -> None:
    assert (
        is_loopback("http://127.0.0.1:8000")
        and is_loopback("http://localhost")
        and is_loopback("http://[::1]:1")
    )
    assert not is_loopback("https://api.example.test") and not is_loopback("http://10.0.0.1")
