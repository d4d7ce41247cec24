"""The OpenAI clients of other projects, unchanged but for the address."""

from typing import Any

import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from tokenizers import Tokenizer as HfTokenizer

from tests.gateway.conftest import Gateway, encode
from tests.gateway.fake_engine import FakeEngine

SAID = "hello world"


@pytest.fixture
def engine_says(engine: FakeEngine, hf_tokenizer: HfTokenizer) -> FakeEngine:
    engine.reply = lambda request: encode(hf_tokenizer, SAID)
    return engine


def chat(gateway: Gateway, model: str = "base/shapes") -> ChatOpenAI:
    settings: dict[str, Any] = {"base_url": gateway.url + "/v1", "api_key": "none", "max_retries": 0}
    return ChatOpenAI(model=model, **settings)


class Place(BaseModel):
    """Where."""

    city: str


def test_langchain_asks_whole_and_in_a_stream(gateway: Gateway, engine_says: FakeEngine) -> None:
    answer = chat(gateway).invoke("hi")
    assert answer.content == SAID
    assert answer.response_metadata["model_name"] == "base/shapes"
    assert answer.usage_metadata and answer.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in chat(gateway).stream("hi")) == SAID
    assert [each.content for each in chat(gateway).batch(["a", "b"])] == [SAID, SAID]


async def test_langchain_asks_asynchronously(gateway: Gateway, engine_says: FakeEngine) -> None:
    assert (await chat(gateway).ainvoke("hi")).content == SAID


def test_langchain_gets_structured_output(
    gateway: Gateway, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    engine.reply = lambda request: encode(hf_tokenizer, '{"city": "Rome"}')
    assert chat(gateway).with_structured_output(Place).invoke("where") == Place(city="Rome")
    assert engine.requests[-1].sampling.grammar is not None


@pytest.mark.filterwarnings("ignore")  # its own
def test_litellm_asks_whole_and_in_a_stream(
    gateway: Gateway, engine_says: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm: Any = pytest.importorskip("litellm", reason="needs an older openai than the rest; run beside it")
    asked: dict[str, Any] = {
        "model": "openai/base/shapes",
        "api_base": gateway.url + "/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert litellm.completion(**asked).choices[0].message.content == SAID
    chunks = litellm.completion(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID


def test_langchain_embeds(gateway: Gateway, engine: FakeEngine) -> None:
    settings: dict[str, Any] = {"base_url": gateway.url + "/v1", "api_key": "none", "max_retries": 0}
    embeddings = OpenAIEmbeddings(model="base", check_embedding_ctx_length=False, **settings)
    assert [len(each) > 0 for each in embeddings.embed_documents(["a", "b"])] == [True, True]
