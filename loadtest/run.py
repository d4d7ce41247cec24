"""`python -m loadtest`: options → plan → load process → rows, table, HTML page. Measures nothing itself."""

import os
import platform
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Annotated, Literal, cast
from urllib.parse import urlsplit, urlunsplit

import msgspec
import psutil
import typer
from rich.console import Console

from loadtest.adapters import (
    Catalog,
    CatalogError,
    NoModelListError,
    choose_model,
    order_adapters,
    read_catalog,
)
from loadtest.metrics import StageFigures, stage_figures
from loadtest.plan import Endpoint, PromptKind, RunPlan, Stage, mode_name
from loadtest.progress import StageProgress
from loadtest.record import (
    ROWS_FILE,
    Machine,
    Message,
    RequestRow,
    RunRecord,
    StageEnded,
    StageStarted,
    Trouble,
    write_run,
)
from loadtest.report import print_report, write_page

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class EndpointOption(StrEnum):
    chat = "chat"
    completions = "completions"


class PromptOption(StrEnum):
    words = "words"
    tasks = "tasks"


class MaxTokensField(StrEnum):
    max_tokens = "max_tokens"
    max_completion_tokens = "max_completion_tokens"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    app(prog_name="python -m loadtest")


@app.command()
def loadtest(
    base_url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Base model; the server's only one when left out.")
    ] = None,
    stages: Annotated[
        str, typer.Option(help="Adapter choices, in order: base, a number of adapters, or all.")
    ] = "base,1,25",
    users: Annotated[
        str, typer.Option(help="Concurrent users, each count for each adapter choice.")
    ] = "1,5,10",
    stage_seconds: Annotated[float, typer.Option(help="Length of a stage, its ramp included.")] = 10.0,
    ramp_seconds: Annotated[
        float, typer.Option(help="Users start evenly over this time; not measured.")
    ] = 1.0,
    think_seconds: Annotated[float, typer.Option(help="Pause of a user after an answer.")] = 0.0,
    prompts: Annotated[
        PromptOption, typer.Option(help="words: random ones of --prompt-tokens; tasks: written inputs.")
    ] = PromptOption.words,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Approximate length of a `words` prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens at most.")] = 32,
    max_tokens_field: Annotated[
        MaxTokensField, typer.Option(help="How the server wants to hear it.")
    ] = MaxTokensField.max_tokens,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for exactly --max-tokens tokens (not at OpenAI).")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Left to the server when not given.")] = None,
    endpoint: Annotated[EndpointOption, typer.Option(help="Which API to load.")] = EndpointOption.chat,
    adapters: Annotated[
        list[str] | None, typer.Option(help="Only adapters that match this pattern; may be repeated.")
    ] = None,
    adapters_file: Annotated[
        Path | None, typer.Option(help="Adapter names, one a line, in the order to use them.", exists=True)
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the API key, if one is needed.")
    ] = "OPENAI_API_KEY",
    seed: Annotated[int, typer.Option(help="Of prompts and of the choice of adapters.")] = 0,
    nonce: Annotated[
        str | None, typer.Option(help="Opens every prompt; new for every run when left out.")
    ] = None,
    usage: Annotated[
        bool, typer.Option(help="Ask the server for its token counts (stream_options.include_usage).")
    ] = True,
    warm_up: Annotated[bool, typer.Option(help="First one short request to each model of a stage.")] = True,
    timeout_s: Annotated[float, typer.Option(help="Longest silence before a request has failed.")] = 120.0,
    out: Annotated[
        Path | None, typer.Option(help="Directory for rows, run.json and report.html.", file_okay=False)
    ] = None,
    fail_on_error: Annotated[
        bool, typer.Option("--fail-on-error", help="Exit with 1 if any request failed.")
    ] = False,
) -> None:
    """Loads an OpenAI-compatible server with streaming users and reports the latency they got.

    Closed loop: each user sends its next request when its last answer is complete. Ctrl-C ends the run early and
    still reports what was measured. Exit code 0: every stage measured requests; 1: one did not; 2: bad options.
    """
    console = Console(width=None if sys.stdout.isatty() else 132)
    api_key = os.environ.get(api_key_env)
    url = base_url.rstrip("/").removesuffix("/v1")
    try:
        if not stage_seconds > ramp_seconds >= 0:
            raise CatalogError("--stage-seconds must be more than --ramp-seconds, and neither negative")
        if min(think_seconds, timeout_s) < 0:
            raise CatalogError("times cannot be negative")
        if temperature is not None and not 0 <= temperature < 100:
            raise CatalogError("--temperature must be a number from 0")
        catalog = ask_catalog(url, api_key, model=model, stages=stages)
        base = choose_model(catalog, model)
        listed = adapters_file.read_text().split() if adapters_file else None
        offered = catalog.adapters.get(base, ())
        planned = plan_stages(base, stages, users, order_adapters(offered, adapters or (), listed))
    except CatalogError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_USAGE) from None
    plan = RunPlan(
        run=new_run_name(),
        base_url=url,
        endpoint=cast(Endpoint, endpoint.value),
        model=base,
        stages=planned,
        stage_seconds=stage_seconds,
        ramp_seconds=ramp_seconds,
        think_seconds=think_seconds,
        prompt_kind=cast(PromptKind, prompts.value),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        max_tokens_field=cast(Literal["max_tokens", "max_completion_tokens"], max_tokens_field.value),
        ignore_eos=ignore_eos,
        temperature=temperature,
        ask_usage=usage,
        warm_up=warm_up,
        timeout_s=timeout_s,
        api_key_env=api_key_env,
        seed=seed,
        nonce=nonce if nonce is not None else new_nonce(),
    )
    raise typer.Exit(execute(plan, catalog, out, console, fail_on_error=fail_on_error))


