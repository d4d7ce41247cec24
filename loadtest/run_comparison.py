"""Runs against the first of them: figures, ratios, intervals and a verdict for each. Pure; knows no file, no table."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from math import sqrt

import msgspec
import numpy as np
from numpy.typing import NDArray

from loadtest.intervals import (
    DRAWS,
    Clusters,
    Interval,
    Statistic,
    draw,
    mean_statistic,
    percentile_statistic,
    ratio_interval,
)
from loadtest.metrics import StageFigures, is_measured, stage_figures, total_time, ttft
from loadtest.plan import RunPlan, Stage
from loadtest.record import RequestRow, RunRecord, StageEnded

THRESHOLD = 0.1
FAILED_POINTS = 0.01
"""A share of failed requests that rose by more than this, and by more than chance would, is a regression."""
FAILED_Z = 1.96
SLICE_S = 1.0
"""Throughput is drawn in slices of about this length."""
_PLAN_SAYS = {"run", "nonce", "stages", "base_url", "api_key_env"}
"""What may differ between runs without a word."""


class Verdict(StrEnum):
    """What a ratio says. Only `worse` fails a comparison."""

    baseline = "baseline"
    same = "same"
    """Within the threshold."""
    better = "better"
    worse = "worse"
    unsure = "unsure"
    """Beyond the threshold, but its interval holds "no change"."""
    missing = "missing"


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one run."""

    value: float | None
    ratio: float | None = None
    """To the first run."""
    interval: Interval | None = None
    """Of the ratio; None when there are too few samples for one."""
    verdict: Verdict


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one stage over all runs."""

    stage: str
    figure: str
    unit: str
    cells: tuple[Cell, ...]


class RunComparison(msgspec.Struct, frozen=True, kw_only=True):
    """N runs; every line has a cell for each."""

    names: tuple[str, ...]
    threshold: float
    lines: tuple[Line, ...]
    differences: tuple[str, ...]
    """What else was not the same, in words."""

    @property
    def regressions(self) -> list[tuple[str, Line, Cell]]:
        """(run, line, cell) of every verdict `worse`."""
        return [
            (name, line, cell)
            for line in self.lines
            for name, cell in zip(self.names, line.cells, strict=True)
            if cell.verdict is Verdict.worse
        ]


class MeasuredRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run as its directory has it."""

    name: str
    record: RunRecord
    rows: list[RequestRow]


def compare_runs(runs: Sequence[MeasuredRun], threshold: float = THRESHOLD) -> RunComparison:
    """Every stage of the first run that any other also has. Raises ValueError below two runs."""
    if len(runs) < 2:
        raise ValueError("a comparison needs two runs")
    measured = [_stages_of(run) for run in runs]
    lines: list[Line] = []
    for key, first in measured[0].items():
        others = [stages.get(key) for stages in measured[1:]]
        if any(others):
            lines += _compare_stage(first, others, threshold)
    return RunComparison(
        names=tuple(run.name for run in runs),
        threshold=threshold,
        lines=tuple(lines),
        differences=tuple(_differences(runs, [set(stages) for stages in measured])),
    )


class _MeasuredStage(msgspec.Struct, frozen=True, kw_only=True):
    stage: Stage
    ended: StageEnded
    figures: StageFigures
    load: list[RequestRow]
    measured: list[RequestRow]
    number: int
    """Of the run, so that no two runs draw alike."""


StageKey = tuple[str, int]


def _stages_of(run: MeasuredRun) -> dict[StageKey, _MeasuredStage]:
    found: dict[StageKey, _MeasuredStage] = {}
    for ended in run.record.stages:
        stage = run.record.plan.stages[ended.stage]
        load = [row for row in run.rows if (row.mode, row.users) == (stage.mode, stage.users)]
        found[stage.mode, stage.users] = _MeasuredStage(
            stage=stage,
            ended=ended,
            figures=stage_figures(stage, ended, load),
            load=[row for row in load if row.phase == "load"],
            measured=[row for row in load if is_measured(row, ended)],
            number=hash_of(run.name, stage.title),
        )
    return found


def hash_of(*parts: str) -> int:
    """A seed that is the same on every machine and in every process."""
    return int.from_bytes(np.random.SeedSequence(list("/".join(parts).encode())).generate_state(1).tobytes())


_FAMILIES: tuple[tuple[str, Callable[[RequestRow], Sequence[float]], tuple[str, ...]], ...] = (
    ("total", lambda row: _one(total_time(row)), ("average", "p50", "p90", "p99")),
    ("ttft", lambda row: _one(ttft(row)), ("average", "p50", "p90", "p99")),
    ("inter_chunk", lambda row: row.gaps, ("average", "p99")),
)
_TITLES = {"total": "total time", "ttft": "TTFT", "inter_chunk": "inter-chunk"}


def _compare_stage(
    first: _MeasuredStage, others: Sequence[_MeasuredStage | None], threshold: float
) -> list[Line]:
    stages = [first, *others]
    lines: list[Line] = []
    for family, pick, names in _FAMILIES:
        statistics = [_statistic(name) for name in names]
        draws = [
            s and draw(Clusters.of([pick(row) for row in s.measured]), statistics, s.number) for s in stages
        ]
        for column, name in enumerate(names):
            values = [None if s is None else getattr(getattr(s.figures, family), name) for s in stages]
            if not any(values):
                continue
            lines.append(
                Line(
                    stage=first.stage.title,
                    figure=f"{_TITLES[family]} {name}",
                    unit="s",
                    cells=_cells(values, [None if d is None else d[:, column] for d in draws], threshold),
                )
            )
    for attribute, figure, unit in (
        ("output_rate", "throughput", "output tok/s"),
        ("request_rate", "completions", "requests/s"),
    ):
        values = [None if s is None else getattr(s.figures, attribute) for s in stages]
        draws = [None if s is None else _rate_draws(s, attribute) for s in stages]
        cells = _cells(values, draws, threshold, more_is_better=True)
        lines.append(Line(stage=first.stage.title, figure=figure, unit=unit, cells=cells))
    lines.append(
        Line(
            stage=first.stage.title,
            figure="failed",
            unit="share",
            cells=tuple(_failed_cell(first, stage) for stage in stages),
        )
    )
    return lines


