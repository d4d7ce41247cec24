"""The demo: an engine and a gateway, the OpenAI SDK asking them, a short load test. Knows HTTP and process ids only.

Run by scripts/demo, which installs what it needs.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import openai
import psutil
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console
from rich.live import Live
from rich.table import Table

from tuning.tasks import TASKS, Task

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "scripts" / "loraland.toml"
TRAINED = ROOT / "tuning" / "adapters"
CACHE = ROOT / ".cache"
RANDOM = CACHE / "adapters"
SERVER_LOG = CACHE / "demo" / "serve.log"
REPORT = CACHE / "demo" / "report"

BASE = "smollm2-135m"
ADAPTERS = 25
STAGES = 9
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
UTTERANCE = "Book a table for four at an Italian restaurant in Boston tomorrow evening"
SHOWN_TASKS = ("snips_json", "clinc150_domain", "bitext_support", "banking77", "bc5cdr")
"""Tasks whose input is a sentence as people say it, the most telling first; the first two with an adapter are shown."""


class DemoError(Exception):
    """The demo cannot go on; the message says why and where to look."""


def main() -> None:
    options = _parse(sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    try:
        run(console, options)
    except (DemoError, openai.APIError) as error:
        console.print(f"\n{error}", style="bold red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("\nStopped.")
        sys.exit(130)


def run(console: Console, options: argparse.Namespace) -> None:
    """Everything in order; the server is down again when this returns or raises."""
    os.chdir(ROOT)
    tasks = trained_tasks()
    if not options.fake:
        fill_up_adapters(console, ADAPTERS - len(tasks))
    port = options.port if options.port is not None else (8000 if options.serve else free_port())
    started = time.monotonic()
    with server(port, free_port(), fake=options.fake) as process:
        url = f"http://127.0.0.1:{port}"
        with console.status("Loading the model") as status:
            wait_until_ready(process, url, status.update)
        console.print(
            f"Engine and gateway are ready at [bold]{url}/v1[/] ({time.monotonic() - started:.1f} s).\n"
        )
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="not needed")
        list_models(console, client)
        if options.serve:
            show_usage(console, url, tasks)
            status_code = process.wait()
            raise DemoError(f"The server ended with status {status_code}; its log is {SERVER_LOG}.")
        asyncio.run(compare(console, url, tasks[:2]))
        if options.load_seconds:
            load_test(console, url, options.load_seconds)


def trained_tasks() -> list[Task]:
    """The tasks with an adapter in the repository, those to show first."""
    names = sorted(path.parent.name for path in TRAINED.glob("*/adapter_config.json"))
    shown = [name for name in SHOWN_TASKS if name in names]
    return [TASKS[name] for name in [*shown, *(name for name in names if name not in shown)]]


def fill_up_adapters(console: Console, count: int) -> None:
    """Random adapters beside the trained ones, so that there are `ADAPTERS`; kept for the next run."""
    if len(list(RANDOM.glob("random-*/adapter_config.json"))) >= count:
        return
    with console.status(f"Writing {count} random adapters, to have {ADAPTERS} with the trained ones"):
        command = [
            sys.executable,
            "-m",
            "scripts.random_adapters",
            "--out",
            str(RANDOM),
            "--count",
            str(count),
        ]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise DemoError(f"The random adapters could not be made:\n{made.stderr.strip()}")


@contextmanager
def server(port: int, engine_port: int, *, fake: bool) -> Iterator[subprocess.Popen[bytes]]:
    """`loraland serve` in a session of its own, ended with everything below it on leaving, however that comes."""
    SERVER_LOG.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(CONFIG)]
    command += ["--port", str(port), "--engine-port", str(engine_port), *(["--fake"] if fake else [])]
    with SERVER_LOG.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        _stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, show) -> None:
    """Returns when the gateway says that it and its engine can take requests. Raises DemoError."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not _answers(f"{url}/readyz"):
        if process.poll() is not None:
            raise DemoError(f"The server ended while starting:\n{_log_tail(15)}\nIts log is {SERVER_LOG}.")
        if time.monotonic() > deadline:
            raise DemoError(
                f"The server is not ready after {READY_TIMEOUT_S:.0f} s; its log is {SERVER_LOG}."
            )
        show(f"Loading the model  [dim]{_log_tail(1)[:100]}")
        time.sleep(0.2)


