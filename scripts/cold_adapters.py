"""Measures what the arrival of cold adapters does to the others: their time between tokens, quiet and during it.

    python -m scripts.cold_adapters [--adapters 50] [--users 4] [--seconds 20] [--out loadtest/results/NAME.json]

Users of the base stream without a pause, in a closed loop. After a quiet phase, adapters never seen before are asked one
after the other for a single token, and then the same adapters once more, when they are loaded: what differs between the
first and the second arrival is the loading. Knows HTTP only.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec
from tokenizers import Tokenizer

from engine.checkpoint import open_checkpoint
from scripts.bench_client import BenchError, random_prompt
from scripts.bench_machine import about
from scripts.bench_server import BASE, WORK, Server, gguf_file, our_server
from scripts.random_adapters import ALL_LINEAR, write_random_adapters

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 200


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """The times between tokens of the users of the base in one phase."""

    name: str
    arrivals: int
    gaps: int
    inter_token_p50_ms: float
    inter_token_p90_ms: float
    inter_token_p99_ms: float
    arrival_p50_ms: float | None
    """Of the requests that arrive, in all."""


def main() -> None:
    options = _parse()
    WORK.mkdir(parents=True, exist_ok=True)
    model = gguf_file()
    names = [f"cold{number}" for number in range(options.adapters)]
    write_random_adapters(WORK / "adapters", names, str(model), ALL_LINEAR)
    tokenizer = Tokenizer.from_buffer(open_checkpoint(str(model)).files["tokenizer.json"])
    try:
        with our_server("ours", str(model), WORK / "adapters", {}) as server:
            phases = asyncio.run(measure(server, tokenizer, names, options.users, options.seconds))
    except (BenchError, OSError, aiohttp.ClientError) as error:
        sys.exit(f"The measurement failed: {error}")
    print(report(phases))
    if options.out:
        document = {"about": about("scripts.cold_adapters", options), "phases": phases}
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


async def measure(
    server: Server, tokenizer: Tokenizer, names: list[str], users: int, seconds: float
) -> list[Phase]:
    """Quiet, then the adapters cold, then the same adapters loaded."""
    rng = random.Random(0)
    gaps: list[tuple[float, float]] = []
    """When, and how long after the token before."""
    phases: list[Phase] = []
    async with aiohttp.ClientSession(read_bufsize=2**20, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def user() -> None:
            while True:
                prompt = random_prompt(tokenizer, rng, PROMPT_TOKENS)
                async for earlier, later in _gaps(session, server, BASE, prompt, OUTPUT_TOKENS):
                    gaps.append((later, later - earlier))

        running = [asyncio.create_task(user()) for _ in range(users)]
        await asyncio.sleep(3)
        for name, arriving in (("quiet", []), ("cold adapters", names), ("the same, loaded", names)):
            started, waits = time.perf_counter(), []
            pause = seconds / max(1, len(arriving))
            for adapter in arriving:
                asked = time.perf_counter()
                prompt = random_prompt(tokenizer, rng, 4)
                async for _ in _gaps(session, server, f"{BASE}/{adapter}", prompt, 2):
                    pass
                waits.append(time.perf_counter() - asked)
                await asyncio.sleep(max(0.0, pause - waits[-1]))
            await asyncio.sleep(max(0.0, started + seconds - time.perf_counter()))
            ended = time.perf_counter()
            phases.append(_phase(name, [gap for at, gap in gaps if started <= at < ended], waits))
            for task in running:
                if task.done():
                    task.result()
        for task in running:
            task.cancel()
        for task in running:
            with suppress(asyncio.CancelledError):
                await task
    return phases


async def _gaps(
    session: aiohttp.ClientSession, server: Server, model: str, prompt: str, count: int
) -> AsyncIterator[tuple[float, float]]:
    """When each token of an answer came, with the one before, as they come."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0}
    last: float | None = None
    async with session.post(
        f"{server.url}/v1/completions", json=body | {"ignore_eos": True, "stream": True}
    ) as response:
        if response.status != 200:
            raise BenchError(f"answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if line.startswith(b'data: {"error"'):
                raise BenchError(line.decode()[:300])
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if last is not None:
                    yield last, now
                last = now


def _phase(name: str, gaps: list[float], waits: list[float]) -> Phase:
    if len(gaps) < 100:
        raise BenchError(f"only {len(gaps)} tokens in phase {name!r}")
    cuts = statistics.quantiles(gaps, n=100)
    return Phase(
        name=name,
        arrivals=len(waits),
        gaps=len(gaps),
        inter_token_p50_ms=round(cuts[49] * 1e3, 2),
        inter_token_p90_ms=round(cuts[89] * 1e3, 2),
        inter_token_p99_ms=round(cuts[98] * 1e3, 2),
        arrival_p50_ms=round(statistics.median(waits) * 1e3, 1) if waits else None,
    )


def report(phases: list[Phase]) -> str:
    quiet = phases[0]
    lines = [
        "| phase | arrivals | between tokens p50 / p90 / p99 ms | p99 against quiet | arriving request p50 ms |",
        "|---|--:|--:|--:|--:|",
    ]
    for phase in phases:
        ratio = phase.inter_token_p99_ms / quiet.inter_token_p99_ms
        gaps = f"{phase.inter_token_p50_ms} / {phase.inter_token_p90_ms} / {phase.inter_token_p99_ms}"
        lines.append(
            f"| {phase.name} | {phase.arrivals} | {gaps} | {ratio:.2f} | {phase.arrival_p50_ms or '–'} |"
        )
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
