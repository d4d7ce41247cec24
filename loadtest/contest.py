"""Two models on the same examples, in figures: quality, who won, times, tokens, cost. Pure; knows no server, no file."""

import csv
from collections.abc import Sequence
from math import comb
from pathlib import Path

import msgspec
import numpy as np

from loadtest.answer_journal import Answer
from loadtest.intervals import Interval, mean_interval, percentile_interval
from loadtest.metrics import Distribution, distribution
from loadtest.prices import TokenPrice
from tuning.metrics import METRIC_NAMES, majority_share, score
from tuning.tasks import Row, Task

TIE = 1e-9

CONTEST_DEFINITIONS = {
    "quality": "the task's metric, averaged over the examples that both sides answered, with a 95 % bootstrap interval",
    "difference": "left minus right on the same examples; its interval is of the paired differences",
    "win / tie / loss": "examples on which the left side scored higher, the same, lower",
    "chance": "how probable so uneven wins and losses are if both sides are equally good (sign test without ties)",
    "TTFT": "request sent on an open connection → first event with text; opening a connection is in no time",
    "total": "request sent on an open connection → end of the stream; pauses for rate limits are in no time",
    "tokens": "the server's own counts (`usage`); averages of a request",
    "cost, token prices": "of 1,000 requests like these, from the tokens that were used and the price table",
    "cost, price an hour": "of 1,000 requests: the machine's price × the time in which any request was under way / "
    "requests. It falls when the machine is kept busier than this comparison keeps it",
}


class Priced(msgspec.Struct, frozen=True, kw_only=True):
    """How a side is paid for: by tokens, by the hour, or unknown (both None)."""

    tokens: TokenPrice | None = None
    hour: float | None = None
    """US dollars for an hour of the machine."""

    @property
    def words(self) -> str:
        if self.tokens is not None:
            cached = (
                "" if self.tokens.cached_prompt is None else f" (${self.tokens.cached_prompt:g} from cache)"
            )
            return f"${self.tokens.prompt:g}{cached} in, ${self.tokens.output:g} out a million tokens"
        if self.hour is not None:
            return f"${self.hour:g} an hour"
        return "no price known"


class SideFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One side on one task; times in seconds, money in US dollars."""

    model: str
    answered: int
    failed: int
    quality: float | None
    quality_interval: Interval
    ttft: Distribution
    ttft_p50_interval: Interval
    total: Distribution
    total_p50_interval: Interval
    prompt_tokens: float | None
    output_tokens: float | None
    stream_rate: float | None
    """Output tokens/s of a stream while it streams."""
    cost_of_1000: float | None
    spent: float
    """By token prices, over all answers of this task; failed ones by their worst case."""


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One example with what both sides made of it; None: not answered."""

    id: str
    prompt: str
    target: str
    left: Answer | None
    right: Answer | None
    left_score: float | None
    right_score: float | None

    @property
    def winner(self) -> str | None:
        """`left`, `right`, `tie`; None when a side is missing."""
        if self.left_score is None or self.right_score is None:
            return None
        gap = self.left_score - self.right_score
        return "tie" if abs(gap) <= TIE else "left" if gap > 0 else "right"


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A score of the paper's table for the task."""

    model: str
    metric: str
    score: float


class TaskContest(msgspec.Struct, frozen=True, kw_only=True):
    """One task."""

    task: str
    metric: str
    examples: int
    answered_by_both: int
    majority: float | None
    """What always giving the most frequent label would score; None for tasks without labels."""
    left: SideFigures
    right: SideFigures
    difference: float | None
    difference_interval: Interval
    wins: int
    ties: int
    losses: int
    chance: float | None
    references: tuple[Reference, ...]


def pair_up(
    task: Task, rows: Sequence[Row], left: dict[str, Answer], right: dict[str, Answer]
) -> list[Example]:
    """The rows with both sides' answers by example id. Failed answers have no score."""

    def scored(row: Row, answer: Answer | None) -> float | None:
        return None if answer is None or answer.outcome == "failed" else score(task, row, answer.text)

    return [
        Example(
            id=row.id,
            prompt=task.template.format_map(row.fields),
            target=row.target,
            left=left.get(row.id),
            right=right.get(row.id),
            left_score=scored(row, left.get(row.id)),
            right_score=scored(row, right.get(row.id)),
        )
        for row in rows
    ]


