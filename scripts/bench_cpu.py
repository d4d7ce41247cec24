"""Measures this server, and llama.cpp beside it, on the CPU: same weights, same client, one run. Knows HTTP only.

    python -m scripts.bench_cpu [--llama-server llama.cpp/build/bin/llama-server] [--out loadtest/results/NAME.json]

Closed loop: each user sends its next request when its last answer is complete. Prompts are distinct random words,
prefix caching is off, answers are greedy and of fixed length (`ignore_eos`). Adapters are seeded random ones of rank 8
on all seven linears, or on those that `--targets` names. The servers take turns, `--rounds` times; the table shows
medians. llama.cpp serves the base from a process without adapters, and its `llama-quantize` (beside `llama-server`)
makes the bfloat16 file from the same GGUF; of several `--targets` it gets the first.

`--quantization` starts ours once more with a quantised base. `--shared-prefix` adds, for the largest number of users,
prompts that begin with a template of 200 tokens for each adapter, with and without prefix caching. `--lone` adds the
time to the first token of one request with nothing else to do, `--idle` what an idle server uses of the processor.
"""

import argparse
import asyncio
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import aiohttp
import msgspec
import psutil
from tokenizers import Tokenizer

from engine.checkpoint import open_checkpoint
from scripts.bench_client import BenchError, Question, closed_loop, quantile, random_prompt
from scripts.bench_machine import about, busy_seconds, cpu_seconds, watched_memory
from scripts.bench_server import (
    PACKAGE,
    WORK,
    AdapterSet,
    Server,
    bfloat16_gguf,
    gguf_file,
    llama_server,
    lora_gguf,
    our_server,
)
from scripts.random_adapters import ALL_LINEAR, write_random_adapters

OURS = "ours"
CACHING = "ours, prefix cache"
SHARED_TOKENS = 200
IDLE_S = 10.0
LONE_REQUESTS = 5


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: one server, one number of users, with adapters or without."""

    server: str
    adapters: int
    targets: str = ""
    """What the adapters change."""
    shared_tokens: int = 0
    """Of every prompt, the same for all requests of an adapter."""
    users: int
    round: int
    requests: int
    prompt_tokens: float
    wall_s: float
    output_tokens_per_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    inter_token_p50_s: float
    inter_token_p90_s: float
    rss_mib: float
    """Peak of the server's processes together; pages that they share count in each."""
    pss_mib: float
    """The same with shared pages counted once."""
    cpu_cores: float
    """Processor seconds per second of all of them."""
    other_cores: float
    """The same of everything on the machine but them and this client: what disturbed the measurement."""


class Figure(msgspec.Struct, frozen=True):
    """One number that is no cell."""

    name: str
    server: str
    values: list[float]
    """As measured, in order."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the servers take turns with."""

    server: Server
    adapters: AdapterSet | None
    shared_tokens: int = 0

    def __str__(self) -> str:
        mode = f"{len(self.adapters.names)} adapters on {self.adapters.targets}" if self.adapters else "base"
        return f"{self.server.name}, {mode}" + (
            f", {self.shared_tokens} shared" if self.shared_tokens else ""
        )


def main() -> None:
    options = _parse()
    # Leaves by way of every `finally`, so that no server stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        cells, figures = run(options)
    except (BenchError, OSError, aiohttp.ClientError, subprocess.CalledProcessError) as error:
        sys.exit(f"The benchmark failed: {error}")
    print(report(cells, figures))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        peer = {"llama.cpp": _version(options.llama_server)} if options.llama_server else {}
        model = {"model": f"{PACKAGE} {distribution(PACKAGE).version}, as bfloat16"}
        document = {
            "about": about("scripts.bench_cpu", options) | model | peer,
            "cells": cells,
            "figures": figures,
        }
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
        print(f"\nWritten to {options.out}")


