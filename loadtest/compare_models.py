"""`loraland compare`: options → both sides' answers → table, page, JSON. Measures and scores nothing itself."""

import asyncio
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from loadtest.answer_journal import Answer, AnswerJournal, JournalError
from loadtest.asker import HopelessError, open_asker
from loadtest.contest import Example, Priced, pair_up, read_references, task_contest
from loadtest.contest_report import (
    ContestRecord,
    SideFacts,
    contest_table,
    verdict_words,
    write_json,
    write_page,
)
from loadtest.contest_run import Side, SideName, Stopped, answers_of, collect, warm_up, worst_cost
from loadtest.plan import is_loopback
from loadtest.prices import LIST_PRICES, PRICES_SEEN, TokenPrice, price_of, read_prices
from loadtest.run import describe_machine
from loadtest.spending import SpendingCap
from tuning.tasks import TASKS, Row, Task, load_rows

EXIT_STOPPED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
JOURNAL_FILE = "answers.jsonl"
OPENAI_HOST = "api.openai.com"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class UsageError(Exception):
    """Options that cannot be; the message says what to change."""


@app.command()
def compare(
    task: Annotated[list[str], typer.Option(help="Task whose held-out examples are asked; may be repeated.")],
    left: Annotated[str, typer.Option(help="Model of the left side; {task} in it is the task's name.")],
    right: Annotated[str, typer.Option(help="Model of the right side; {task} in it is the task's name.")],
    left_url: Annotated[str, typer.Option(help="Its server, with or without /v1.")] = "http://127.0.0.1:8000",
    right_url: Annotated[str | None, typer.Option(help="Its server; the left side's when left out.")] = None,
    data: Annotated[
        Path, typer.Option(envvar="LORALAND_DATA", help="Folder with <task>.test.jsonl.", file_okay=False)
    ] = Path("data"),
    rows: Annotated[int, typer.Option(min=1, help="The first so many examples of each task.")] = 100,
    concurrency: Annotated[
        int, typer.Option(min=1, max=256, help="Requests to a side at the same time.")
    ] = 4,
    max_spend: Annotated[
        float,
        typer.Option(min=0.0, help="US dollars of token prices that all runs into --out may spend in all."),
    ] = 5.0,
    prices: Annotated[
        Path | None,
        typer.Option(help="TOML file of token prices, over the list prices.", exists=True, dir_okay=False),
    ] = None,
    left_gpu_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Price of the left side's machine, US dollars an hour.")
    ] = None,
    right_gpu_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Price of the right side's machine, US dollars an hour.")
    ] = None,
    left_key_env: Annotated[
        str | None, typer.Option(help="Variable with its API key; OPENAI_API_KEY at OpenAI, else none.")
    ] = None,
    right_key_env: Annotated[
        str | None, typer.Option(help="Variable with its API key; OPENAI_API_KEY at OpenAI, else none.")
    ] = None,
    left_body: Annotated[
        str, typer.Option(help="JSON object of fields for its requests; null takes one away.")
    ] = "{}",
    right_body: Annotated[
        str, typer.Option(help="JSON object of fields for its requests; null takes one away.")
    ] = "{}",
    paper_quality: Annotated[
        Path | None,
        typer.Option(help="CSV of the paper's scores, for a column of its GPT-4.", dir_okay=False),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(min=1.0, help="Longest silence before an answer is broken.")
    ] = 120.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of answers and reports; the same one goes on.", file_okay=False),
    ] = None,
) -> None:
    """Ask two models the same held-out examples, streaming, and report quality, latency and cost side by side.

    Every answer is kept as it comes: the same command goes on where an interruption, a rate limit or the spending cap
    ended the last run, and pays for no answer twice. Exit code 0: everything was asked; 1: not; 2: bad options.
    """
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        table = {**LIST_PRICES, **(read_prices(prices) if prices else {})}
        sides = [
            _side("left", left, left_url, left_key_env, left_gpu_hour, left_body, table),
            _side("right", right, right_url or left_url, right_key_env, right_gpu_hour, right_body, table),
        ]
        tasks = [(_task(name), _rows(data, name, rows)) for name in dict.fromkeys(task)]
        for side in sides:
            worst_cost(side.priced, side.body(*_first(tasks)))
        references = {t.name: read_references(paper_quality, t) if paper_quality else [] for t, _ in tasks}
        directory = out or Path(".cache/compare") / _slug(f"{left}-against-{right}")
        journal = AnswerJournal(directory / JOURNAL_FILE)
    except (UsageError, JournalError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_USAGE) from None
    started = time.time()
    with journal:
        cap = SpendingCap(max_spend, journal.spent)
        stopped, interrupted = asyncio.run(
            _ask_all(sides, tasks, journal, cap, concurrency, timeout_s, console)
        )
        contests, shown = [], []
        for each, its_rows in tasks:
            answers = [answers_of(side, each, its_rows, journal) for side in sides]
            examples = pair_up(each, its_rows, *answers)
            shown.append((each.name, examples))
            contests.append(
                task_contest(
                    each,
                    its_rows,
                    examples,
                    (sides[0].model_for(each), sides[1].model_for(each)),
                    (sides[0].priced, sides[1].priced),
                    references[each.name],
                )
            )
        record = ContestRecord(
            command=shlex.join(["loraland", "compare", *sys.argv[1:]]),
            started_unix=started,
            left=_facts(sides[0]),
            right=_facts(sides[1]),
            tasks=tuple(contests),
            concurrency=concurrency,
            spent=journal.spent,
            cap=max_spend,
            machine=describe_machine(),
            notes=tuple(_notes(sides, tasks, shown, used_list=prices is None)),
            stopped=stopped,
        )
    _report(record, directory, shown, console)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    raise typer.Exit(EXIT_STOPPED if stopped else 0)


