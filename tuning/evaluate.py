"""Scores base and adapters on held-out rows through an OpenAI-compatible endpoint. Knows only HTTP.

    python -m tuning.evaluate --base-url http://127.0.0.1:8000/v1 --model smollm2-135m --data DATA

asks `smollm2-135m` and `smollm2-135m/<task>` the same prompts at temperature 0 and scores both the same way.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console
from rich.table import Table

from tuning.card import Scores, load_facts, write_card
from tuning.metrics import METRIC_NAMES, majority_share, mean_score
from tuning.tasks import TASKS, Row, Task, load_rows

SCORES_FILE = "scores.json"


async def ask(
    client: AsyncOpenAI, model: str, task: Task, rows: Sequence[Row], concurrency: int
) -> list[str]:
    """The model's greedy answers, in the rows' order, at most `concurrency` requests at once.

    Raises openai.APIError when a request fails after the client's retries: a missing answer is no score.
    """
    gate = asyncio.Semaphore(concurrency)

    async def answer(row: Row) -> str:
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": task.instruction},
            {"role": "user", "content": task.template.format_map(row.fields)},
        ]
        async with gate:
            reply = await client.chat.completions.create(
                model=model, messages=messages, temperature=0, max_tokens=task.max_new_tokens
            )
        return reply.choices[0].message.content or ""

    async with asyncio.TaskGroup() as group:
        pending = [group.create_task(answer(row)) for row in rows]
    return [job.result() for job in pending]


async def score_task(
    client: AsyncOpenAI, model: str, task: Task, rows: Sequence[Row], concurrency: int
) -> tuple[Scores, list[str], list[str]]:
    """Scores `<model>` and `<model>/<task>` on the rows. Returns the scores and both models' answers."""
    untuned = await ask(client, model, task, rows, concurrency)
    tuned = await ask(client, f"{model}/{task.name}", task, rows, concurrency)
    scores = Scores(
        metric=METRIC_NAMES[task.metric],
        rows=len(rows),
        base=round(mean_score(task, rows, untuned), 4),
        tuned=round(mean_score(task, rows, tuned), 4),
        majority=round(majority_share(rows), 4) if task.metric == "label" else None,
    )
    return scores, untuned, tuned


def trained_tasks(adapters: Path) -> list[str]:
    """Names of the known tasks that have an adapter directory, sorted."""
    return sorted(
        path.parent.name for path in adapters.glob("*/adapter_config.json") if path.parent.name in TASKS
    )


def read_scores(path: Path) -> dict[str, Scores]:
    """Scores by task; empty when there is no file yet. Raises msgspec.DecodeError on a malformed one."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Scores]) if path.exists() else {}


def update_cards(adapters: Path, fresh: dict[str, Scores]) -> None:
    """Merges `fresh` into the folder's scores.json and rewrites the card of every adapter scored."""
    merged = dict(sorted({**read_scores(adapters / SCORES_FILE), **fresh}.items()))
    text = msgspec.json.format(msgspec.json.encode(merged), indent=2)
    (adapters / SCORES_FILE).write_bytes(text + b"\n")
    for name, scores in fresh.items():
        write_card(adapters / name, TASKS[name], load_facts(adapters / name), scores)


def score_table(scores: dict[str, Scores]) -> Table:
    """Base against fine-tuned, a line per task."""
    table = Table("task", "metric", "rows", "majority", "base", "fine-tuned", "gain")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, line in scores.items():
        majority = "" if line.majority is None else f"{line.majority:.3f}"
        gain = f"{line.tuned - line.base:+.3f}"
        table.add_row(
            name, line.metric, str(line.rows), majority, f"{line.base:.3f}", f"{line.tuned:.3f}", gain
        )
    return table


async def evaluate(arguments: argparse.Namespace, console: Console) -> dict[str, Scores]:
    names = arguments.tasks or trained_tasks(arguments.adapters)
    scored: dict[str, Scores] = {}
    async with AsyncOpenAI(
        base_url=arguments.base_url, api_key=arguments.api_key, timeout=arguments.timeout_s
    ) as client:
        for name in names:
            task = TASKS[name]
            rows = load_rows(arguments.data, name, "test")[: arguments.rows]
            started = time.monotonic()
            scored[name], untuned, tuned = await score_task(
                client, arguments.model, task, rows, arguments.concurrency
            )
            console.print(
                f"{name}: {scored[name].metric} {scored[name].base:.3f} -> {scored[name].tuned:.3f} "
                f"({len(rows)} rows, {time.monotonic() - started:.0f} s)"
            )
            for row, before, after in list(zip(rows, untuned, tuned, strict=True))[: arguments.show]:
                console.print(
                    f"  wanted {row.target!r}\n  base   {before!r}\n  tuned  {after!r}", markup=False
                )
            if arguments.update_cards:
                update_cards(arguments.adapters, {name: scored[name]})
    return scored


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="sent as the bearer token")
    parser.add_argument(
        "--model", default="smollm2-135m", help="the base model's name; adapters are <model>/<task>"
    )
    parser.add_argument("--data", required=True, type=Path, help="folder with <task>.test.jsonl")
    parser.add_argument(
        "--tasks", nargs="*", choices=sorted(TASKS), help="default: every task with an adapter"
    )
    parser.add_argument(
        "--adapters", type=Path, default=Path("tuning/adapters"), help="folder of the adapters"
    )
    parser.add_argument("--rows", type=int, default=None, help="only the first N held-out rows")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="per request")
    parser.add_argument("--show", type=int, default=0, help="print the first N answers of both")
    parser.add_argument(
        "--update-cards", action="store_true", help="write the scores into scores.json and the cards"
    )
    arguments = parser.parse_args()
    console = Console()
    scored = asyncio.run(evaluate(arguments, console))
    console.print(score_table(scored))
    better = sum(line.tuned > line.base for line in scored.values())
    console.print(f"{better} of {len(scored)} adapters score higher than the base model.")


if __name__ == "__main__":
    main()
