"""The report of a run: a table on the terminal and one HTML file. Computes nothing but ratios to the base.

`python -m loadtest.report DIRECTORY` writes the page of an earlier run again.
"""

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table

from loadtest.checks import CPU_LIMIT, LAG_SHARE, client_limits, findings
from loadtest.intervals import percentile_interval
from loadtest.metrics import (
    DEFINITIONS,
    PERCENTILES,
    Distribution,
    StageFigures,
    is_measured,
    model_figures,
    percentile,
    stage_figures,
    total_time,
    ttft,
)
from loadtest.page import PAGE
from loadtest.paper import PAPER_FIGURES
from loadtest.plots import COLOURS, against_users, cumulative, modes
from loadtest.record import ROWS_FILE, RequestRow, RunRecord, read_rows, read_run

PAGE_FILE = "report.html"
NOTHING = "–"


def print_report(
    console: Console,
    record: RunRecord,
    rows: Sequence[RequestRow],
    figures: Sequence[StageFigures],
    page: Path,
) -> None:
    """The table, what to know about it, and where the rest lies."""
    if figures:
        console.print(results_table(figures))
        console.print(table_note(figures), style="dim", markup=False, highlight=False)
    for finding in findings(record, figures, rows):
        style = "bold red" if finding.kind == "invalid" else "yellow"
        console.print(f"{finding.kind}: {finding.text}", style=style, markup=False, highlight=False)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def results_table(figures: Sequence[StageFigures]) -> Table:
    """One row per (adapter choice, users); times in ms."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("adapters", no_wrap=True)
    for name in (
        "users",
        "requests",
        "failed",
        "total ms\navg / p90",
        "TTFT ms\navg / p90",
        "streaming ms\navg / p90",
        "tok/s\nper stream",
        "tok/s\nin all",
        "time\nvs base",
        "tok/s\nvs base",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    last: str | None = None
    for stage in figures:
        if last not in (None, stage.mode):
            table.add_section()
        last = stage.mode
        users, requests, failed, *times, per_stream, in_all, time_ratio, rate_ratio = _cells(stage, figures)
        pairs = [f"{average} / {p90}" for average, p90 in zip(times[::2], times[1::2], strict=True)]
        shown = f"[bold red]{failed}[/]" if stage.failed else failed
        table.add_row(stage.mode, users, requests, shown, *pairs, per_stream, in_all, time_ratio, rate_ratio)
    return table


def table_note(figures: Sequence[StageFigures]) -> str:
    """Says how often the figures were taken and what a dash means."""
    window = max((stage.window_s for stage in figures), default=0.0)
    return (
        f"Requests sent and completed within the steady window of {window:.1f} s; {NOTHING} where there are too few "
        f"(p90 needs {PERCENTILES[90]})."
    )


def write_page(
    directory: Path, record: RunRecord, rows: Sequence[RequestRow], figures: Sequence[StageFigures]
) -> Path:
    """Writes `report.html` into `directory` and returns its path."""
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    found = findings(record, figures, rows)
    ended = [(record.plan.stages[end.stage], end) for end in record.stages]
    order = modes(figures)
    html = template.render(
        plan=record.plan,
        started=datetime.fromtimestamp(record.started_unix).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        headline=headline(figures),
        invalid=[finding.text for finding in found if finding.kind == "invalid"],
        notes=[finding.text for finding in found if finding.kind == "note"],
        results=[
            {
                "mode": stage.mode,
                "first": number > 0 and figures[number - 1].mode != stage.mode,
                "failed": stage.failed,
                "cells": _cells(stage, figures),
            }
            for number, stage in enumerate(figures)
        ],
        table_note=table_note(figures),
        legend=[(mode, COLOURS[number % len(COLOURS)]) for number, mode in enumerate(order)],
        plots=_plots(record, rows, figures),
        more_columns=_MORE_COLUMNS,
        more=[
            (record.plan.stages[e.stage].title, _more(s)) for e, s in zip(record.stages, figures, strict=True)
        ],
        models=[
            (
                model.model,
                [
                    model.measured,
                    model.failed,
                    _ms(model.cold_ttft_s),
                    _ms(model.ttft.average),
                    _ms(model.ttft.p90),
                    _ms(model.total.average),
                    _number(model.output_tokens),
                ],
            )
            for model in model_figures(rows, ended)
        ],
        cpu_limit=f"{CPU_LIMIT:.0%}",
        lag_limit=f"{LAG_SHARE:.0%}",
        checks=[
            (
                record.plan.stages[end.stage].title,
                [
                    f"{end.client_cpu_share:.0%}",
                    *(f"{lag:.1f}" for lag in end.loop_lag_ms),
                    stage.users,
                    _number(stage.users_in_flight, 2),
                    end.locust_requests,
                    _number(end.locust_average_ms),
                ],
                bool(client_limits(end, stage, record.plan)),
            )
            for end, stage in zip(record.stages, figures, strict=True)
        ],
        facts=_facts(record, rows),
        definitions=DEFINITIONS,
        paper=PAPER_FIGURES,
        sure=_sure(record, rows),
    )
    path = directory / PAGE_FILE
    path.write_text(html, encoding="utf-8")
    return path


def headline(figures: Sequence[StageFigures]) -> str | None:
    """The run in one sentence: most adapters against the base at the most users both were measured with."""
    most = max((stage.adapters for stage in figures), default=0)
    for stage in sorted((s for s in figures if s.adapters == most), key=lambda s: -s.users):
        base = _base_of(stage, figures)
        if not most or base is None or stage.total.average is None or base.total.average is None:
            continue
        if not base.output_rate or stage.output_rate is None or stage.ttft.average is None:
            continue
        crowd = f"{stage.users} user{'s' if stage.users != 1 else ''}"
        return (
            f"{stage.mode} at {crowd}: {stage.output_rate:,.0f} output tokens/s, "
            f"{stage.output_rate / base.output_rate:.2f} times the base's {base.output_rate:,.0f}; "
            f"TTFT {_ms(stage.ttft.average)} ms against {_ms(base.ttft.average)}, total request time "
            f"{_ms(stage.total.average)} ms against {_ms(base.total.average)} (averages)."
        )
    return None


def _cells(stage: StageFigures, figures: Sequence[StageFigures]) -> list[str]:
    base = _base_of(stage, figures)
    times = [stage.total, stage.ttft, stage.streaming]
    return [
        str(stage.users),
        str(stage.measured),
        str(stage.failed),
        *(text for time in times for text in (_ms(time.average), _ms(time.p90))),
        _number(stage.stream_rate),
        _number(stage.output_rate),
        _ratio(stage.total.average, base.total.average if base else None, stage),
        _ratio(stage.output_rate, base.output_rate if base else None, stage),
    ]


_MORE_COLUMNS = (
    "TTFT p50 / p99, ms",
    "total p50 / p99, ms",
    "inter-chunk avg / p90 / p99, ms",
    "TPOT avg / p90, ms",
    "requests/s",
    "prompt tokens",
    "from cache",
    "output tokens",
    "tokens an event",
    "incomplete",
    "set aside",
    "without text",
)


def _more(stage: StageFigures) -> list[str]:
    def joined(of: Distribution, *names: str) -> str:
        return " / ".join(_ms(getattr(of, name)) for name in names)

    return [
        joined(stage.ttft, "p50", "p99"),
        joined(stage.total, "p50", "p99"),
        joined(stage.inter_chunk, "average", "p90", "p99"),
        joined(stage.tpot, "average", "p90"),
        _number(stage.request_rate, 2),
        _number(stage.prompt_tokens),
        NOTHING if stage.cached_share is None else f"{stage.cached_share:.0%}",
        _number(stage.output_tokens),
        _number(stage.tokens_per_event, 2),
        str(stage.incomplete),
        str(stage.set_aside),
        str(stage.empty),
    ]


def _sure(record: RunRecord, rows: Sequence[RequestRow]) -> list[tuple[str, list[str]]]:
    """Per stage: p50, p90 and p99 of TTFT and total time, each with its 95 % interval."""
    lines: list[tuple[str, list[str]]] = []
    for end in record.stages:
        stage = record.plan.stages[end.stage]
        measured = [
            row
            for row in rows
            if (row.mode, row.users) == (stage.mode, stage.users) and is_measured(row, end)
        ]
        cells: list[str] = []
        for pick in (ttft, total_time):
            ordered = sorted(value for row in measured if (value := pick(row)) is not None)
            for percent, fewest in PERCENTILES.items():
                if len(ordered) < fewest:
                    cells.append(NOTHING)
                    continue
                interval = percentile_interval(ordered, percent)
                low, high = _ms(interval.low), _ms(interval.high)
                cells.append(f"{_ms(percentile(ordered, percent))} ({low} to {high})")
        lines.append((stage.title, cells))
    return lines


def _plots(record: RunRecord, rows: Sequence[RequestRow], figures: Sequence[StageFigures]) -> list[str]:
    if not figures:
        return []

    def ms(value: float | None) -> float | None:
        return None if value is None else value * 1000

    busiest = max(stage.users for stage in figures)
    crowd = f"{busiest} user{'s' if busiest != 1 else ''}"
    ends = {
        (planned.mode, planned.users): end
        for end in record.stages
        if (planned := record.plan.stages[end.stage]).users == busiest
    }
    measured = [row for row in rows if (end := ends.get((row.mode, row.users))) and is_measured(row, end)]
    order = modes(figures)

    def samples(pick) -> list[tuple[str, list[float]]]:
        return [
            (mode, [v * 1000 for r in measured if r.mode == mode and (v := pick(r)) is not None])
            for mode in order
        ]

    return [
        against_users(
            "Total request time", "ms", figures, lambda s: ms(s.total.average), lambda s: ms(s.total.p90)
        ),
        against_users(
            "Time to first token", "ms", figures, lambda s: ms(s.ttft.average), lambda s: ms(s.ttft.p90)
        ),
        against_users(
            "Token streaming time",
            "ms",
            figures,
            lambda s: ms(s.streaming.average),
            lambda s: ms(s.streaming.p90),
        ),
        against_users("Throughput over all streams", "output tokens/s", figures, lambda s: s.output_rate),
        cumulative(f"Total request time, {crowd}", "ms", samples(total_time), order),
        cumulative(f"Time to first token, {crowd}", "ms", samples(ttft), order),
        cumulative(
            f"Inter-chunk latency, {crowd}",
            "ms",
            [(mode, [gap * 1000 for r in measured if r.mode == mode for gap in r.gaps]) for mode in order],
            order,
            of="gaps",
        ),
    ]


def _facts(record: RunRecord, rows: Sequence[RequestRow]) -> list[tuple[str, str]]:
    plan, machine = record.plan, record.machine
    prompts = (
        f"random words, about {plan.prompt_tokens} tokens"
        if plan.prompt_kind == "words"
        else "written task inputs"
    )
    limits = f"{plan.max_tokens_field} {plan.max_tokens}" + (", ignore_eos" if plan.ignore_eos else "")
    if plan.temperature is not None:
        limits += f", temperature {plan.temperature:g}"
    ram = f", {machine.ram_gib:g} GiB RAM" if machine.ram_gib else ""
    adapters = sorted({name for stage in plan.stages if stage.adapters for name in stage.models})
    return [
        ("command", record.command),
        ("model", plan.model),
        ("server", f"{plan.base_url}" + (f" ({record.server})" if record.server else "")),
        ("endpoint", "/v1/chat/completions" if plan.endpoint == "chat" else "/v1/completions"),
        ("adapters", f"{len(adapters)}; each request draws one uniformly" if adapters else "none"),
        ("prompts", f"{prompts}; all different, seed {plan.seed}, nonce {plan.nonce}"),
        ("request", limits),
        ("stage", f"{plan.stage_seconds:g} s, of which {plan.ramp_seconds:g} s ramp"),
        ("load from", f"{machine.cpu}, {machine.cores} cores{ram}, {machine.system}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("raw rows", f"{ROWS_FILE} beside this page, {len(rows)} requests"),
    ]


def _base_of(stage: StageFigures, figures: Sequence[StageFigures]) -> StageFigures | None:
    return next((other for other in figures if other.adapters == 0 and other.users == stage.users), None)


def _ratio(value: float | None, base: float | None, stage: StageFigures) -> str:
    if stage.adapters == 0 or value is None or not base:
        return NOTHING
    return f"×{value / base:.2f}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    ms = seconds * 1000
    return f"{ms:,.1f}" if ms < 100 else f"{ms:,.0f}"


def _number(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def rewrite(directory: Path, console: Console) -> None:
    """Makes the page and table of a finished run again from its files. Raises what reading them raises."""
    record = read_run(directory)
    rows = read_rows((directory / ROWS_FILE).read_bytes().splitlines())
    figures = [
        stage_figures(stage, end, [r for r in rows if (r.mode, r.users) == (stage.mode, stage.users)])
        for end in record.stages
        for stage in [record.plan.stages[end.stage]]
    ]
    print_report(console, record, rows, figures, write_page(directory, record, rows, figures))


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), Console(width=None if sys.stdout.isatty() else 132))