def run(options: argparse.Namespace) -> tuple[list[Cell], list[Figure]]:
    """Start every server, measure in turns, stop every server."""
    WORK.mkdir(parents=True, exist_ok=True)
    model = gguf_file()
    directory = WORK / "adapters"
    sets = [adapter_set(targets, options.adapters) for targets in options.targets]
    for each in sets:
        write_random_adapters(directory, each.names, str(model), target_modules(each.targets))
    cells: list[Cell] = []
    with ExitStack() as stack:

        def start_ours(name: str, **settings: str | bool) -> Server:
            settings = {"prefix_caching": False, **settings}
            return stack.enter_context(our_server(name, str(model), directory, settings))

        ours = [start_ours(OURS)]
        if options.quantization:
            ours.append(start_ours(f"{OURS}, {options.quantization}", quantization=options.quantization))
        plan = [Setting(server, adapters) for server in ours for adapters in (None, *sets)]
        if options.shared_prefix:
            caching = start_ours(CACHING, prefix_caching=True)
            plan += [Setting(server, sets[0], SHARED_TOKENS) for server in (ours[0], caching)]
        if options.llama_server:
            weights = bfloat16_gguf(options.llama_server, model)
            loras = [lora_gguf(directory / name, model) for name in sets[0].names]
            slots = max(options.users)
            length = options.prompt_tokens + options.output_tokens
            start = (options.llama_server, weights, slots, slots * (length + 192))
            plan.append(Setting(stack.enter_context(llama_server(*start, [])), None))
            plan.append(Setting(stack.enter_context(llama_server(*start, loras)), sets[0]))
        tokenizer = Tokenizer.from_buffer(open_checkpoint(str(model)).files["tokenizer.json"])
        for setting in plan:
            _progress(f"warming up {setting}")
            asyncio.run(warm_up(setting, tokenizer, max(options.users)))
        seed = options.seed
        for round_number in range(options.rounds):
            for users in options.users:
                for setting in plan:
                    if setting.shared_tokens and users != max(options.users):
                        continue
                    seed += 1
                    cell = measure(setting, tokenizer, options, users, round_number, seed)
                    cells.append(cell)
                    _progress(
                        f"round {round_number + 1}: {setting}, {users} users: {cell.output_tokens_per_s:.1f} tokens/s, "
                        f"first token {cell.ttft_p50_s:.2f} s, others used {cell.other_cores:.2f} cores"
                    )
        figures: list[Figure] = []
        if options.lone:
            unshared = [setting for setting in plan if not setting.shared_tokens]
            figures += [lone_ttft(setting, tokenizer, options.prompt_tokens) for setting in unshared]
        if options.idle:
            figures += [figure for server in ours for figure in idle_cpu(server, IDLE_S)]
    return cells, figures


def measure(
    setting: Setting,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    users: int,
    round_number: int,
    seed: int,
) -> Cell:
    """One cell. Raises BenchError when an answer has not the length that was asked for."""
    server, adapters = setting.server, setting.adapters
    requests = max(options.min_requests, users * options.requests_per_user)
    work = questions(setting, tokenizer, random.Random(seed), requests, options.prompt_tokens)
    with watched_memory(server.process) as peak:
        cpu_before, busy_before = cpu_seconds(server.process), busy_seconds()
        started = time.perf_counter()
        answers = asyncio.run(closed_loop(server.url, server.name, work, users, options.output_tokens))
        wall_s = time.perf_counter() - started
        cpu_cores = (cpu_seconds(server.process) - cpu_before) / wall_s
        other_cores = (busy_seconds() - busy_before) / wall_s - cpu_cores
    short = [answer.tokens for answer in answers if answer.tokens != options.output_tokens]
    if short:
        raise BenchError(f"{server.name} gave {short[0]} tokens where {options.output_tokens} were asked for")
    ttft = sorted(answer.ttft_s for answer in answers)
    gaps = sorted(gap for answer in answers for gap in answer.gaps_s)
    return Cell(
        server=server.name,
        adapters=len(adapters.names) if adapters else 0,
        targets=adapters.targets if adapters else "",
        shared_tokens=setting.shared_tokens,
        users=users,
        round=round_number,
        requests=requests,
        prompt_tokens=round(statistics.mean(answer.prompt_tokens for answer in answers), 1),
        wall_s=round(wall_s, 3),
        output_tokens_per_s=round(sum(answer.tokens for answer in answers) / wall_s, 2),
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p90_s=quantile(ttft, 0.9),
        inter_token_p50_s=quantile(gaps, 0.5),
        inter_token_p90_s=quantile(gaps, 0.9),
        rss_mib=round(peak.rss_bytes / 2**20),
        pss_mib=round(peak.pss_bytes / 2**20),
        cpu_cores=round(cpu_cores, 2),
        other_cores=round(max(0.0, other_cores), 2),
    )


