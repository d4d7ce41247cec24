"""Measures the load test itself: against a server of known times, how far its figures are from the truth, at what CPU.

    python -m scripts.calibrate [--guidellm PATH] [--seconds 8] [--out loadtest/results/calibration.json]

The client is the load test's own load process. Truth is what the server recorded of each word, so noise of the
server is none of the client's error. `--guidellm`: that program measures the same server too, closed loop only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import msgspec
import psutil

from loadtest.metrics import percentile, stage_figures
from loadtest.plan import RunPlan, Stage
from loadtest.prompts import Prompts
from loadtest.record import Message, RequestRow, StageEnded, Trouble
from loadtest.run import describe_machine
from scripts.calibration_server import MODEL, Truth

TTFT_MS, GAP_MS, TOKENS = 100.0, 20.0, 50
STREAMS = (1, 32, 128)
ALLOWED_MS, ALLOWED_SHARE = 2.0, 0.02
SAMPLE_S = 0.1


class Figure(msgspec.Struct, frozen=True):
    """A figure as the client has it, and in truth."""

    client: float
    truth: float

    @property
    def recovered(self) -> bool:
        """Within 2 ms or 2 %; for what is in milliseconds."""
        return abs(self.client - self.truth) <= max(ALLOWED_MS, ALLOWED_SHARE * self.truth)

    @property
    def recovered_rate(self) -> bool:
        """Within 2 %."""
        return abs(self.client - self.truth) <= ALLOWED_SHARE * self.truth


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """One client at one load, closed or open; milliseconds where a name says so."""

    client: str
    loop: str
    streams: int
    requests: int
    ttft_p50_ms: Figure
    ttft_p99_ms: Figure
    itl_mean_ms: Figure
    gap_p99_ms: Figure | None = None
    """Of single gaps; None for a client that keeps only a request's mean."""
    gap_error_p99_ms: float | None = None
    """p99 over all gaps of |the client's - the server's own|."""
    stream_tokens_per_s: Figure | None = None
    """Of a stream while it streams, over all whole answers that ended in the steady window."""
    requests_per_s: Figure | None = None
    """Sent by the schedule, against the schedule's rate; open loop only."""
    loop_lag_p99_ms: float | None = None
    cpu_s: float
    """CPU seconds of the client's processes from the first request to the last word."""
    cpu_share: float
    """Those over the time: 1.0 is one core."""
    cpu_us_per_frame: float
    frames_per_s_ceiling: float
    """What one core would carry at that cost a frame."""

    @property
    def recovered(self) -> bool:
        rates = [figure for figure in (self.stream_tokens_per_s, self.requests_per_s) if figure is not None]
        times = [self.ttft_p50_ms, self.itl_mean_ms]
        return all(f.recovered for f in times) and all(f.recovered_rate for f in rates)