def task_contest(
    task: Task,
    rows: Sequence[Row],
    examples: Sequence[Example],
    models: tuple[str, str],
    prices: tuple[Priced, Priced],
    references: Sequence[Reference] = (),
) -> TaskContest:
    """The figures of one task from its examples."""
    both = [
        (e.left_score, e.right_score)
        for e in examples
        if e.left_score is not None and e.right_score is not None
    ]
    gaps = [left - right for left, right in both]
    winners = [example.winner for example in examples]
    wins, losses = winners.count("left"), winners.count("right")
    return TaskContest(
        task=task.name,
        metric=METRIC_NAMES[task.metric],
        examples=len(examples),
        answered_by_both=len(both),
        majority=majority_share(rows) if task.metric == "label" and rows else None,
        left=_side_figures(models[0], [e.left for e in examples], [left for left, _ in both], prices[0]),
        right=_side_figures(models[1], [e.right for e in examples], [right for _, right in both], prices[1]),
        difference=_average(gaps),
        difference_interval=mean_interval(gaps),
        wins=wins,
        ties=winners.count("tie"),
        losses=losses,
        chance=sign_test(wins, losses),
        references=tuple(references),
    )


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided probability of wins and losses at least so uneven by chance; None without either."""
    count = wins + losses
    if not count:
        return None
    tail = sum(comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


def busy_seconds(answers: Sequence[Answer]) -> float:
    """Time in which at least one of the requests was under way: the union of their spans."""
    spans = sorted(
        (answer.asked_unix, answer.asked_unix + answer.connect_s + answer.total_s)
        for answer in answers
        if answer.total_s is not None
    )
    busy, until = 0.0, -np.inf
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy


def read_references(path: Path, task: Task) -> list[Reference]:
    """The paper's prompted scores for the task that this one stands for: GPT-4 and GPT-3.5; empty when it has none.

    Raises OSError, or ValueError for a file without the columns task, metric, base_model, base_score.
    """
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        missing = {"task", "metric", "base_model", "base_score"} - set(table.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
        return [
            Reference(model=line["base_model"], metric=line["metric"], score=float(line["base_score"]))
            for line in table
            if line["task"] == task.stands_for
            and line["base_model"].startswith("gpt-")
            and line["base_score"]
        ]


def _side_figures(
    model: str, answers: Sequence[Answer | None], scores: Sequence[float], priced: Priced
) -> SideFigures:
    given = [answer for answer in answers if answer is not None]
    good = [answer for answer in given if answer.outcome == "answered"]
    ttfts = sorted(answer.ttft_s for answer in good if answer.ttft_s is not None)
    totals = sorted(answer.total_s for answer in good if answer.total_s is not None)
    timed = [a for a in good if a.streaming_s and a.output_tokens and a.output_tokens > 1]
    streamed_s = sum(a.streaming_s or 0.0 for a in timed)
    return SideFigures(
        model=model,
        answered=len(good),
        failed=len(given) - len(good),
        quality=_average(scores),
        quality_interval=mean_interval(scores),
        ttft=distribution(ttfts),
        ttft_p50_interval=percentile_interval(ttfts, 50),
        total=distribution(totals),
        total_p50_interval=percentile_interval(totals, 50),
        prompt_tokens=_average([a.prompt_tokens for a in good if a.prompt_tokens is not None]),
        output_tokens=_average([a.output_tokens for a in good if a.output_tokens is not None]),
        stream_rate=sum((a.output_tokens or 1) - 1 for a in timed) / streamed_s if streamed_s else None,
        cost_of_1000=_cost_of_1000(good, priced),
        spent=sum(answer.cost for answer in given),
    )


def _cost_of_1000(good: Sequence[Answer], priced: Priced) -> float | None:
    if not good:
        return None
    if priced.tokens is not None:
        return 1000 * sum(answer.cost for answer in good) / len(good)
    if priced.hour is not None:
        return 1000 * priced.hour / 3600 * busy_seconds(good) / len(good)
    return None


def _average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
