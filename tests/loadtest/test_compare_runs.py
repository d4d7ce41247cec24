"""Runs side by side: what is worse is found, what is chance is not, and what was not alike is said."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from loadtest.compare_runs import app
from loadtest.intervals import Interval
from loadtest.record import ROWS_FILE, RequestRow, write_run
from loadtest.run_comparison import RunComparison, Verdict, judge
from tests.loadtest.rows import BASE, ended, record, row

WINDOW = ended(10.0, 70.0)


def requests(slower: float = 1.0, *, seed: int, failed: int = 0) -> list[RequestRow]:
    """Two users for a minute; a request takes about half a second."""
    rng = np.random.default_rng(seed)
    rows: list[RequestRow] = []
    for user in range(2):
        now = 10.0
        while now < 70:
            first = now + rng.gamma(20, 0.005) * slower
            times = first + np.cumsum([0.0, *rng.gamma(50, 0.002, size=4)])
            rows.append(row(now, times.tolist(), user=user))
            now = float(times[-1])
    refused = [row(11.0, [], outcome="failed", error="HTTP 500", done=None) for _ in range(failed)]
    return [*rows, *refused]


def save(directory: Path, rows: list[RequestRow], **plan: object) -> Path:
    directory.mkdir()
    write_run(directory, record((BASE,), (WINDOW,), **plan))
    (directory / ROWS_FILE).write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in rows))
    return directory


def compare(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return save(tmp_path / "before", requests(seed=1))


def test_runs_alike_but_for_chance_pass(baseline: Path, tmp_path: Path) -> None:
    code, said = compare(baseline, save(tmp_path / "after", requests(seed=2)))
    assert code == 0, said
    assert "No figure is worse by more than 10%" in said


def test_a_slower_run_fails_and_says_what_is_worse(baseline: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    code, said = compare(baseline, save(tmp_path / "after", requests(2.0, seed=2)), "--json", out)
    assert code == 1
    assert "regression: after, base, 2 users: TTFT p50" in said
    comparison = msgspec.json.decode(out.read_bytes(), type=RunComparison)
    line = next(line for line in comparison.lines if line.figure == "TTFT average")
    ratio, between = line.cells[1].ratio, line.cells[1].interval
    assert ratio is not None and between is not None
    assert between.low is not None and between.high is not None
    assert between.low < ratio < between.high
    assert between.low < 2.0 < between.high
    rate = next(line for line in comparison.lines if line.figure == "throughput")
    assert rate.cells[1].verdict is Verdict.worse


def test_a_faster_run_passes(baseline: Path, tmp_path: Path) -> None:
    code, said = compare(save(tmp_path / "slow", requests(2.0, seed=2)), baseline)
    assert code == 0
    assert "better" in said and "worse" not in said.replace("is worse by", "")


def test_threshold_and_figures_can_be_chosen(baseline: Path, tmp_path: Path) -> None:
    slower = save(tmp_path / "after", requests(2.0, seed=2))
    assert compare(baseline, slower, "--threshold", 2)[0] == 0
    assert compare(baseline, slower, "--figure", "inter-chunk")[0] == 0
    assert compare(baseline, slower, "--figure", "ttft")[0] == 1


def test_more_failures_are_a_regression_however_fast_the_rest(baseline: Path, tmp_path: Path) -> None:
    code, said = compare(baseline, save(tmp_path / "after", requests(seed=2, failed=30)))
    assert code == 1
    assert "regression: after, base, 2 users: failed" in said


def test_markdown_has_a_column_for_each_run(baseline: Path, tmp_path: Path) -> None:
    others = [save(tmp_path / name, requests(slow, seed=5)) for name, slow in (("b", 1.0), ("c", 3.0))]
    out = tmp_path / "table.md"
    assert compare(baseline, *others, "--markdown", out)[0] == 1
    head, rule, *lines = out.read_text().splitlines()
    assert head == "| stage | figure | before | b | c |"
    assert rule == "| --- | --- | --: | --: | --: |"
    ttft = next(line for line in lines if "TTFT average" in line)
    assert ttft.count("|") == 6 and "**" in ttft.split("|")[5] and "**" not in ttft.split("|")[4]


def test_what_was_not_alike_is_said(baseline: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "after", requests(seed=2), max_tokens=64, interrupted=True)
    said = compare(baseline, other)[1]
    assert "after: max_tokens 64, not 32" in said
    assert "after did not run to its end" in said


def test_runs_that_cannot_be_compared_are_refused_in_words(baseline: Path, tmp_path: Path) -> None:
    for arguments, why in (
        ([baseline], "two runs"),
        ([baseline, baseline / "run.json"], "the same run is named twice"),
        ([baseline, tmp_path / "nothing"], "No such file"),
    ):
        code, said = compare(*arguments)
        assert code == 2
        assert why in said


@pytest.mark.parametrize(
    ("ratio", "interval", "verdict"),
    [
        (1.05, Interval(1.01, 1.09), Verdict.same),
        (1.5, Interval(0.9, 2.0), Verdict.unsure),
        (1.5, None, Verdict.unsure),
        (1.5, Interval(1.2, 1.8), Verdict.worse),
        (0.5, Interval(0.4, 0.6), Verdict.better),
    ],
)
def test_only_a_change_beyond_threshold_and_chance_counts(
    ratio: float, interval: Interval | None, verdict: Verdict
) -> None:
    assert judge(ratio, interval, 0.1, more_is_better=False) is verdict
