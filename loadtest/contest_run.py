"""Gets both sides' answers to the examples of a task: what the journal lacks is asked. Knows no score, no report."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from loadtest.answer_journal import Answer, AnswerJournal, Asked, question_key
from loadtest.asker import Asker, Heard, HopelessError
from loadtest.contest import Priced
from loadtest.spending import SpendingCap
from tuning.tasks import Row, Task

SideName = Literal["left", "right"]
FAILED_IN_A_ROW = 5
_TOKENS_A_MESSAGE = 16
"""More than any chat template adds to a message."""
_OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to ask, and how."""

    name: SideName
    url: str
    """Without `/v1`."""
    model: str
    """`{task}` in it stands for the task's name."""
    key_env: str
    """The environment variable with the API key; empty: no key is sent."""
    extra: dict[str, Any]
    """Fields to put into every request's body; None takes one away."""
    priced: Priced

    def model_for(self, task: Task) -> str:
        return self.model.replace("{task}", task.name)

    def body(self, task: Task, row: Row) -> dict[str, Any]:
        """The request: greedy, as long as the task's answers may be, unless `extra` says otherwise."""
        body: dict[str, Any] = {
            "model": self.model_for(task),
            "messages": task.messages(row.fields),
            "temperature": 0,
            "max_tokens": task.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        return {name: value for name, value in body.items() if value is not None}


class Stopped(Exception):
    """Asking ended before everything was asked; the message says why, and that nothing is lost."""


def worst_cost(priced: Priced, body: Mapping[str, Any]) -> float:
    """The most that a request can cost by token prices: a token is at least one byte, the answer as long as allowed.

    Raises ValueError when there is a price and nothing bounds the answer.
    """
    if priced.tokens is None:
        return 0.0
    limit = next((body[name] for name in _OUTPUT_LIMITS if isinstance(body.get(name), int)), None)
    if limit is None:
        raise ValueError(
            "a side with token prices needs max_tokens or max_completion_tokens: nothing else bounds its cost"
        )
    prompt = sum(len(str(m["content"]).encode()) + _TOKENS_A_MESSAGE for m in body["messages"])
    return priced.tokens.cost(prompt, limit * body.get("n", 1))


async def collect(
    side: Side,
    task: Task,
    rows: Sequence[Row],
    asker: Asker,
    journal: AnswerJournal,
    cap: SpendingCap,
    stop: asyncio.Event,
    heard_one: Callable[[Answer], None],
) -> None:
    """Asks the side everything that the journal lacks an answer to, and writes each answer into it as it comes.

    Raises Stopped when `stop` was set (requests under way end first), the spending cap is reached, the server is of no
    use, or `FAILED_IN_A_ROW` answers failed; JournalError when an answer could not be kept.
    """
    bodies = {row.id: side.body(task, row) for row in rows}
    keys = {
        row.id: question_key(side.url, side.name, bodies[row.id], f"{task.name}/{row.id}") for row in rows
    }
    known = journal.good_answers(list(keys.values()))
    missing = iter([row for row in rows if keys[row.id] not in known])
    reasons: list[str] = []
    failed_in_a_row = 0

    async def ask_on() -> None:
        nonlocal failed_in_a_row
        for row in missing:
            if stop.is_set():
                reasons.append("It was interrupted.")
            if reasons:
                return
            body, key = bodies[row.id], keys[row.id]
            worst = worst_cost(side.priced, body)
            if not await cap.reserve(worst):
                reasons.append(
                    f"The spending cap of ${cap.cap:g} would be passed: ${cap.spent:.4f} are spent, and the next request "
                    f"to {side.model_for(task)} may cost ${worst:.4f}."
                )
                return
            cost = 0.0
            try:
                if worst:
                    journal.append(Asked(key=key, worst_cost=worst))
                cost = worst
                heard = await asker.ask(body)
                cost = _cost(side.priced, heard, worst)
                answer = _answer(side, task, row, key, heard, cost)
                journal.append(answer)
            except HopelessError as error:
                cost = 0.0
                reasons.append(str(error))
                if worst:
                    journal.append(_refused(side, task, row, key, str(error)))
                return
            finally:
                await cap.settle(worst, cost)
            failed_in_a_row = failed_in_a_row + 1 if answer.outcome == "failed" else 0
            heard_one(answer)
            if failed_in_a_row >= FAILED_IN_A_ROW:
                reasons.append(
                    f"{side.model_for(task)}: {failed_in_a_row} answers in a row failed: {answer.error}."
                )

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(asker.concurrency):
                group.create_task(ask_on())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if reasons:
        raise Stopped(reasons[0])


async def warm_up(side: Side, task: Task, asker: Asker) -> None:
    """One token, so that no example pays for loading an adapter. Only where tokens cost nothing."""
    if side.priced.tokens is None:
        body = side.body(task, Row(id="", fields=_Blank(), target=""))
        limit = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        heard = await asker.ask({**body, limit: 1})
        if heard.status is not None and heard.status >= 400:
            raise Stopped(f"{side.model_for(task)} at {side.url}: {heard.error}")


def answers_of(side: Side, task: Task, rows: Sequence[Row], journal: AnswerJournal) -> dict[str, Answer]:
    """Example id → its answer, good or failed, as far as there are any."""
    found: dict[str, Answer] = {}
    for row in rows:
        key = question_key(side.url, side.name, side.body(task, row), f"{task.name}/{row.id}")
        if key in journal.answers:
            found[row.id] = journal.answers[key]
    return found


class _Blank(dict[str, str]):
    def __missing__(self, _field: str) -> str:
        return "."


def _cost(priced: Priced, heard: Heard, worst: float) -> float:
    """By the server's own counts; the worst case where it gave none but may charge."""
    if priced.tokens is None or (heard.error and not heard.maybe_charged):
        return 0.0
    if heard.prompt_tokens is None or heard.output_tokens is None:
        return worst
    return priced.tokens.cost(heard.prompt_tokens, heard.output_tokens, heard.cached_tokens or 0)


def _answer(side: Side, task: Task, row: Row, key: str, heard: Heard, cost: float) -> Answer:
    return Answer(
        key=key,
        task=task.name,
        example=row.id,
        side=side.name,
        model=side.model_for(task),
        asked_unix=round(heard.asked_unix, 6),
        text=heard.text,
        outcome="failed" if heard.error else "answered",
        error=heard.error,
        status=heard.status,
        finish_reason=heard.finish_reason,
        ttft_s=_microseconds(heard.ttft_s),
        total_s=_microseconds(heard.total_s),
        streaming_s=_microseconds(heard.streaming_s),
        connect_s=round(heard.connect_s, 6),
        attempts=heard.attempts,
        waited_s=round(heard.waited_s, 6),
        prompt_tokens=heard.prompt_tokens,
        cached_tokens=heard.cached_tokens,
        output_tokens=heard.output_tokens,
        events=heard.events,
        cost=cost,
    )


def _refused(side: Side, task: Task, row: Row, key: str, error: str) -> Answer:
    return Answer(
        key=key,
        task=task.name,
        example=row.id,
        side=side.name,
        model=side.model_for(task),
        asked_unix=0.0,
        text="",
        outcome="failed",
        error=error,
    )


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