@contextmanager
def known_server(ttft_ms: float, gap_ms: float, tokens: int) -> Iterator[str]:
    """Address of a calibration server."""
    command = [
        sys.executable,
        "-m",
        "scripts.calibration_server",
        "--ttft-ms",
        str(ttft_ms),
        "--gap-ms",
        str(gap_ms),
    ]
    process = subprocess.Popen([*command, "--tokens", str(tokens)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def read_truths(url: str) -> list[Truth]:
    """Answers since the last call."""
    with urllib.request.urlopen(f"{url}/truth", timeout=30) as answer:
        return msgspec.json.decode(answer.read(), type=list[Truth])


class CpuMeter:
    """CPU seconds of a process and its children over time, sampled beside it."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self._spent: dict[int, float] = {}
        self.samples: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def between(self, start: float, end: float) -> float:
        """CPU seconds from `start` to `end`, to the nearest samples."""
        before = min(self.samples, key=lambda sample: abs(sample[0] - start))
        after = min(self.samples, key=lambda sample: abs(sample[0] - end))
        return after[1] - before[1]

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            try:
                for process in (self._root, *self._root.children(recursive=True)):
                    times = process.cpu_times()
                    self._spent[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
            self.samples.append((time.perf_counter(), sum(self._spent.values())))


def measure_harness(
    url: str, streams: int, *, open_loop: bool, seconds: float, tokens: int, answer_s: float
) -> Calibration:
    """The load test's own load process against the server. Raises RuntimeError when it gave up or lost a request."""
    rate = streams / answer_s if open_loop else None
    title = f"open, {rate:.6g}/s" if rate else "closed"
    stage = Stage(title, 0 if open_loop else streams, (MODEL,), 0, (), rate)
    ramp_s = min(seconds / 3, 2.0)
    plan = RunPlan(
        run="calibration",
        base_url=url,
        endpoint="chat",
        model=MODEL,
        stages=(stage,),
        stage_seconds=seconds,
        ramp_seconds=ramp_s,
        prompt_tokens=32,
        max_tokens=tokens,
        arrivals="constant",
        warm_up=False,
        nonce=str(time.time_ns()),
    )
    read_truths(url)
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    meter = CpuMeter(process.pid)
    said, _ = process.communicate(msgspec.json.encode(plan))
    meter.stop()
    decoder = msgspec.json.Decoder(Message)
    messages = [decoder.decode(line) for line in said.splitlines()]
    for message in messages:
        if isinstance(message, Trouble):
            raise RuntimeError(message.message)
    rows = [message for message in messages if isinstance(message, RequestRow)]
    end = next(message for message in messages if isinstance(message, StageEnded))
    if failed := [row.error for row in rows if row.outcome == "failed"]:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    return _compare(plan, stage, end, rows, read_truths(url), meter)


def measure_guidellm(program: Path, url: str, streams: int, *, seconds: float) -> Calibration:
    """GuideLLM in a closed loop, by its own report. Raises CalledProcessError, or OSError when it cannot be started."""
    with tempfile.TemporaryDirectory() as directory:
        data, report = Path(directory, "prompts.jsonl"), Path(directory, "report.json")
        prompts = Prompts("words", 32, 0, str(time.time_ns()))
        count = streams * max(1, round(seconds)) * 2
        data.write_text("".join(json.dumps({"prompt": prompts.text(index)}) + "\n" for index in range(count)))
        command = [str(program), "run", "--disable-console", "--backend"]
        command += [
            f"kind=openai_http,target={url},model={MODEL}",
            "--profile",
            f"kind=concurrent,streams={streams}",
        ]
        command += ["--constraint", f"kind=max_duration,seconds={seconds:g}"]
        command += ["--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={report}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        read_truths(url)
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        meter = CpuMeter(process.pid)
        code = process.wait()
        meter.stop()
        if code:
            raise subprocess.CalledProcessError(code, command)
        metrics = json.loads(report.read_bytes())["benchmarks"][0]["metrics"]
    truths = read_truths(url)
    ttft, itl = (metrics[name]["successful"] for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    true_ttft = sorted((truth.written[0] - truth.received) * 1000 for truth in truths)
    first, last = min(t.received for t in truths), max(t.written[-1] for t in truths)
    cpu_s = meter.between(first, last)
    frames = sum(len(truth.written) for truth in truths)
    return Calibration(
        client="guidellm",
        loop="closed",
        streams=streams,
        requests=metrics["request_totals"]["successful"],
        ttft_p50_ms=Figure(ttft["median"], median(true_ttft)),
        ttft_p99_ms=Figure(ttft["percentiles"]["p99"], percentile(true_ttft, 99)),
        itl_mean_ms=Figure(itl["mean"], mean((b - a) * 1000 for t in truths for a, b in pairwise(t.written))),
        cpu_s=cpu_s,
        cpu_share=cpu_s / (last - first),
        cpu_us_per_frame=cpu_s / frames * 1e6,
        frames_per_s_ceiling=frames / cpu_s if cpu_s > 0 else 0.0,
    )


def _compare(
    plan: RunPlan,
    stage: Stage,
    end: StageEnded,
    rows: Sequence[RequestRow],
    truths: Sequence[Truth],
    meter: CpuMeter,
) -> Calibration:
    prompts = Prompts(plan.prompt_kind, plan.prompt_tokens, plan.seed, plan.nonce)
    by_prompt = {truth.prompt: truth for truth in truths}
    pairs = [(row, by_prompt[prompts.text(row.index)]) for row in rows if row.outcome == "completed"]
    steady = [(row, truth) for row, truth in pairs if row.sent >= end.steady_from]
    # The clocks are one; only their zeros differ, by no more than the fastest request took to arrive.
    zero = min(truth.received - row.sent for row, truth in pairs)
    client_ttft = sorted(((row.first_content or 0) - row.sent) * 1000 for row, _ in steady)
    true_ttft = sorted((truth.written[0] - zero - row.sent) * 1000 for row, truth in steady)
    client_gaps = [gap * 1000 for row, _ in steady for gap in row.gaps]
    true_gaps = [(b - a) * 1000 for _, truth in steady for a, b in pairwise(truth.written)]
    errors = sorted(abs(ours - true) for ours, true in zip(client_gaps, true_gaps, strict=True))
    figures = stage_figures(stage, end, rows)
    heard = [
        (row, truth)
        for row, truth in pairs
        if row.done is not None and end.steady_from <= row.done <= end.steady_until
    ]
    tokens = Figure(
        sum(row.events - 1 for row, _ in heard)
        / sum((row.last_content or 0) - (row.first_content or 0) for row, _ in heard),
        sum(len(truth.written) - 1 for _, truth in heard)
        / sum(t.written[-1] - t.written[0] for _, t in heard),
    )
    sent = sorted(row.sent for row in rows if row.sent >= end.steady_from)
    first, last = min(t.received for _, t in pairs), max(t.written[-1] for _, t in pairs)
    cpu_s = meter.between(first, last)
    frames = sum(row.events for row in rows)
    return Calibration(
        client="loraland loadtest",
        loop="open" if stage.rate else "closed",
        streams=round(figures.users_in_flight or 0) if stage.rate else stage.users,
        requests=len(steady),
        ttft_p50_ms=Figure(median(client_ttft), median(true_ttft)),
        ttft_p99_ms=Figure(percentile(client_ttft, 99), percentile(true_ttft, 99)),
        itl_mean_ms=Figure(mean(client_gaps), mean(true_gaps)),
        gap_p99_ms=Figure(percentile(sorted(client_gaps), 99), percentile(sorted(true_gaps), 99)),
        gap_error_p99_ms=percentile(errors, 99),
        stream_tokens_per_s=tokens,
        requests_per_s=Figure((len(sent) - 1) / (sent[-1] - sent[0]), stage.rate) if stage.rate else None,
        loop_lag_p99_ms=end.loop_lag_ms[1],
        cpu_s=cpu_s,
        cpu_share=cpu_s / (last - first),
        cpu_us_per_frame=cpu_s / frames * 1e6,
        frames_per_s_ceiling=frames / cpu_s if cpu_s > 0 else 0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("loadtest/results/calibration.json"))
    parser.add_argument("--guidellm", type=Path, help="the program, from an environment of its own")
    options = parser.parse_args()
    answer_s = (TTFT_MS + (TOKENS - 1) * GAP_MS) / 1000
    done: list[Calibration] = []
    with known_server(TTFT_MS, GAP_MS, TOKENS) as url:
        for streams in STREAMS:
            for open_loop in (False, True):
                done.append(
                    measure_harness(
                        url,
                        streams,
                        open_loop=open_loop,
                        seconds=options.seconds,
                        tokens=TOKENS,
                        answer_s=answer_s,
                    )
                )
                _say(done[-1])
            if options.guidellm:
                closed = done[-2]
                done.append(measure_guidellm(options.guidellm, url, streams, seconds=options.seconds))
                _say(done[-1])
                ratio = closed.cpu_us_per_frame / done[-1].cpu_us_per_frame
                print(f"{'':18} CPU a frame, ours / GuideLLM's: {ratio:.2f}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["python", "-m", "scripts.calibrate", *sys.argv[1:]]),
        "machine": describe_machine(),
        "server": {"ttft_ms": TTFT_MS, "gap_ms": GAP_MS, "tokens": TOKENS},
        "clients": done,
    }
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    raise SystemExit(0 if all(one.recovered for one in done if one.client != "guidellm") else 1)


def _say(one: Calibration) -> None:
    gap = f", gap p99 {one.gap_p99_ms.client:.1f} ({one.gap_p99_ms.truth:.1f})" if one.gap_p99_ms else ""
    print(
        f"{one.client:18} {one.loop:6} {one.streams:4} streams: TTFT p50 {one.ttft_p50_ms.client:.2f} "
        f"({one.ttft_p50_ms.truth:.2f}) ms, ITL {one.itl_mean_ms.client:.3f} ({one.itl_mean_ms.truth:.3f}) ms{gap}; "
        f"{one.cpu_share:.0%} of a core, {one.cpu_us_per_frame:.0f} us a frame"
        f"{'' if one.recovered else '  OFF'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