def execute(
    plan: RunPlan, catalog: Catalog, out: Path | None, console: Console, *, fail_on_error: bool
) -> int:
    """Runs a plan and writes its report to `out`, or under `.cache/loadtest`. Returns the exit code."""
    directory = out or Path(".cache/loadtest") / plan.run
    directory.mkdir(parents=True, exist_ok=True)
    record = RunRecord(
        plan=_without_credentials(plan),
        command=_command_line(plan.base_url),
        started_unix=time.time(),
        machine=describe_machine(),
        server=catalog.server,
    )
    record, rows = measure(plan, record, directory, console)
    write_run(directory, record)
    figures = figures_of(record, rows)
    page = write_page(directory, record, rows, figures)
    print_report(console, record, rows, figures, page)
    return exit_code(record, figures, fail_on_error=fail_on_error)


def new_run_name() -> str:
    """After the present time, to the second."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def new_nonce() -> str:
    """What no earlier run's prompts open with."""
    return secrets.token_hex(8)


def plan_stages(base: str, stages: str, users: str, adapters: Sequence[str]) -> tuple[Stage, ...]:
    """Every adapter choice with every user count, choices outermost. Raises CatalogError naming what is wrong."""
    counts: list[int] = []
    for text in _items(stages, "--stages"):
        if text == "base":
            count = 0
        elif text == "all":
            count = len(adapters)
        elif text.isdecimal() and int(text) > 0:
            count = int(text)
        else:
            raise CatalogError(f"--stages takes base, all or a number of adapters, not {text!r}")
        if text != "base" and not 0 < count <= len(adapters):
            offer = f"only {len(adapters)}" if adapters else "none"
            raise CatalogError(f"stage {text!r} needs adapters of {base}; the server offers {offer}")
        counts.append(count)
    user_counts: list[int] = []
    for text in _items(users, "--users"):
        if not text.isdecimal() or int(text) < 1:
            raise CatalogError(f"--users takes whole numbers from 1, not {text!r}")
        user_counts.append(int(text))
    if len(set(counts)) < len(counts) or len(set(user_counts)) < len(user_counts):
        raise CatalogError("each adapter choice and each number of users may be named once")
    return tuple(
        Stage(
            mode=mode_name(count),
            users=number,
            models=tuple(adapters[:count]) if count else (base,),
            adapters=count,
        )
        for count in counts
        for number in user_counts
    )