def questions(
    setting: Setting, tokenizer: Tokenizer, rng: random.Random, count: int, prompt_tokens: int
) -> list[Question]:
    """Distinct prompts, the adapters in turn. Shared beginnings are the same in every round."""
    found = []
    for number in range(count):
        fields = setting.server.fields(setting.adapters, number)
        template = ""
        if setting.shared_tokens:
            # A word's end is no token's end: the next token begins with a space.
            template = (
                random_prompt(tokenizer, random.Random(fields["model"]), setting.shared_tokens) + "\n\n"
            )
        rest = prompt_tokens - setting.shared_tokens
        found.append(Question(template + random_prompt(tokenizer, rng, rest), fields))
    return found


async def warm_up(setting: Setting, tokenizer: Tokenizer, users: int) -> None:
    """Every adapter once, then as many requests at a time as will be measured. Fills the prefix cache, if any."""
    server, rng = setting.server, random.Random(f"warm up {setting}")
    if setting.adapters:
        length = setting.shared_tokens + 8
        each = questions(setting, tokenizer, rng, len(setting.adapters.names), length)
        await closed_loop(server.url, server.name, each, 1, 2)
    many = questions(setting, tokenizer, rng, users, setting.shared_tokens + 64)
    await closed_loop(server.url, server.name, many, users, 4)


def lone_ttft(setting: Setting, tokenizer: Tokenizer, prompt_tokens: int) -> Figure:
    """Seconds to the first token of requests that have the server to themselves, one after another."""
    work = questions(setting, tokenizer, random.Random(f"lone {setting}"), LONE_REQUESTS, prompt_tokens)
    answers = asyncio.run(closed_loop(setting.server.url, setting.server.name, work, 1, 2))
    name = f"lone TTFT of {prompt_tokens} tokens, s"
    return Figure(name, str(setting), [round(answer.ttft_s, 4) for answer in answers])


def idle_cpu(server: Server, seconds: float) -> list[Figure]:
    """Percent of one core that each program uses with nothing to do."""
    time.sleep(1.0)
    programs = {name: process for process in server.process.children() if (name := _program(process))}
    before = {name: cpu_seconds(process) for name, process in programs.items()}
    time.sleep(seconds)
    return [
        Figure(
            "idle CPU, % of a core",
            f"{server.name}, {name}",
            [round((cpu_seconds(process) - before[name]) / seconds * 100, 2)],
        )
        for name, process in programs.items()
    ]


def adapter_set(targets: str, count: int) -> AdapterSet:
    """Adapters on `all` linears, or on those of a list such as `q,v`."""
    prefix = "all-linear" if targets == "all" else targets.replace(",", "-")
    return AdapterSet(targets, tuple(f"{prefix}-{number:02d}" for number in range(count)))


def target_modules(targets: str) -> Sequence[str]:
    """Raises BenchError for what is no linear of a layer."""
    modules = ALL_LINEAR if targets == "all" else [f"{name}_proj" for name in targets.split(",")]
    for module in modules:
        if module not in ALL_LINEAR:
            raise BenchError(
                f"--targets: {module.removesuffix('_proj')!r} is none of q, k, v, o, gate, up, down"
            )
    return modules


