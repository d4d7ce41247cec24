"""`/generate` and `/generate_stream` as LoRAX's clients know them."""

import json
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as HfTokenizer

from engine.protocol import RejectCode, Rejected
from tests.gateway.conftest import encode
from tests.gateway.fake_engine import FakeEngine

SAID = "hello world"


@pytest.fixture
def engine_says(engine: FakeEngine, hf_tokenizer: HfTokenizer) -> FakeEngine:
    engine.reply = lambda request: encode(hf_tokenizer, SAID)
    return engine


def post(
    http: httpx.Client, address: str = "/generate", inputs: str = "say", **parameters: Any
) -> httpx.Response:
    return http.post(address, json={"inputs": inputs, "parameters": parameters})


def test_a_text_is_generated_with_its_details_and_times(http: httpx.Client, engine_says: FakeEngine) -> None:
    response = post(http, details=True, seed=7, max_new_tokens=20)
    answer = response.json()
    assert answer["generated_text"] == SAID
    details = answer["details"]
    assert (details["finish_reason"], details["seed"], details["prefill"]) == ("eos_token", 7, [])
    assert "".join(token["text"] for token in details["tokens"]) == SAID
    assert details["generated_tokens"] >= len(details["tokens"]) > 0
    assert response.headers["x-prompt-tokens"] == str(details["prompt_tokens"])
    assert response.headers["x-generated-tokens"] == str(details["generated_tokens"])
    assert int(response.headers["x-total-time"]) >= int(response.headers["x-time-per-token"])
    assert "details" not in post(http).json()


def test_the_stream_ends_with_the_whole_text(http: httpx.Client, engine_says: FakeEngine) -> None:
    lines = post(http, "/generate_stream", details=True).text.split("\n\n")
    events = [json.loads(line.removeprefix("data:")) for line in lines if line]
    assert "".join(event["token"]["text"] for event in events) == SAID
    assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["generated_text"] == SAID
    assert events[-1]["details"]["finish_reason"] == "eos_token"


def test_an_adapter_and_sampling_reach_the_engine(http: httpx.Client, engine_says: FakeEngine) -> None:
    assert post(http, adapter_id="shapes", temperature=0.5, top_k=3).status_code == 200
    assert post(http).status_code == 200
    sampled, greedy = engine_says.requests[-2:]
    assert sampled.adapter is not None and sampled.adapter.name == "base/shapes"
    assert (sampled.sampling.temperature, sampled.sampling.top_k) == (0.5, 3)
    assert greedy.adapter is None and greedy.sampling.temperature == 0.0


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [({"max_new_tokens": 4}, "length"), ({"stop": ["wor"]}, "stop_sequence")],
)
def test_how_it_ended_is_told(
    http: httpx.Client, engine_says: FakeEngine, parameters: dict[str, Any], reason: str
) -> None:
    if reason == "length":
        engine_says.reply = lambda request: list(range(5, 50))
    answer = post(http, details=True, return_full_text=True, **parameters).json()
    assert answer["details"]["finish_reason"] == reason
    assert answer["generated_text"].startswith("say")


@pytest.mark.parametrize(
    "parameters",
    [{"watermark": True}, {"best_of": 3}, {"unknown": 1}, {"temperature": -1}, {"adapter_id": "nobody"}],
)
def test_what_cannot_be_done_is_refused_in_its_words(
    http: httpx.Client, engine: FakeEngine, parameters: dict[str, Any]
) -> None:
    response = post(http, **parameters)
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation" and response.json()["error"]
    assert engine.requests == []


def test_overload_is_429_with_retry_after(http: httpx.Client, engine: FakeEngine) -> None:
    engine.reject = lambda request: Rejected(request.request_id, RejectCode.OVERLOADED, "later", 3.0)
    response = post(http)
    assert (response.status_code, response.json()["error_type"]) == (429, "overloaded")
    assert response.headers["retry-after"] == "3"