def ask_catalog(url: str, api_key: str | None, *, model: str | None, stages: str) -> Catalog:
    """The server's models. A server without a model list will do when the run needs none of it."""
    try:
        return read_catalog(url, api_key)
    except NoModelListError:
        if model is None or stages.strip() != "base":
            raise
        return Catalog((), {}, None)


def measure(
    plan: RunPlan, record: RunRecord, directory: Path, console: Console
) -> tuple[RunRecord, list[RequestRow]]:
    """Runs the load process, writes each row as it comes, and returns what was measured, however it ended."""
    rows: list[RequestRow] = []
    ended: list[StageEnded] = []
    trouble: str | None = None
    log_path = directory / "worker.log"
    decoder = msgspec.json.Decoder(Message)
    with (
        log_path.open("wb") as log,
        (directory / ROWS_FILE).open("wb") as rows_file,
        StageProgress(console, plan) as progress,
        _load_process(plan, log) as (process, lines),
    ):
        with _stopping(process) as stopped:
            for line in lines:
                match decoder.decode(line):
                    case RequestRow() as row:
                        rows.append(row)
                        rows_file.write(line)
                        rows_file.flush()
                        progress.count(row)
                    case StageStarted(stage=number):
                        progress.start(plan.stages[number])
                    case StageEnded() as end:
                        ended.append(end)
                        stage = plan.stages[end.stage]
                        progress.finish(stage_figures(stage, end, _rows_of(stage, rows)))
                    case Trouble(message=message):
                        trouble = message
            code = process.wait()
        interrupted = bool(stopped)
    if code and not interrupted:
        tail = log_path.read_text(errors="replace").strip().splitlines()[-1:]
        trouble = trouble or f"The load process ended with code {code}: {' '.join(tail)}"
    if not log_path.stat().st_size:
        log_path.unlink()
    record = msgspec.structs.replace(record, stages=tuple(ended), interrupted=interrupted, trouble=trouble)
    return record, rows


def figures_of(record: RunRecord, rows: Sequence[RequestRow]) -> list[StageFigures]:
    """Figures of every stage that ran, in order."""
    stages = [(record.plan.stages[end.stage], end) for end in record.stages]
    return [stage_figures(stage, end, _rows_of(stage, rows)) for stage, end in stages]


def exit_code(record: RunRecord, figures: Sequence[StageFigures], *, fail_on_error: bool) -> int:
    """130 interrupted; 1 when the run gave up, a stage measured nothing, or (if asked) anything failed."""
    if record.interrupted:
        return EXIT_INTERRUPTED
    if record.trouble or not figures or not all(stage.measured for stage in figures):
        return EXIT_FAILED
    if fail_on_error and any(stage.failed for stage in figures):
        return EXIT_FAILED
    return 0


def describe_machine() -> Machine:
    """This machine and the versions of what measures."""
    versions = {"python": platform.python_version()}
    for package in ("loraland", "locust", "gevent", "requests", "urllib3"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        versions=versions,
    )


@contextmanager
def _load_process(plan: RunPlan, log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """In a session of its own, so that Ctrl-C reaches only us and we tell it to stop in its own time."""
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(plan))
        process.stdin.close()
        yield process, process.stdout
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def _stopping(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM: the first ends the stage, the second the process. The list holds the signals that came."""
    received: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        received.append(number)
        process.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _rows_of(stage: Stage, rows: Sequence[RequestRow]) -> list[RequestRow]:
    return [row for row in rows if row.mode == stage.mode and row.users == stage.users]


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise CatalogError(f"{option} is empty")
    return items


def _command_line(url: str) -> str:
    """What the user typed, without a password in the address."""
    typed = shlex.join(["python", "-m", "loadtest", *sys.argv[1:]])
    parts = urlsplit(url)
    return typed.replace(f"{parts.username}:{parts.password}@", "") if parts.password else typed


def _without_credentials(plan: RunPlan) -> RunPlan:
    parts = urlsplit(plan.base_url)
    host = parts.netloc.rpartition("@")[2]
    return msgspec.structs.replace(plan, base_url=urlunsplit((parts.scheme, host, parts.path, "", "")))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
