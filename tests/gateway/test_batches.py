"""`/v1/batches` through the official SDK: every line is answered once, whatever happens meanwhile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from gateway.config import GatewayConfig, ModelConfig
from tests.gateway.conftest import Background, Gateway, wait_until
from tests.gateway.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"


def line(custom_id: str, *, url: str = CHAT, method: str = "POST", **body: Any) -> bytes:
    asked = {"model": "base", "messages": [{"role": "user", "content": custom_id}], **body}
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": asked}).encode() + b"\n"


def begin(sdk: openai.OpenAI, data: bytes, endpoint: Any = CHAT) -> openai.types.Batch:
    file = sdk.files.create(file=("in.jsonl", data), purpose="batch")
    return sdk.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def ended(sdk: openai.OpenAI, batch: openai.types.Batch) -> openai.types.Batch:
    over = ("completed", "failed", "cancelled", "expired")
    wait_until(lambda: sdk.batches.retrieve(batch.id).status in over, 20)
    return sdk.batches.retrieve(batch.id)


def lines_of(sdk: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(each) for each in sdk.files.content(file_id).text.splitlines()]


def counts(batch: openai.types.Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def test_every_line_is_answered_once_behind_all_others(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    batch = ended(sdk, begin(sdk, b"".join(line(f"id-{n}") for n in range(40))))
    assert (batch.status, counts(batch), batch.error_file_id) == ("completed", (40, 40, 0), None)
    answers = lines_of(sdk, batch.output_file_id)
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"id-{n}" for n in range(40))
    for answer in answers:
        assert answer["error"] is None and answer["response"]["status_code"] == 200
        chat = ChatCompletion.model_validate(answer["response"]["body"])
        assert answer["custom_id"] in (chat.choices[0].message.content or "")
    assert {request.priority for request in engine.requests} == {min(r.priority for r in engine.requests)}
    asked = sdk.chat.completions.create(model="base", messages=[{"role": "user", "content": "now"}])
    assert asked.choices and engine.requests[-1].priority < engine.requests[0].priority


def test_what_a_line_asks_wrongly_is_in_the_error_file(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    data = (
        line("good")
        + line("gone", model="base/vanished")
        + line("hot", temperature=9)
        + line("s", stream=True)
    )
    batch = ended(sdk, begin(sdk, data))
    assert (batch.status, counts(batch)) == ("completed", (4, 1, 3))
    assert [answer["custom_id"] for answer in lines_of(sdk, batch.output_file_id)] == ["good"]
    errors = {error["custom_id"]: error["response"] for error in lines_of(sdk, batch.error_file_id)}
    assert {name: error["status_code"] for name, error in errors.items()} == {
        "gone": 404,
        "hot": 400,
        "s": 400,
    }
    assert errors["hot"]["body"]["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", None),
        (line("a") + b"{broken\n", 2),
        (line("a") + line("a"), 2),
        (line("a", url="/v1/embeddings"), 1),
        (line("a", method="GET"), 1),
        (b"\xff\xfe\n", 1),
    ],
)
def test_a_file_with_a_broken_line_fails_before_anything_is_computed(
    sdk: openai.OpenAI, engine: FakeEngine, data: bytes, problem: int | None
) -> None:
    batch = ended(sdk, begin(sdk, data))
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data
    assert batch.errors.data[0].line == problem
    assert engine.requests == []


def test_a_cancelled_batch_keeps_what_was_answered(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.step_s = 0.02
    batch = begin(sdk, b"".join(line(f"id-{n}") for n in range(200)))
    wait_until(lambda: counts(sdk.batches.retrieve(batch.id))[1] >= 3)
    assert sdk.batches.cancel(batch.id).status == "cancelling"
    batch = ended(sdk, batch)
    total, completed, failed = counts(batch)
    assert (batch.status, total, failed) == ("cancelled", 200, 0) and 3 <= completed < 200
    assert len(lines_of(sdk, batch.output_file_id)) == completed
    wait_until(lambda: not engine.running)


def test_an_engine_that_is_busy_is_waited_for(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    from engine.protocol import RejectCode, Rejected

    seen: set[str] = set()

    def once(request: Any) -> Rejected | None:
        known = str(request.prompt) in seen
        seen.add(str(request.prompt))
        return None if known else Rejected(request.request_id, RejectCode.OVERLOADED, "later")

    engine.reject = once
    batch = ended(sdk, begin(sdk, b"".join(line(f"id-{n}") for n in range(4))))
    assert (batch.status, counts(batch)) == ("completed", (4, 4, 0))


def test_what_cannot_be_a_batch_is_refused(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("in.jsonl", line("a")), purpose="batch")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ]
    good: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for change, param in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.batches.create(**{**good, **change})
        assert refused.value.param == param
    with pytest.raises(openai.NotFoundError):
        sdk.batches.create(**{**good, "input_file_id": "file-none"})
    for use in (sdk.batches.retrieve, sdk.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            use("batch_none")


def test_batches_are_listed_latest_first_page_by_page(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    made = [ended(sdk, begin(sdk, line("a"))).id for _ in range(5)]
    listed = [batch.id for batch in sdk.batches.list(limit=2)]
    assert listed[: len(made)] == made[::-1] and len(set(listed)) == len(listed)


@pytest.fixture
def restartable(
    background: Background, session_engine: FakeEngine, tmp_path: Path
) -> Iterator[list[Gateway]]:
    """Gateways one after the other over the same storage; the last is closed at the end."""
    running: list[Gateway] = []
    yield running
    for gateway in running[-1:]:
        gateway.close()


def test_a_batch_goes_on_after_a_restart_and_repeats_no_line(
    background: Background, engine: FakeEngine, tmp_path: Path, restartable: list[Gateway]
) -> None:
    config = GatewayConfig(
        models=(ModelConfig(name="base", engine=engine.url),),
        database=str(tmp_path / "gateway.db"),
        files=str(tmp_path / "files"),
        batch_concurrency=4,
        batch_lease_s=1,
    )

    def start() -> openai.OpenAI:
        gateway = Gateway(background, config)
        restartable.append(gateway)
        gateway.wait_until_ready()
        return openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)

    engine.step_s = 0.01
    with start() as sdk:
        batch = begin(sdk, b"".join(line(f"id-{n:03}") for n in range(60)))
        wait_until(lambda: counts(sdk.batches.retrieve(batch.id))[1] >= 5)
    restartable.pop().close()
    engine.step_s = 0.0
    answered_before = len(engine.requests)
    with start() as sdk:
        batch = ended(sdk, batch)
        assert (batch.status, counts(batch)) == ("completed", (60, 60, 0))
        answers = [answer["custom_id"] for answer in lines_of(sdk, batch.output_file_id)]
    assert sorted(answers) == [f"id-{n:03}" for n in range(60)]
    # Only lines that were under way when the first gateway ended were asked for again.
    assert len(engine.requests) - 60 <= 4 and answered_before < 60