def _statistic(name: str) -> Statistic:
    return mean_statistic if name == "average" else percentile_statistic(float(name[1:]))


def _cells(
    values: Sequence[float | None],
    draws: Sequence[NDArray[np.float64] | None],
    threshold: float,
    *,
    more_is_better: bool = False,
) -> tuple[Cell, ...]:
    cells = [Cell(value=values[0], verdict=Verdict.baseline)]
    for value, drawn in zip(values[1:], draws[1:], strict=True):
        if value is None or not values[0]:
            cells.append(Cell(value=value, verdict=Verdict.missing))
            continue
        interval = None
        if drawn is not None and draws[0] is not None:
            between = ratio_interval(draws[0], drawn)
            interval = between if between.closed else None
        ratio = value / values[0]
        cells.append(
            Cell(
                value=value,
                ratio=ratio,
                interval=interval,
                verdict=judge(ratio, interval, threshold, more_is_better=more_is_better),
            )
        )
    return tuple(cells)


def judge(ratio: float, interval: Interval | None, threshold: float, *, more_is_better: bool) -> Verdict:
    """A change counts when it is beyond the threshold and its interval leaves "no change" out.

    The threshold is the same both ways round: at 0.1, 1.1 times and 1/1.1 times.
    """
    if 1 / (1 + threshold) <= ratio <= 1 + threshold:
        return Verdict.same
    if (
        interval is None
        or interval.low is None
        or interval.high is None
        or interval.low <= 1 <= interval.high
    ):
        return Verdict.unsure
    return Verdict.better if (ratio > 1) is more_is_better else Verdict.worse


def _rate_draws(stage: _MeasuredStage, attribute: str) -> NDArray[np.float64]:
    """Draws of the mean over slices of the steady window."""
    begin, end = stage.ended.steady_from, stage.ended.steady_until
    slices = int((end - begin) / SLICE_S)
    if slices < 2:
        return np.full(DRAWS, np.nan)
    edges = np.linspace(begin, end, slices + 1)
    counted = np.zeros(slices)
    for row in stage.load:
        if attribute == "request_rate":
            times, weight = [row.done] if row.outcome == "completed" and row.done else [], 1.0
        elif row.first_content is None or row.outcome == "failed":
            continue
        else:
            times = row.first_content + np.concatenate([[0.0], np.cumsum(row.gaps)])
            weight = (row.completion_tokens or row.events) / row.events if row.events else 0.0
        counted += weight * np.histogram(times, edges)[0]
    return draw(Clusters.of([[c] for c in counted]), [mean_statistic], stage.number)[:, 0]


def _failed_cell(first: _MeasuredStage, other: _MeasuredStage | None) -> Cell:
    if other is None:
        return Cell(value=None, verdict=Verdict.missing)
    before, after = _failed_share(first), _failed_share(other)
    if other is first:
        return Cell(value=before, verdict=Verdict.baseline)
    ended = [sum(row.outcome != "incomplete" for row in stage.load) for stage in (first, other)]
    rose = after - before > FAILED_POINTS and _beyond_chance(before, after, *ended)
    return Cell(value=after, verdict=Verdict.worse if rose else Verdict.same)


def _failed_share(stage: _MeasuredStage) -> float:
    ended = sum(row.outcome != "incomplete" for row in stage.load)
    return stage.figures.failed / ended if ended else 0.0


def _beyond_chance(before: float, after: float, before_count: int, after_count: int) -> bool:
    """Two shares, tested with their pooled one."""
    if not before_count or not after_count:
        return after > before
    pooled = (before * before_count + after * after_count) / (before_count + after_count)
    error = sqrt(pooled * (1 - pooled) * (1 / before_count + 1 / after_count))
    return error == 0 or (after - before) / error > FAILED_Z


def _differences(runs: Sequence[MeasuredRun], stages: Sequence[set[StageKey]]) -> list[str]:
    first = runs[0]
    said: list[str] = []
    for run, keys in zip(runs[1:], stages[1:], strict=True):
        for name in RunPlan.__struct_fields__:
            before, after = getattr(first.record.plan, name), getattr(run.record.plan, name)
            if name not in _PLAN_SAYS and before != after:
                said.append(f"{run.name}: {name} {after}, not {before}")
        machine, other = first.record.machine, run.record.machine
        for name in ("cpu", "cores", "system"):
            if getattr(machine, name) != getattr(other, name):
                said.append(f"{run.name}: load from another machine ({name} {getattr(other, name)})")
        for package in sorted(machine.versions.keys() | other.versions.keys()):
            before, after = machine.versions.get(package), other.versions.get(package)
            if before != after:
                said.append(f"{run.name}: {package} {after}, not {before}")
        for mode, users in sorted(stages[0] - keys):
            said.append(f"{run.name} has no stage {mode}, {users} users")
        if run.record.interrupted or run.record.trouble:
            said.append(f"{run.name} did not run to its end")
    if first.record.interrupted or first.record.trouble:
        said.append(f"{first.name} did not run to its end")
    return said


def _one(value: float | None) -> Sequence[float]:
    return () if value is None else (value,)
