"""Many adapters for a long time: does it stay as fast as with few, and within its memory? Knows HTTP only.

    python -m scripts.soak --minutes 15 [--out loadtest/results/NAME.json]

Starts engine and gateway with a budget of 32 adapters on the device and 128 in memory, registers 1,000, and lets 25
users ask them by Zipf's law (the k-th most popular one is asked with weight 1/k); before and after, the same users ask
25 adapters that stay resident, which is what the throughput is compared with. Every minute a line: throughput,
failures, evictions, resident size of engine and gateway, bytes of adapters against their budgets.

`--url` takes a server that runs: it must serve the adapters of `--adapters-dir` (which `--prepare` only makes), and for
the engine's size `--engine-url` must be given.
"""

import argparse
import asyncio
import math
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import accumulate
from pathlib import Path

import aiohttp
import msgspec
from tokenizers import Tokenizer

from engine.checkpoint import open_checkpoint
from engine.protocol import AdapterReport
from gateway.adapter_list import AdapterList
from scripts.bench_client import Answer, BenchError, Question, closed_loop, quantile, random_prompt
from scripts.bench_machine import about
from scripts.bench_server import BASE, WORK, gguf_file, our_server
from scripts.random_adapters import PAPER, write_random_adapters

REFERENCE = "resident"
ZIPF = "zipf"
SAMPLE_S = 5.0
MIB = 2**20


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What the server said of itself at one moment."""

    at_s: float
    """Since the start of the run."""
    phase: str
    engine_rss_mib: float | None
    gateway_rss_mib: float | None
    device_bytes: int
    host_bytes: int
    resident: int
    evictions: int


class Minute(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table: what happened since the line before."""

    phase: str
    end_s: float
    """Since the start of the run."""
    output_tokens_per_s: float
    answers: int
    failures: int
    evictions: int
    ttft_p50_s: float | None
    inter_token_p99_s: float | None
    last: Sample


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What the run was for. Throughput and times leave out the first seconds of every phase."""

    resident_tokens_per_s: float
    zipf_tokens_per_s: float
    throughput_ratio: float
    """Zipf over the resident ones."""
    answers: int
    failures: int
    first_failures: list[str]
    evictions: int
    adapters_used: int
    resident_inter_token_p99_s: float
    zipf_inter_token_p99_s: float
    resident_ttft_p50_s: float
    zipf_ttft_p50_s: float
    engine_rss_slope_mib_per_h: float | None
    """Least squares over the later two thirds of the Zipf phase."""
    gateway_rss_slope_mib_per_h: float | None
    device_bytes_most: int
    device_budget_bytes: int
    host_bytes_most: int
    host_budget_bytes: int
    within_budgets: bool


class Phase(msgspec.Struct):
    """A stretch of one kind of load, and what came of it."""

    name: str
    start_s: float
    end_s: float
    answers: list[Answer] = []
    failures: list[str] = []
    adapters: set[str] = set()


class Probe:
    """Asks a server about itself."""

    def __init__(self, session: aiohttp.ClientSession, url: str, engine_url: str) -> None:
        self._session, self._url, self._engine_url = session, url, engine_url
        self._start_s = time.perf_counter()

    async def report(self) -> AdapterReport:
        """Raises BenchError when there is none."""
        async with self._session.get(f"{self._url}/adapters") as answer:
            found = msgspec.json.decode(await answer.read(), type=AdapterList).models[0].engine
        if found is None:
            raise BenchError("the engine does not answer")
        return found

    async def sample(self, phase: str) -> Sample:
        report = await self.report()
        return Sample(
            at_s=round(time.perf_counter() - self._start_s, 1),
            phase=phase,
            engine_rss_mib=await self._rss_mib(self._engine_url) if self._engine_url else None,
            gateway_rss_mib=await self._rss_mib(self._url),
            device_bytes=report.device_bytes,
            host_bytes=report.host_bytes,
            resident=report.slots_used,
            evictions=report.evictions,
        )

    async def _rss_mib(self, url: str) -> float | None:
        async with self._session.get(f"{url}/metrics") as answer:
            for line in (await answer.text()).splitlines():
                if line.startswith("process_resident_memory_bytes "):
                    return round(float(line.split()[1]) / MIB, 1)
        return None


def main() -> None:
    options = _parse()
    # Leaves by way of every `finally`, so that no server stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        names = prepare(options.adapters_dir, options.adapters, options.distinct, options.rank)
        if options.prepare:
            print(f"{len(names)} adapters in {options.adapters_dir}")
            return
        with ExitStack() as stack:
            url, engine_url = options.url, options.engine_url
            if not url:
                server = stack.enter_context(
                    our_server("soak", str(gguf_file()), options.adapters_dir, settings(options))
                )
                url, engine_url = server.url, server.engine_url
            minutes, samples, summary = asyncio.run(soak(options, url, engine_url, names))
    except (BenchError, OSError, aiohttp.ClientError) as error:
        sys.exit(f"The soak failed: {error}")
    print("\n" + conclusion(summary))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "about": about("scripts.soak", options),
            "summary": summary,
            "minutes": minutes,
            "samples": samples,
        }
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
        print(f"\nWritten to {options.out}")


def prepare(directory: Path, count: int, distinct: int, rank: int) -> list[str]:
    """Make what is missing of `count` adapters, of which so many are different; the others are hard links to them."""
    WORK.mkdir(parents=True, exist_ok=True)
    names = [f"soak-{number:04d}" for number in range(count)]
    originals = names[:distinct]
    write_random_adapters(directory, originals, str(gguf_file()), PAPER, rank)
    for number, name in enumerate(names[distinct:]):
        if (directory / name).exists():
            continue
        # Under a name that no gateway lists, then renamed: a half-made adapter is never seen.
        unfinished = directory / f".{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(directory / originals[number % len(originals)] / file, unfinished / file)
        unfinished.rename(directory / name)
    return names


def settings(options: argparse.Namespace) -> dict[str, str | int | bool]:
    """The engine's configuration: so many adapters fit on the device and in memory."""
    weights = options.adapters_dir / "soak-0000" / "adapter_model.safetensors"
    size = weights.stat().st_size
    return {
        "prefix_caching": False,
        "adapter_slots": options.device_adapters,
        "adapter_device_mib": math.ceil(options.device_adapters * size / MIB),
        "adapter_host_mib": math.ceil(options.host_adapters * size / MIB),
    }