def list_models(console: Console, client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    trained = [name for name in names if "/random-" not in name]
    console.print(f"[bold]client.models.list()[/] names {len(names)} models:")
    console.print("  " + "  ".join(trained))
    if len(trained) < len(names):
        console.print(
            f"  and {len(names) - len(trained)} random adapters, for the load test only", style="dim"
        )
    console.print()


@dataclass
class Answer:
    """One streamed answer, as far as it has come."""

    model: str
    text: str = ""
    sent: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None


async def compare(console: Console, url: str, tasks: Sequence[Task]) -> None:
    """Asks base and adapter the same, all streams at once, and shows the answers side by side as they grow."""
    if not tasks:
        return
    console.print(f"The same words to the base model and to two adapters: [bold]{UTTERANCE}[/]")
    rows = [(task, Answer(BASE), Answer(f"{BASE}/{task.name}")) for task in tasks]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="not needed") as client:
        with Live(console=console, refresh_per_second=12) as live:
            streams = [
                _stream(client, task, answer, lambda: live.update(_side_by_side(rows)))
                for task, *answers in rows
                for answer in answers
            ]
            await asyncio.gather(*streams)
            live.update(_side_by_side(rows))
    console.print()


async def _stream(client: openai.AsyncOpenAI, task: Task, answer: Answer, changed) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": task.instruction},
        {"role": "user", "content": UTTERANCE},
    ]
    stream = await client.chat.completions.create(
        model=answer.model, messages=messages, temperature=0, max_tokens=60, stream=True
    )
    async for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            if answer.first_token_s is None:
                answer.first_token_s = time.perf_counter() - answer.sent
            answer.text += text
            changed()


def _side_by_side(rows: Sequence[tuple[Task, Answer, Answer]]) -> Table:
    table = Table("system message", f"base model: {BASE}", "adapter", show_lines=True, expand=True)
    for task, base, tuned in rows:
        instruction = task.instruction if len(task.instruction) < 160 else f"{task.instruction[:157]}..."
        cells = [f"[dim]{answer.model}[/]\n{_escaped(_compact(answer.text))}" for answer in (base, tuned)]
        table.add_row(_escaped(instruction), *cells)
    return table


def load_test(console: Console, url: str, seconds: float) -> None:
    """Locust's users on the running server; the table comes from the load test itself. Raises DemoError."""
    console.print(
        f"Load test with Locust: base, 1 adapter, {ADAPTERS} adapters; 1, 5, 10 users ({seconds:.0f} s)."
    )
    shutil.rmtree(REPORT, ignore_errors=True)
    command = [sys.executable, "-m", "loadtest", "--base-url", url, "--model", BASE, "--out", str(REPORT)]
    command += [
        "--stages",
        f"base,1,{ADAPTERS}",
        "--users",
        "1,5,10",
        "--stage-seconds",
        str(seconds / STAGES),
    ]
    process = subprocess.Popen([*command, "--ignore-eos", "--fail-on-error"])
    try:
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            process.kill()
    if status:
        raise DemoError(f"The load test ended with status {status}; the server's log is {SERVER_LOG}.")


def show_usage(console: Console, url: str, tasks: Sequence[Task]) -> None:
    """One question to an adapter, as curl and Python ask it."""
    if tasks:
        model, instruction = f"{BASE}/{tasks[0].name}", tasks[0].instruction
    else:
        model, instruction = BASE, "You are a helpful assistant."
    question = {"system": instruction, "user": UTTERANCE}
    messages = [{"role": role, "content": content} for role, content in question.items()]
    lines = "".join(f"        {json.dumps(message)},\n" for message in messages)
    body = json.dumps({"model": model, "messages": messages, "temperature": 0}, indent=2)
    console.print("With curl:\n", style="bold")
    print(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d @- <<'EOF'\n{body}\nEOF\n")
    console.print("In Python:\n", style="bold")
    print(f"""from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="not needed")
answer = client.chat.completions.create(
    model="{model}",
    temperature=0,
    messages=[
{lines}    ],
)
print(answer.choices[0].message.content)
""")
    console.print(f"The server's log is {SERVER_LOG}. Ctrl-C stops everything.")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _log_tail(lines: int) -> str:
    text = SERVER_LOG.read_text(errors="replace").rstrip().splitlines()
    return "\n".join(text[-lines:]) if text else ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server; what has not ended in time is killed, with its descendants."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Gathered first: once the parent is gone, nobody could name them.
    below = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _compact(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip())


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def _on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Serves SmolLM2 with task adapters, asks it, and measures it."
    )
    parser.add_argument(
        "--serve", action="store_true", help="leave the server running and print how to ask it"
    )
    parser.add_argument(
        "--port", type=int, help="port of the gateway (default: a free one; with --serve 8000)"
    )
    parser.add_argument(
        "--load-seconds", type=float, default=90, help="length of the load test; 0 leaves it out"
    )
    parser.add_argument("--fake", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
