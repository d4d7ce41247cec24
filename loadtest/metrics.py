"""From rows to figures: pure functions. Knows no Locust, no clock, no report.

Definitions (all in seconds; `DEFINITIONS` is what the report prints):
a request is *measured* when it completed, was sent inside the steady window, and was not the first of the run to
its model. Latencies come from measured requests only, so a fast refusal lowers none of them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from loadtest.plan import Stage
from loadtest.record import RequestRow, StageEnded

PERCENTILES = {50: 2, 90: 10, 99: 100}
"""Percentile → the fewest samples it is given for: at least one must lie beyond it."""

DEFINITIONS = {
    "total request time": "request due → end of the stream (due: closed loop, when the last answer is complete; "
    "open loop, its time in the schedule, however late it was sent)",
    "TTFT": "time to first token: request due → first event with text (an opening chunk with only a role is none)",
    "token streaming time": "first event with text → last event with text",
    "tok/s per stream": "output tokens after the first / token streaming time, each summed over the requests; answers of "
    "one token have none",
    "tok/s in all": "output tokens that arrived in the steady window / length of the window, over all streams",
    "inter-chunk latency": "gap between successive events with text; that between tokens only at 1 token an event",
    "TPOT": "time per output token after the first: token streaming time / (output tokens - 1)",
    "failed": "refused, broken off or without a finish reason; counted over the whole stage, in no latency",
    "incomplete": "still running when the stage ended: neither completed nor failed, in no latency",
    "set aside": "completed, but sent in the ramp or the run's first to its model; in no latency",
    "steady window": "a stage without its ramp; its latencies are of requests sent and completed inside it",
    "output tokens": "the server's own count (`usage`), never a client's re-tokenisation",
    "percentiles": "over all requests of a stage, linear between ranks; none where fewer samples than p50: 2, p90: 10, "
    "p99: 100",
}


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Samples in figures. A percentile is None when there are too few samples for it (`PERCENTILES`)."""

    samples: int
    average: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class StageFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One stage in figures; times in seconds."""

    mode: str
    users: int
    adapters: int
    window_s: float
    measured: int
    failed: int
    incomplete: int
    set_aside: int
    """Completed, but sent in the ramp or the first to their model: in no latency."""
    empty: int
    """Measured requests that ended well without any text: they have a total time and no TTFT."""
    single_token: int
    """Measured requests of fewer than two tokens: they have no TPOT."""
    uncounted: int
    """Measured requests whose server gave no usage: each event counted as one token."""
    total: Distribution
    ttft: Distribution
    streaming: Distribution
    tpot: Distribution
    inter_chunk: Distribution
    stream_rate: float | None
    """Output tokens/s of a stream while it streams: all tokens after the first over all streaming times."""
    output_rate: float | None
    """Output tokens/s over all streams."""
    request_rate: float | None
    """Completions a second."""
    tokens_per_event: float | None
    prompt_tokens: float | None
    """Average of a measured request."""
    cached_share: float | None
    """Part of the prompt tokens that the server says it took from its cache."""
    output_tokens: float | None
    """Average of a measured request."""
    users_in_flight: float | None
    """Requests in flight, averaged over the steady window: the users really achieved."""


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One model (the base or an adapter) over all stages that used it."""

    model: str
    measured: int
    failed: int
    cold_ttft_s: float | None
    """TTFT of the run's first request to it, adapter loading included."""
    ttft: Distribution
    total: Distribution
    output_tokens: float | None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the closest ranks of `ordered` (ascending, not empty): numpy's default, 'inclusive'."""
    if not ordered:
        raise ValueError("no samples")
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def distribution(samples: Iterable[float]) -> Distribution:
    """Average and percentiles, each only where there are samples enough."""
    ordered = sorted(samples)
    p50, p90, p99 = (
        percentile(ordered, percent) if len(ordered) >= fewest else None
        for percent, fewest in PERCENTILES.items()
    )
    return Distribution(samples=len(ordered), average=_average(ordered), p50=p50, p90=p90, p99=p99)


def ticks_missed(late_s: float, interval_s: float) -> list[float]:
    """How late each tick of a steady clock was, given one sleeper that woke `late_s` late.

    A stall of two seconds delays everything that fell into it, not one sample: without this, the longer a process
    stands still the less its percentiles show of it.
    """
    return [late_s - number * interval_s for number in range(1 + int(max(0.0, late_s) / interval_s))]


def total_time(row: RequestRow) -> float | None:
    return None if row.done is None else row.done - row.scheduled


def ttft(row: RequestRow) -> float | None:
    return None if row.first_content is None else row.first_content - row.scheduled


def streaming_time(row: RequestRow) -> float | None:
    if row.first_content is None or row.last_content is None:
        return None
    return row.last_content - row.first_content


def tpot(row: RequestRow) -> float | None:
    """None below two tokens, and when all tokens came in one event: nothing streamed that could be timed."""
    streamed = streaming_time(row)
    tokens = output_tokens(row)
    return streamed / (tokens - 1) if streamed and tokens > 1 else None


def output_tokens(row: RequestRow) -> int:
    """The server's count; its events where it gave none."""
    return row.events if row.completion_tokens is None else row.completion_tokens


def is_measured(row: RequestRow, ended: StageEnded) -> bool:
    return (
        row.outcome == "completed"
        and row.phase == "load"
        and not row.cold
        and row.sent >= ended.steady_from
        and row.done is not None
        and row.done <= ended.steady_until
    )


