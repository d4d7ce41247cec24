"""Evaluation against a small OpenAI-shaped server, through the real openai client."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tuning.card import Scores, TrainingFacts, save_facts
from tuning.evaluate import ask, read_scores, score_table, score_task, trained_tasks, update_cards
from tuning.tasks import TASKS, Row

TASK = TASKS["clinc150_domain"]
ROWS = [Row(id=str(i), fields={"text": f"message {i}"}, target=TASK.labels[i % 3]) for i in range(9)]
FACTS = TrainingFacts(
    task=TASK.name,
    base="org/base",
    rows=100,
    steps=10,
    batch=4,
    learning_rate=2e-3,
    seed=0,
    rank=8,
    alpha=16,
    max_tokens=110,
    final_loss=0.25,
)


class Endpoint:
    """Answers with the right label under an adapter's name and with the first label under the base's."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.running = 0
        self.most_running = 0
        self.broken = False

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0.01)
        self.running -= 1
        if self.broken:
            return web.json_response(
                {"error": {"message": "no such model", "code": "model_not_found"}}, status=404
            )
        number = int(body["messages"][1]["content"].removeprefix("message "))
        content = TASK.labels[number % 3] if "/" in body["model"] else TASK.labels[0]
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return web.json_response(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
            }
        )


@pytest.fixture
async def endpoint() -> AsyncIterator[tuple[Endpoint, openai.AsyncOpenAI]]:
    answering = Endpoint()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answering.chat)
    async with (
        TestServer(app) as server,
        openai.AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="none", max_retries=0) as client,
    ):
        yield answering, client


async def test_base_and_adapter_get_the_same_greedy_request_and_are_scored(
    endpoint: tuple[Endpoint, openai.AsyncOpenAI],
) -> None:
    answering, client = endpoint
    scores, untuned, tuned = await score_task(client, "tiny", TASK, ROWS, concurrency=4)
    assert scores == Scores(metric="accuracy", rows=9, base=0.3333, tuned=1.0, majority=0.3333)
    assert untuned == [TASK.labels[0]] * 9
    assert tuned == [row.target for row in ROWS]
    asked: dict[str, list[dict]] = {"tiny": [], "tiny/clinc150_domain": []}
    for body in answering.bodies:
        assert body["temperature"] == 0
        asked[body["model"]].append(body["messages"])
    by_text = [sorted(messages, key=str) for messages in asked.values()]
    assert by_text[0] == by_text[1]


async def test_no_more_requests_than_asked_run_at_once(endpoint: tuple[Endpoint, openai.AsyncOpenAI]) -> None:
    answering, client = endpoint
    await ask(client, "tiny", TASK, ROWS, concurrency=3)
    assert answering.most_running == 3


async def test_a_failed_request_ends_the_evaluation_instead_of_scoring_zero(
    endpoint: tuple[Endpoint, openai.AsyncOpenAI],
) -> None:
    answering, client = endpoint
    answering.broken = True
    with pytest.raises(ExceptionGroup) as caught:
        await ask(client, "tiny", TASK, ROWS, concurrency=3)
    assert caught.group_contains(openai.NotFoundError)


def test_cards_and_scores_file_take_the_new_scores_and_keep_the_others(tmp_path: Path) -> None:
    old = Scores(metric="accuracy", rows=5, base=0.1, tuned=0.2)
    (tmp_path / "scores.json").write_text(
        json.dumps({"viggo": {"metric": "m", "rows": 5, "base": 0.1, "tuned": 0.2}})
    )
    (tmp_path / TASK.name).mkdir()
    (tmp_path / TASK.name / "adapter_config.json").write_text("{}")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "adapter_config.json").write_text("{}")
    save_facts(FACTS, tmp_path / TASK.name)
    assert trained_tasks(tmp_path) == [TASK.name]

    fresh = Scores(metric="accuracy", rows=9, base=0.125, tuned=0.875, majority=0.333)
    update_cards(tmp_path, {TASK.name: fresh})
    scores = read_scores(tmp_path / "scores.json")
    assert scores[TASK.name] == fresh
    assert (scores["viggo"].base, scores["viggo"].tuned) == (old.base, old.tuned)

    card = (tmp_path / TASK.name / "README.md").read_text()
    for fact in (
        TASK.instruction,
        TASK.licence,
        TASK.source,
        "0.125",
        "0.875",
        "0.333",
        "--steps 10 --batch 4",
    ):
        assert fact in card


def test_table_shows_the_gain_with_its_sign() -> None:
    table = score_table({"viggo": Scores(metric="ROUGE-L F", rows=5, base=0.5, tuned=0.25)})
    assert list(table.columns[-1].cells) == ["-0.250"]
