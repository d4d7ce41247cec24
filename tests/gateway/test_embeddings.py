"""`/v1/embeddings` through the official SDK; what the vectors mean is tested with the engine."""

from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer as HfTokenizer

from tests.gateway.conftest import encode
from tests.gateway.fake_engine import FakeEngine


def vectors(answer: openai.types.CreateEmbeddingResponse) -> list[list[float]]:
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return [each.embedding for each in answer.data]


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_every_kind_of_input_gives_its_vectors(
    sdk: openai.OpenAI, engine: FakeEngine, hf_tokenizer: HfTokenizer, encoding: str | None
) -> None:
    tokens = encode(hf_tokenizer, "hello world")
    expected = [float(len(tokens)), float(tokens[-1]), 1.0]
    options: dict[str, Any] = {} if encoding is None else {"encoding_format": encoding}
    for given, count in (("hello world", 1), (["hello world"] * 2, 2), (tokens, 1), ([tokens] * 3, 3)):
        answer = sdk.embeddings.create(model="base/shapes", input=given, **options)
        if encoding == "base64":
            assert all(isinstance(each.embedding, str) for each in answer.data)
            assert len(answer.data) == count
        else:
            assert vectors(answer) == [expected] * count
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == count * len(tokens)
        assert answer.model == "base/shapes"
    assert {request.adapter.name for request in engine.requests if request.adapter} == {"base/shapes"}


def test_pooling_may_be_chosen(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    answer = sdk.embeddings.create(model="base", input="a", extra_body={"pooling": "last"})
    assert vectors(answer)[0][2] == 0.0
    assert engine.requests[0].pooling == "last"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"dimensions": 64}, "dimensions"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": "hello " * 500}, "input"),
        ({"pooling": "max"}, "pooling"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    http: httpx.Client, engine: FakeEngine, wrong: dict, param: str
) -> None:
    response = http.post("/v1/embeddings", json={"model": "base", "input": "a", **wrong})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not engine.requests