def stage_figures(stage: Stage, ended: StageEnded, rows: Iterable[RequestRow]) -> StageFigures:
    """The figures of one stage from its own rows (those of its mode and users; warm-up rows are passed over)."""
    load = [row for row in rows if row.phase == "load"]
    measured = [row for row in load if is_measured(row, ended)]
    completed = sum(row.outcome == "completed" for row in load)
    window_s = max(0.0, ended.steady_until - ended.steady_from)
    prompt = [row.prompt_tokens for row in measured if row.prompt_tokens is not None]
    cached = [row.cached_tokens for row in measured if row.cached_tokens is not None]
    ratio = _tokens_per_event(measured) or _tokens_per_event([r for r in load if r.outcome == "completed"])
    in_window = sum(
        _overlap(row.sent, _end(row, ended), ended.steady_from, ended.steady_until) for row in load
    )
    finished = sum(
        row.outcome == "completed"
        and row.done is not None
        and ended.steady_from <= row.done <= ended.steady_until
        for row in load
    )
    return StageFigures(
        mode=stage.mode,
        users=stage.users,
        adapters=stage.adapters,
        window_s=window_s,
        measured=len(measured),
        failed=sum(row.outcome == "failed" for row in load),
        incomplete=sum(row.outcome == "incomplete" for row in load),
        set_aside=completed - len(measured),
        empty=sum(row.events == 0 for row in measured),
        single_token=sum(output_tokens(row) < 2 for row in measured),
        uncounted=sum(row.completion_tokens is None for row in measured),
        total=distribution(_present(total_time(row) for row in measured)),
        ttft=distribution(_present(ttft(row) for row in measured)),
        streaming=distribution(_present(streaming_time(row) for row in measured)),
        tpot=distribution(_present(tpot(row) for row in measured)),
        inter_chunk=distribution(gap for row in measured for gap in row.gaps),
        stream_rate=_stream_rate(measured),
        output_rate=_tokens_in_window(load, ended, ratio or 1.0) / window_s if window_s else None,
        request_rate=finished / window_s if window_s else None,
        tokens_per_event=ratio,
        prompt_tokens=_average(prompt),
        cached_share=sum(cached) / sum(prompt) if cached and sum(prompt) else None,
        output_tokens=_average([output_tokens(row) for row in measured]),
        users_in_flight=in_window / window_s if window_s else None,
    )


def model_figures(
    rows: Iterable[RequestRow], ended: Sequence[tuple[Stage, StageEnded]]
) -> list[ModelFigures]:
    """One line per model, in the order of the run, its rows pooled over all stages (never an average of percentiles)."""
    stages = {(stage.mode, stage.users): end for stage, end in ended}
    of_model: dict[str, list[RequestRow]] = defaultdict(list)
    for row in rows:
        of_model[row.model].append(row)
    figures: list[ModelFigures] = []
    for model in dict.fromkeys(name for stage, _ in ended for name in stage.models):
        asked = of_model[model]
        measured = [
            row for row in asked if (end := stages.get((row.mode, row.users))) and is_measured(row, end)
        ]
        cold = [first for row in asked if row.cold and (first := ttft(row)) is not None]
        figures.append(
            ModelFigures(
                model=model,
                measured=len(measured),
                failed=sum(row.outcome == "failed" for row in asked),
                cold_ttft_s=cold[0] if cold else None,
                ttft=distribution(_present(ttft(row) for row in measured)),
                total=distribution(_present(total_time(row) for row in measured)),
                output_tokens=_average([output_tokens(row) for row in measured]),
            )
        )
    return figures


def _tokens_in_window(load: Iterable[RequestRow], ended: StageEnded, ratio: float) -> float:
    """Output tokens that arrived in the steady window, each at its event's time.

    The tokens of a completed request spread evenly over its events; one cut off, which has no usage, gets the
    stage's own ratio of tokens to events. Failed requests bring none.
    """
    tokens = 0.0
    for row in load:
        if row.outcome == "failed" or row.first_content is None:
            continue
        counted = row.outcome == "completed" and row.completion_tokens is not None
        per_event = row.completion_tokens / row.events if counted and row.completion_tokens else ratio
        arrived = row.first_content
        inside = ended.steady_from <= arrived <= ended.steady_until
        for gap in row.gaps:
            arrived += gap
            inside += ended.steady_from <= arrived <= ended.steady_until
        tokens += inside * per_event
    return tokens


def _stream_rate(measured: Iterable[RequestRow]) -> float | None:
    """A ratio of sums: in the mean of the streams' own rates, one stream that came in a burst outweighs the rest."""
    timed = [row for row in measured if tpot(row) is not None]
    streamed_s = sum(_present(streaming_time(row) for row in timed))
    return sum(output_tokens(row) - 1 for row in timed) / streamed_s if streamed_s else None


def _tokens_per_event(rows: Sequence[RequestRow]) -> float | None:
    counted = [row for row in rows if row.completion_tokens is not None and row.events]
    events = sum(row.events for row in counted)
    return sum(output_tokens(row) for row in counted) / events if events else None


def _end(row: RequestRow, ended: StageEnded) -> float:
    """When the request stopped running: a failed one may not know, an incomplete one ran to the stage's end."""
    if row.done is not None:
        return row.done
    if row.outcome == "incomplete":
        return ended.steady_until
    return row.last_content or row.headers or row.sent


def _overlap(start: float, end: float, window_start: float, window_end: float) -> float:
    return max(0.0, min(end, window_end) - max(start, window_start))


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