def report(cells: Sequence[Cell], figures: Sequence[Figure] = ()) -> str:
    """Medians over the rounds, with the range of the tokens per second, and the ratios, as Markdown."""
    lines = [
        "| server | users | adapters | output tokens/s (range) | TTFT p50 / p90 s | between tokens p50 / p90 ms "
        "| RSS / PSS MiB | cores | others' cores |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rates: dict[tuple[str, int, str], float] = {}
    first: dict[str, float] = {}

    def key_of(cell: Cell) -> tuple[str, int, int, str, int]:
        return cell.server, cell.users, cell.adapters, cell.targets, cell.shared_tokens

    for key in dict.fromkeys(map(key_of, cells)):
        group = [cell for cell in cells if key_of(cell) == key]
        server, users, adapters, targets, shared = key
        speeds = [cell.output_tokens_per_s for cell in group]

        def median(field: str, group: Sequence[Cell] = group) -> float:
            return statistics.median(getattr(cell, field) for cell in group)

        if shared:
            first[server] = median("ttft_p50_s")
        else:
            rates[server, users, targets] = statistics.median(speeds)
        mode = f"{adapters} {targets}".strip() if adapters else "none"
        lines.append(
            f"| {server} | {users} | {mode}{f', {shared} tokens shared' if shared else ''} "
            f"| {statistics.median(speeds):.1f} ({min(speeds):.1f}–{max(speeds):.1f}) "
            f"| {median('ttft_p50_s'):.2f} / {median('ttft_p90_s'):.2f} "
            f"| {median('inter_token_p50_s') * 1e3:.1f} / {median('inter_token_p90_s') * 1e3:.1f} "
            f"| {median('rss_mib'):.0f} / {median('pss_mib'):.0f} "
            f"| {median('cpu_cores'):.2f} | {median('other_cores'):.2f} |"
        )
    return "\n".join([*lines, "", *_ratios(rates, first), *_figures(figures)])


def _ratios(rates: dict[tuple[str, int, str], float], first: dict[str, float]) -> list[str]:
    """What the table is for, in words. `first` is the TTFT with shared beginnings, by server."""
    lines = []
    for server, users, targets in rates:
        if targets and server.startswith(OURS):
            share = rates[server, users, targets] / rates[server, users, ""]
            lines.append(
                f"- {users} users: {server} with adapters on {targets} is {share:.2f} of the same without"
            )
            if ("llama.cpp", users, targets) in rates:
                times = rates[server, users, targets] / rates["llama.cpp", users, targets]
                lines[-1] += f", {times:.2f} times llama.cpp with adapters"
        elif server.startswith(OURS):
            for other in ("llama.cpp", OURS):
                if other != server and (other, users, "") in rates:
                    times = rates[server, users, ""] / rates[other, users, ""]
                    lines.append(f"- {users} users: {server} without is {times:.2f} times {other} without")
    if OURS in first and CACHING in first:
        times = first[OURS] / first[CACHING]
        lines.append(
            f"- with shared beginnings the prefix cache brings the first token {times:.2f} times as fast"
        )
    return lines


def _figures(figures: Sequence[Figure]) -> list[str]:
    return [
        f"- {each.name}: {each.server}: {statistics.median(each.values):g}"
        + (f" ({min(each.values):g}–{max(each.values):g})" if len(each.values) > 1 else "")
        for each in figures
    ]


def _program(process: psutil.Process) -> str | None:
    """`engine` or `gateway`, when it is one of the two."""
    command = process.cmdline()
    return command[2] if command[1:2] == ["-m"] else None


def _version(llama_server: Path) -> list[str]:
    found = subprocess.run([str(llama_server), "--version"], capture_output=True, text=True, check=False)
    return (found.stdout + found.stderr).strip().splitlines()[-2:]


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server; only ours when left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 25])
    parser.add_argument("--adapters", type=int, default=25)
    parser.add_argument(
        "--targets", nargs="+", default=["all"], help="what adapters change: all, or a list such as q,v"
    )
    parser.add_argument("--quantization", choices=("int8", "nf4"), help="measure ours also with such a base")
    parser.add_argument("--shared-prefix", action="store_true", help="prompts that begin alike, by adapter")
    parser.add_argument("--lone", action="store_true", help="time to first token with nothing else to do")
    parser.add_argument("--idle", action="store_true", help="processor use with nothing to do")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests-per-user", type=int, default=2)
    parser.add_argument("--min-requests", type=int, default=4, help="of a cell, for few users")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every cell and the machine as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
