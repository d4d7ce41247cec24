"""A comparison of two models as a terminal table, one HTML page and JSON. Computes nothing."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from jinja2 import Environment, StrictUndefined
from rich import box
from rich.table import Table

from loadtest.answer_journal import Answer
from loadtest.contest import CONTEST_DEFINITIONS, Example, SideFigures, TaskContest
from loadtest.contest_page import CONTEST_PAGE
from loadtest.intervals import Interval
from loadtest.record import Machine

NOTHING = "–"
_WINNERS = {"left": "left better", "right": "right better", "tie": "tie", None: "not answered by both"}
JSON_FILE = "compare.json"
PAGE_FILE = "compare.html"


class SideFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a side was, for readers; never its key."""

    model: str
    url: str
    price: str
    request: dict[str, object]
    """The fields that every request of it had in common."""


class ContestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`compare.json`: a whole comparison but for the answers, which the journal has."""

    command: str
    started_unix: float
    left: SideFacts
    right: SideFacts
    tasks: tuple[TaskContest, ...]
    concurrency: int
    spent: float
    """US dollars by token prices, over all runs into this directory, unanswered requests by their worst case."""
    cap: float
    machine: Machine
    notes: tuple[str, ...] = ()
    stopped: str | None = None
    """Why not everything was asked."""


def contest_table(record: ContestRecord) -> Table:
    """Two lines a task: the left side and the right one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("model")
    for name in (
        "answers",
        "quality\n95 % interval",
        "win / tie /\nloss",
        "TTFT ms\np50 / p90",
        "total ms\np50 / p90",
        "tokens\nin / out",
        "$ per\n1,000",
        "paper's\nGPT-4",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for number, contest in enumerate(record.tasks):
        if number:
            table.add_section()
        first = f"{contest.task}\n[dim]{contest.metric}[/]"
        table.add_row(first, *_line(contest, contest.left, left=True))
        table.add_row("", *_line(contest, contest.right, left=False))
    return table


def _line(contest: TaskContest, side: SideFigures, *, left: bool) -> list[str]:
    failed = f" [red]+{side.failed} failed[/]" if side.failed else ""
    counts = (contest.wins, contest.ties, contest.losses)
    gpt4 = next((r for r in contest.references if r.model == "gpt-4"), None)
    return [
        side.model.replace("[", "\\["),
        f"{side.answered}{failed}",
        f"{_score(side.quality)} {_between(side.quality_interval)}",
        " / ".join(map(str, counts if left else counts[::-1])),
        f"{_ms(side.ttft.p50)} / {_ms(side.ttft.p90)}",
        f"{_ms(side.total.p50)} / {_ms(side.total.p90)}",
        f"{_number(side.prompt_tokens)} / {_number(side.output_tokens)}",
        _money(side.cost_of_1000),
        f"{gpt4.score:.3f} {gpt4.metric}" if gpt4 and left else "",
    ]


def verdict_words(contest: TaskContest) -> str | None:
    """The difference in one sentence; None when no example was answered by both."""
    low, high = contest.difference_interval.low, contest.difference_interval.high
    if contest.difference is None or low is None or high is None:
        return None
    between = f"{contest.difference:+.3f} ({low:+.3f} to {high:+.3f})"
    if low <= 0 <= high:
        return f"{contest.task}: no difference beyond chance, {between} {contest.metric}."
    better, worse = (contest.left, contest.right) if low > 0 else (contest.right, contest.left)
    return f"{contest.task}: {better.model} is better than {worse.model}, {between} {contest.metric}, left minus right."


def write_json(directory: Path, record: ContestRecord) -> Path:
    """Raises OSError."""
    path = directory / JSON_FILE
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return path


def write_page(
    directory: Path, record: ContestRecord, examples: Sequence[tuple[str, Sequence[Example]]]
) -> Path:
    """Writes the page with both sides' outputs next to each other and returns its path. Raises OSError."""
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        CONTEST_PAGE
    )
    html = template.render(
        record=record,
        started=datetime.fromtimestamp(record.started_unix).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        verdicts=[words for contest in record.tasks if (words := verdict_words(contest))],
        tasks=[
            {
                "name": contest.task,
                "metric": contest.metric,
                "contest": contest,
                "sides": [
                    {"name": name, "cells": _page_cells(side)}
                    for name, side in (("left", contest.left), ("right", contest.right))
                ],
                "bar": _bar(contest),
                "difference": NOTHING
                if contest.difference is None
                else f"{contest.difference:+.3f} {_between(contest.difference_interval, sign=True)}",
                "chance": NOTHING if contest.chance is None else f"{contest.chance:.2g}",
                "majority": None if contest.majority is None else f"{contest.majority:.3f}",
                "references": [f"{r.model} {r.score:.3f} ({r.metric})" for r in contest.references],
            }
            for contest in record.tasks
        ],
        examples=[
            {
                "task": task,
                "id": example.id,
                "prompt": example.prompt,
                "target": example.target,
                "winner": example.winner or "missing",
                "said": _WINNERS[example.winner],
                "answers": [
                    _shown(example.left, example.left_score),
                    _shown(example.right, example.right_score),
                ],
            }
            for task, of_task in examples
            for example in of_task
        ],
        sides=[("left", record.left), ("right", record.right)],
        definitions=CONTEST_DEFINITIONS,
    )
    path = directory / PAGE_FILE
    path.write_text(html, encoding="utf-8")
    return path


