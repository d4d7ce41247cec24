"""`/tokenize` and `/detokenize` in vLLM's shapes."""

import httpx
import pytest
from tokenizers import Tokenizer as HfTokenizer

from tests.gateway.conftest import MAX_MODEL_LEN, encode
from tests.gateway.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "how are"}]
HEAD = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\nhow are"


@pytest.fixture(autouse=True)
def _running(engine: FakeEngine) -> None:
    """Nothing is asked of it, but the gateway needs its tokenizer."""


def test_a_prompt_gives_vllms_four_fields(http: httpx.Client, hf_tokenizer: HfTokenizer) -> None:
    tokens = encode(hf_tokenizer, "hello world")
    body = http.post("/tokenize", json={"prompt": "hello world"}).json()
    assert body == {
        "count": len(tokens),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": tokens,
        "token_strs": None,
    }


def test_token_strings_are_the_vocabularys(http: httpx.Client, hf_tokenizer: HfTokenizer) -> None:
    asked = {"model": "base", "prompt": "hello 日<|im_end|>", "return_token_strs": True}
    body = http.post("/tokenize", json=asked).json()
    assert body["token_strs"] == [hf_tokenizer.id_to_token(token) for token in body["tokens"]]
    assert body["token_strs"][-1] == "<|im_end|>"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, HEAD + "<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, HEAD + "<|im_end|>\n"),
        ({"continue_final_message": True, "add_generation_prompt": False}, HEAD),
    ],
)
def test_messages_follow_the_chat_template(
    http: httpx.Client, hf_tokenizer: HfTokenizer, options: dict, text: str
) -> None:
    body = http.post("/tokenize", json={"messages": MESSAGES, **options}).json()
    assert body["tokens"] == encode(hf_tokenizer, text)


def test_detokenizing_gives_the_text_back(http: httpx.Client) -> None:
    text = "naïve <|im_end|> 日本語"
    tokens = http.post("/tokenize", json={"model": "base/shapes", "prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"prompt": "a", "messages": MESSAGES},
        {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
        {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}},
        {"messages": MESSAGES, "chat_template": "{{ 7 * 7 }}"},
        {"messages": []},
    ],
)
def test_contradictions_are_refused(http: httpx.Client, asked: dict) -> None:
    response = http.post("/tokenize", json=asked)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