async def _ask_all(
    sides: Sequence[Side],
    tasks: Sequence[tuple[Task, Sequence[Row]]],
    journal: AnswerJournal,
    cap: SpendingCap,
    concurrency: int,
    timeout_s: float,
    console: Console,
) -> tuple[str | None, bool]:
    """One side after the other, so that they do not take the client or a shared server from each other.

    Returns why not everything was asked, and whether a signal ended it. The first Ctrl-C lets the requests under way
    end: they are paid for. The second leaves them.
    """
    stop = asyncio.Event()
    asking = asyncio.current_task()
    assert asking is not None
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            asking.cancel()
        else:
            console.print("Waiting for the answers under way; Ctrl-C again leaves them.", style="yellow")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        async with AsyncExitStack() as stack:
            for side in sides:
                key = os.environ.get(side.key_env) if side.key_env else None
                asker = await stack.enter_async_context(
                    open_asker(side.url, key, concurrency=concurrency, timeout_s=timeout_s)
                )
                for task, rows in tasks:
                    known = answers_of(side, task, rows, journal)
                    have = sum(answer.outcome == "answered" for answer in known.values())
                    title = f"{task.name}: {side.model_for(task)}"
                    if have == len(rows):
                        console.print(f"{title}: all {have} answers are there", markup=False, highlight=False)
                        continue
                    await warm_up(side, task, asker)
                    with _Progress(console, title, have, len(rows), cap) as progress:
                        await collect(side, task, rows, asker, journal, cap, stop, progress.count)
                    console.print(
                        f"{title}: {len(rows)} asked, {have} of them before", markup=False, highlight=False
                    )
    except (Stopped, HopelessError, JournalError) as error:
        return str(error), stop.is_set()
    except asyncio.CancelledError:
        return "It was interrupted, and the requests under way were left.", True
    return None, False


class _Progress:
    """One line while a side is asked; nothing where the output is no terminal."""

    def __init__(self, console: Console, title: str, have: int, total: int, cap: SpendingCap) -> None:
        self._status = console.status(escape(title))
        self._title, self._have, self._total, self._cap = title, have, total, cap

    def __enter__(self) -> "_Progress":
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def count(self, _answer: Answer) -> None:
        self._have += 1
        self._status.update(
            escape(f"{self._title}: {self._have} of {self._total}, ${self._cap.spent:.4f} spent")
        )