async def soak(
    options: argparse.Namespace, url: str, engine_url: str, names: Sequence[str]
) -> tuple[list[Minute], list[Sample], Summary]:
    """Half of the reference, the Zipf phase, the other half of the reference."""
    tokenizer = Tokenizer.from_buffer(open_checkpoint(str(gguf_file())).files["tokenizer.json"])
    rng = random.Random(options.seed)
    resident = list(names[: options.resident])
    half_s = options.reference_minutes * 30
    plan = [
        (REFERENCE, half_s, lambda: rng.choice(resident)),
        (ZIPF, options.minutes * 60, zipf(names, rng, options.exponent)),
        (REFERENCE, half_s, lambda: rng.choice(resident)),
    ]
    minutes: list[Minute] = []
    samples: list[Sample] = []
    phases: list[Phase] = []
    print(HEADER, flush=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        probe = Probe(session, url, engine_url)
        for name, seconds, choose in plan:
            start_s = time.perf_counter()
            phase = Phase(name, start_s, start_s + seconds, [], [], set())
            phases.append(phase)

            def work(phase: Phase = phase, choose: Callable[[], str] = choose) -> Iterator[Question]:
                while time.perf_counter() < phase.end_s:
                    adapter = choose()
                    phase.adapters.add(adapter)
                    prompt = random_prompt(tokenizer, rng, options.prompt_tokens)
                    yield Question(prompt, {"model": f"{BASE}/{adapter}"})

            watching = asyncio.create_task(watch(probe, phase, options.every, samples, minutes))
            await closed_loop(
                url,
                "the server",
                work(),
                options.users,
                options.output_tokens,
                answers=phase.answers,
                failures=phase.failures,
            )
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        report = await probe.report()
    return minutes, samples, summarize(phases, samples, report, options.settle)


async def watch(
    probe: Probe, phase: Phase, every_s: float, samples: list[Sample], minutes: list[Minute]
) -> None:
    """Look at the server every few seconds; print a line every `every_s`. Runs until cancelled."""
    last_s, answers, failures = phase.start_s, 0, 0
    evictions = samples[-1].evictions if samples else 0
    while True:
        with suppress(aiohttp.ClientError, TimeoutError, BenchError):
            samples.append(await probe.sample(phase.name))
        now = time.perf_counter()
        if now - last_s >= every_s and samples:
            new = phase.answers[answers:]
            sample = samples[-1]
            ttft = sorted(answer.ttft_s for answer in new)
            gaps = sorted(gap for answer in new for gap in answer.gaps_s)
            tokens = sum(answer.tokens_between(last_s, now) for answer in phase.answers)
            line = Minute(
                phase=phase.name,
                end_s=sample.at_s,
                output_tokens_per_s=round(tokens / (now - last_s), 1),
                answers=len(new),
                failures=len(phase.failures) - failures,
                evictions=sample.evictions - evictions,
                ttft_p50_s=quantile(ttft, 0.5) if ttft else None,
                inter_token_p99_s=quantile(gaps, 0.99) if gaps else None,
                last=sample,
            )
            minutes.append(line)
            print(row(line), flush=True)
            last_s, answers, failures = now, len(phase.answers), len(phase.failures)
            evictions = sample.evictions
        await asyncio.sleep(min(SAMPLE_S, every_s))


def zipf(names: Sequence[str], rng: random.Random, exponent: float) -> Callable[[], str]:
    """Draws names; the k-th with weight 1 / k^exponent."""
    weights = list(accumulate(1 / rank**exponent for rank in range(1, len(names) + 1)))
    return lambda: rng.choices(names, cum_weights=weights)[0]


def summarize(
    phases: Sequence[Phase], samples: Sequence[Sample], report: AdapterReport, settle_s: float
) -> Summary:
    """Raises BenchError when a phase has no answers after its first `settle_s` seconds."""
    rates, gaps, ttft = {}, {}, {}
    for name in (REFERENCE, ZIPF):
        of = [phase for phase in phases if phase.name == name]
        seconds = sum(phase.end_s - phase.start_s - settle_s for phase in of)
        tokens = sum(
            answer.tokens_between(phase.start_s + settle_s, phase.end_s)
            for phase in of
            for answer in phase.answers
        )
        settled = [
            answer
            for phase in of
            for answer in phase.answers
            if answer.sent_s >= phase.start_s + settle_s and answer.times_s[-1] < phase.end_s
        ]
        gaps[name] = sorted(gap for answer in settled for gap in answer.gaps_s)
        ttft[name] = sorted(answer.ttft_s for answer in settled)
        if not tokens or not gaps[name]:
            raise BenchError(
                f"the phase {name!r} is too short: no answer was begun and ended after {settle_s:g} s"
            )
        rates[name] = tokens / seconds
    during = [sample for sample in samples if sample.phase == ZIPF]
    later = during[len(during) // 3 :]
    device, host = max(s.device_bytes for s in samples), max(s.host_bytes for s in samples)
    failures = [failure for phase in phases for failure in phase.failures]
    return Summary(
        resident_tokens_per_s=round(rates[REFERENCE], 1),
        zipf_tokens_per_s=round(rates[ZIPF], 1),
        throughput_ratio=round(rates[ZIPF] / rates[REFERENCE], 3),
        answers=sum(len(phase.answers) for phase in phases),
        failures=len(failures),
        first_failures=failures[:5],
        evictions=report.evictions,
        adapters_used=len(set[str]().union(*(phase.adapters for phase in phases))),
        resident_inter_token_p99_s=quantile(gaps[REFERENCE], 0.99),
        zipf_inter_token_p99_s=quantile(gaps[ZIPF], 0.99),
        resident_ttft_p50_s=quantile(ttft[REFERENCE], 0.5),
        zipf_ttft_p50_s=quantile(ttft[ZIPF], 0.5),
        engine_rss_slope_mib_per_h=slope_per_h([(s.at_s, s.engine_rss_mib) for s in later]),
        gateway_rss_slope_mib_per_h=slope_per_h([(s.at_s, s.gateway_rss_mib) for s in later]),
        device_bytes_most=device,
        device_budget_bytes=report.device_budget_bytes,
        host_bytes_most=host,
        host_budget_bytes=report.host_budget_bytes,
        within_budgets=device <= report.device_budget_bytes and host <= report.host_budget_bytes,
    )


def slope_per_h(points: Sequence[tuple[float, float | None]]) -> float | None:
    """Least squares over (seconds, value), as value per hour; None without two points."""
    known = [(at_s, value) for at_s, value in points if value is not None]
    if len(known) < 2:
        return None
    slope, _ = statistics.linear_regression([at_s for at_s, _ in known], [value for _, value in known])
    return round(slope * 3600, 1)


HEADER = (
    "    time phase     tokens/s answers failed evicted  TTFT p50  ITL p99  engine  gateway  adapters: device     host\n"
    "                                                         s       ms     MiB      MiB         MiB (number)      MiB"
)


def row(minute: Minute) -> str:
    last = minute.last

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    gap_ms = None if minute.inter_token_p99_s is None else minute.inter_token_p99_s * 1e3
    return (
        f"{minute.end_s:6.0f} s {minute.phase:<9} {minute.output_tokens_per_s:8.1f} {minute.answers:7} "
        f"{minute.failures:6} {minute.evictions:7} {cell(minute.ttft_p50_s, '.2f'):>9} {cell(gap_ms, '.0f'):>8} "
        f"{cell(last.engine_rss_mib, '.0f'):>7} {cell(last.gateway_rss_mib, '.0f'):>8} "
        f"{last.device_bytes / MIB:13.1f} ({last.resident:2}) {last.host_bytes / MIB:12.1f}"
    )


def conclusion(summary: Summary) -> str:
    """The summary in words."""
    return "\n".join(
        [
            f"- {summary.adapters_used} adapters by Zipf's law: {summary.zipf_tokens_per_s} tokens/s, "
            f"{summary.throughput_ratio:.3f} of the {summary.resident_tokens_per_s} over resident ones",
            f"- {summary.answers} answers, {summary.failures} failures, {summary.evictions} evictions",
            f"- between tokens, p99: {summary.zipf_inter_token_p99_s * 1e3:.0f} ms, resident "
            f"{summary.resident_inter_token_p99_s * 1e3:.0f} ms; first token, p50: {summary.zipf_ttft_p50_s:.2f} s, "
            f"resident {summary.resident_ttft_p50_s:.2f} s",
            f"- resident size grows by {summary.engine_rss_slope_mib_per_h} (engine) and "
            f"{summary.gateway_rss_slope_mib_per_h} (gateway) MiB an hour",
            f"- adapters took at most {summary.device_bytes_most / MIB:.1f} of "
            f"{summary.device_budget_bytes / MIB:.0f} MiB on the device and {summary.host_bytes_most / MIB:.1f} of "
            f"{summary.host_budget_bytes / MIB:.0f} MiB in memory: "
            f"{'within' if summary.within_budgets else 'BEYOND'} the budgets",
            *(f"- failed: {failure}" for failure in summary.first_failures),
        ]
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15, help="of the Zipf phase")
    parser.add_argument(
        "--reference-minutes", type=float, default=4, help="over resident adapters, half before"
    )
    parser.add_argument("--users", type=int, default=25)
    parser.add_argument("--adapters", type=int, default=1000, help="registered")
    parser.add_argument("--distinct", type=int, default=64, help="with weights of their own")
    parser.add_argument("--resident", type=int, default=25, help="adapters of the reference")
    parser.add_argument("--device-adapters", type=int, default=32, help="that fit on the device")
    parser.add_argument("--host-adapters", type=int, default=128, help="that fit in memory")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two lines")
    parser.add_argument("--settle", type=float, default=15.0, help="seconds of a phase that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters-dir", type=Path, default=WORK / "soak")
    parser.add_argument("--prepare", action="store_true", help="make the adapters and stop")
    parser.add_argument("--url", default="", help="a gateway that runs, instead of starting one")
    parser.add_argument("--engine-url", default="", help="its engine")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