def _page_cells(side: SideFigures) -> list[str]:
    return [
        side.model,
        f"{side.answered}",
        f"{side.failed}",
        f"{_score(side.quality)} {_between(side.quality_interval)}",
        f"{_ms(side.ttft.p50)} {_between_ms(side.ttft_p50_interval)}",
        _ms(side.ttft.p90),
        f"{_ms(side.total.p50)} {_between_ms(side.total_p50_interval)}",
        _ms(side.total.p90),
        _number(side.stream_rate),
        _number(side.prompt_tokens),
        _number(side.output_tokens),
        _money(side.cost_of_1000),
    ]


def _bar(contest: TaskContest) -> list[tuple[str, int, str]]:
    """(kind, count, width) of the bar of wins, ties and losses."""
    both = contest.wins + contest.ties + contest.losses
    counts = (("left", contest.wins), ("tie", contest.ties), ("right", contest.losses))
    return [(kind, count, f"{100 * count / both:.2f}%") for kind, count in counts if both and count]


def _shown(answer: Answer | None, score: float | None) -> dict[str, str]:
    if answer is None:
        return {"text": "", "error": "not asked", "score": NOTHING, "facts": ""}
    facts = [f"TTFT {_ms(answer.ttft_s)} ms", f"total {_ms(answer.total_s)} ms"]
    if answer.output_tokens is not None:
        facts.append(f"{answer.output_tokens} tokens")
    if answer.finish_reason == "length":
        facts.append("cut off at its limit")
    if answer.attempts > 1:
        facts.append(f"{answer.attempts} attempts, waited {answer.waited_s:.1f} s")
    return {
        "text": answer.text,
        "error": answer.error or "",
        "score": NOTHING if score is None else f"{score:.2f}",
        "facts": " · ".join(facts) if answer.outcome == "answered" else "",
    }


def _between(interval: Interval, *, sign: bool = False) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return (
        f"({interval.low:+.3f} to {interval.high:+.3f})"
        if sign
        else f"({interval.low:.3f}–{interval.high:.3f})"
    )


def _between_ms(interval: Interval) -> str:
    return f"({_ms(interval.low)}–{_ms(interval.high)})" if interval.closed else ""


def _score(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{seconds * 1000:,.1f}" if seconds < 0.1 else f"{seconds * 1000:,.0f}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.1f}"


def _money(dollars: float | None) -> str:
    if dollars is None:
        return NOTHING
    return f"{dollars:,.2f}" if dollars >= 1 else f"{dollars:.4f}"