def _report(
    record: ContestRecord, directory: Path, shown: Sequence[tuple[str, Sequence[Example]]], console: Console
) -> None:
    console.print(contest_table(record))
    for contest in record.tasks:
        if words := verdict_words(contest):
            console.print(words, markup=False, highlight=False)
    for note in record.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    console.print(f"spent by token prices: ${record.spent:.4f} of ${record.cap:g}", highlight=False)
    if record.stopped:
        console.print(
            f"stopped: {record.stopped} The same command goes on where this ended.",
            style="bold red",
            markup=False,
            highlight=False,
        )
    try:
        write_json(directory, record)
        page = write_page(directory, record, shown)
    except OSError as error:
        console.print(
            f"error: the report cannot be written: {error}", style="red", markup=False, highlight=False
        )
        raise typer.Exit(EXIT_STOPPED) from None
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _side(
    name: SideName,
    model: str,
    url: str,
    key_env: str | None,
    gpu_hour: float | None,
    body: str,
    table: dict[str, TokenPrice],
) -> Side:
    address = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--{name}-url {url} is not an http:// or https:// address")
    if parts.username or parts.password:
        raise UsageError(f"--{name}-url must not hold a password; name a variable with --{name}-key-env")
    at_openai = parts.hostname == OPENAI_HOST
    key_env = ("OPENAI_API_KEY" if at_openai else "") if key_env is None else key_env
    if key_env and not os.environ.get(key_env):
        raise UsageError(f"the variable {key_env} with the {name} side's API key is not set")
    try:
        extra: dict[str, Any] = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UsageError(f"--{name}-body is not a JSON object: {error}") from None
    if extra.keys() & {"model", "messages", "stream", "stream_options"}:
        raise UsageError(f"--{name}-body cannot change model, messages, stream or stream_options")
    tokens = None if gpu_hour is not None else price_of(model, table)
    if at_openai and tokens is None:
        raise UsageError(
            f"no price is known for {model}: give one with --prices, so that the spending cap can hold"
        )
    return Side(
        name=name,
        url=address,
        model=model,
        key_env=key_env,
        extra=extra,
        priced=Priced(tokens=tokens, hour=gpu_hour),
    )


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(f"there is no task {name!r}; known: {', '.join(sorted(TASKS))}")
    return TASKS[name]


def _rows(data: Path, task: str, count: int) -> list[Row]:
    try:
        found = load_rows(data, task, "test")[:count]
    except FileNotFoundError:
        raise UsageError(
            f"there is no {task}.test.jsonl in {data}: name the folder of the rows with --data"
        ) from None
    if not found:
        raise UsageError(f"{task}.test.jsonl in {data} is empty")
    if len({row.id for row in found}) < len(found):
        raise UsageError(f"{task}.test.jsonl in {data} has two rows of one id")
    return found


def _first(tasks: Sequence[tuple[Task, Sequence[Row]]]) -> tuple[Task, Row]:
    task, rows = tasks[0]
    return task, rows[0]


def _facts(side: Side) -> SideFacts:
    request: dict[str, object] = {"temperature": 0, "max_tokens": "as the task needs", **side.extra}
    fields = {name: value for name, value in request.items() if value is not None}
    return SideFacts(model=side.model, url=side.url, price=side.priced.words, request=fields)


def _notes(
    sides: Sequence[Side],
    tasks: Sequence[tuple[Task, Sequence[Row]]],
    shown: Sequence[tuple[str, Sequence[Example]]],
    *,
    used_list: bool,
) -> list[str]:
    notes: list[str] = []
    if any(is_loopback(side.url) for side in sides):
        notes.append("A server shared this machine with the client: each took processor time from the other.")
    if used_list and any(side.priced.tokens is not None for side in sides):
        notes.append(f"Token prices are list prices as seen in {PRICES_SEEN}; --prices gives your own.")
    if any(side.priced.hour is not None for side in sides):
        notes.append(
            "The price an hour is spread over the requests of this comparison; a busier machine costs less for each."
        )
    answers = [
        answer for _, of_task in shown for e in of_task for answer in (e.left, e.right) if answer is not None
    ]
    failed = [answer for answer in answers if answer.outcome == "failed"]
    if failed:
        notes.append(
            f"{len(failed)} answers failed, in no figure; the last: {failed[-1].error}. The same command asks them again."
        )
    if any(a.outcome == "answered" and a.output_tokens is None for a in answers):
        notes.append(
            "A server gave no usage for some answers: they are in no token count, and cost their worst case."
        )
    cut = sum(answer.finish_reason == "length" for answer in answers)
    if cut:
        notes.append(f"{cut} answers were cut off at their limit of tokens.")
    return notes


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def main() -> None:
    app(prog_name="loraland compare")


if __name__ == "__main__":
    main()
