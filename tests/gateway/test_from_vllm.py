"""What people who come from vLLM send: adapters loaded by request, and its sampling fields."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer as HfTokenizer

from engine.protocol import Generate, RejectCode, Rejected
from gateway.config import GatewayConfig, ModelConfig
from tests.gateway.conftest import Background, Gateway, encode
from tests.gateway.fake_engine import FakeEngine

PROMPT = {"model": "base", "prompt": "hello world"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def open_gateway(background: Background, session_engine: FakeEngine) -> Iterator[Gateway]:
    """One that lets requests load adapters."""
    model = ModelConfig(name="base", engine=session_engine.url)
    gateway = Gateway(background, GatewayConfig(models=(model,), runtime_adapters=True))
    gateway.wait_until_ready()
    yield gateway
    gateway.close()


@pytest.fixture
def loading(open_gateway: Gateway, engine: FakeEngine) -> Iterator[httpx.Client]:
    open_gateway.wait_until_ready()
    with httpx.Client(base_url=open_gateway.url, trust_env=False, timeout=20) as client:
        yield client
        client.post("/v1/unload_lora_adapter", json={"lora_name": "sql-lora"})


def load(client: httpx.Client, path: str = "/adapters/sql", **more: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": "sql-lora", "lora_path": path, **more})


def test_a_loaded_adapter_is_a_model_until_it_is_unloaded(loading: httpx.Client, engine: FakeEngine) -> None:
    response = load(loading)
    assert (response.status_code, response.text) == (
        200,
        "Success: LoRA adapter 'sql-lora' added successfully.",
    )
    with openai.OpenAI(base_url=f"{loading.base_url}/v1", api_key="none", max_retries=0) as sdk:
        card = sdk.models.retrieve("sql-lora").model_dump()
        assert (card["id"], card["parent"]) == ("sql-lora", "base")
        assert "sql-lora" in [model.id for model in sdk.models.list()]
        answer = sdk.completions.create(model="sql-lora", prompt="hello")
        assert answer.model == "sql-lora"
        adapter = engine.requests[-1].adapter
        assert adapter is not None
        assert (adapter.name, adapter.uri) == ("base/sql-lora", "/adapters/sql")
        response = loading.post("/v1/unload_lora_adapter", json={"lora_name": "sql-lora", "lora_int_id": 1})
        assert (response.status_code, response.text) == (
            200,
            "Success: LoRA adapter 'sql-lora' removed successfully.",
        )
        with pytest.raises(openai.NotFoundError):
            sdk.completions.create(model="sql-lora", prompt="hello")


def test_an_adapter_that_the_engine_refuses_is_not_loaded(loading: httpx.Client, engine: FakeEngine) -> None:
    def refuse(request: Generate) -> Rejected:
        return Rejected(request.request_id, RejectCode.ADAPTER_INVALID, "outside of adapter_sources")

    engine.reject = refuse
    response = load(loading, "/etc")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "outside of adapter_sources"
    engine.reject = lambda request: Rejected(
        request.request_id, RejectCode.ADAPTER_NOT_FOUND, "nothing there"
    )
    response = load(loading, "/nowhere")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "NotFoundError")
    engine.reject = lambda request: None
    assert loading.post("/v1/completions", json={**PROMPT, "model": "sql-lora"}).status_code == 404


def test_a_name_in_use_is_refused_unless_in_place(loading: httpx.Client, engine: FakeEngine) -> None:
    load(loading)
    response = load(loading, "/adapters/other")
    assert response.status_code == 400
    assert "has already been loaded" in response.json()["error"]["message"]
    assert load(loading, "/adapters/other", load_inplace=True).status_code == 200
    loading.post("/v1/completions", json={**PROMPT, "model": "sql-lora"}).raise_for_status()
    adapter = engine.requests[-1].adapter
    assert adapter is not None
    assert adapter.uri == "/adapters/other"
    response = loading.post("/v1/load_lora_adapter", json={"lora_name": "base", "lora_path": "/a"})
    assert response.status_code == 400


def test_a_name_of_the_hub_is_fetched_from_there(loading: httpx.Client, engine: FakeEngine) -> None:
    load(loading, "somebody/sql-lora")
    adapter = engine.requests[0].adapter
    assert adapter is not None
    assert adapter.uri == "hf://somebody/sql-lora"


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("load", {"lora_name": "x"}, 400, "Both 'lora_name' and 'lora_path' must be provided."),
        ("load", {"lora_name": "x", "lora_path": "/x", "base_model_name": "no"}, 404, "does not exist"),
        ("unload", {}, 400, "needs to be provided"),
        ("unload", {"lora_name": "never"}, 404, "The lora adapter 'never' cannot be found."),
    ],
)
def test_mistakes_are_answered_in_vllms_words(
    loading: httpx.Client, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    response = loading.post(f"/v1/{path}_lora_adapter", json=body)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


def test_loading_is_off_unless_configured(http: httpx.Client) -> None:
    for path in ("load", "unload"):
        response = http.post(f"/v1/{path}_lora_adapter", json={"lora_name": "x", "lora_path": "/x"})
        assert response.status_code == 404
        assert "runtime_adapters = true" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_may_be_kept(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer, stream: bool
) -> None:
    engine.reply = lambda request: [t for c in "one END two" for t in encode(hf_tokenizer, c)]
    request = {
        **PROMPT,
        "stop": ["END"],
        "include_stop_str_in_output": True,
        "stream": stream,
        "max_tokens": 50,
    }
    response = http.post("/v1/completions", json=request)
    if stream:
        lines = [line for line in response.text.split("\n\n") if line.startswith("data: {")]
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one END"


def test_special_tokens_may_be_shown(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    engine.reply = lambda request: encode(hf_tokenizer, "a<|im_start|>b")
    shown = http.post("/v1/completions", json={**PROMPT, "skip_special_tokens": False}).json()
    assert shown["choices"][0]["text"] == "a<|im_start|>b"
    assert http.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"] == "ab"


@pytest.mark.parametrize(("limit", "kept"), [(2, 2), (-1, 190), (1000, 240)])
def test_a_long_prompt_keeps_its_end(http: httpx.Client, engine: FakeEngine, limit: int, kept: int) -> None:
    tokens = [5 + i % 200 for i in range(240)]
    asked = {**PROMPT, "prompt": tokens, "max_tokens": 10, "truncate_prompt_tokens": limit}
    response = http.post("/v1/completions", json=asked)
    if kept > 190:
        assert response.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert engine.requests[0].prompt == tokens[-kept:]


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, "<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "<|im_end|>\n"),
        ({"continue_final_message": True}, ""),
    ],
)
def test_the_last_message_may_be_continued(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer, options: dict[str, bool], end: str
) -> None:
    http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1, **options}).raise_for_status()
    assert engine.requests[0].prompt == encode(hf_tokenizer, f"<|im_start|>user\nhello{end}")


def test_fields_that_contradict_each_other_are_refused(http: httpx.Client, engine: FakeEngine) -> None:
    for wrong in (
        {"include_stop_str_in_output": True, "stop_token_ids": [3]},
        {"truncate_prompt_tokens": 2, "echo": True},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": -2},
    ):
        assert http.post("/v1/completions", json={**PROMPT, **wrong}).status_code == 400
    both = {**CHAT, "continue_final_message": True, "add_generation_prompt": True}
    assert http.post("/v1/chat/completions", json=both).status_code == 400
    assert not engine.requests
