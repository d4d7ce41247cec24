"""The API over raw HTTP: shapes, statuses, errors."""

import json

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer as HfTokenizer

from engine.protocol import (
    AdapterRef,
    AdapterReport,
    AdapterStatus,
    AdapterTier,
    Generate,
    RejectCode,
    Rejected,
)
from tests.gateway.conftest import MAX_MODEL_LEN, Gateway, encode, wait_until
from tests.gateway.fake_engine import FakeEngine

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hello world"}]}
COMPLETION = {"model": "base", "prompt": "hello world"}


def answer_with(engine: FakeEngine, tokenizer: HfTokenizer, text: str) -> None:
    engine.reply = lambda request: encode(tokenizer, text)


def events(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [block.removeprefix("data: ") for block in response.text.split("\n\n") if block]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_chat_answers_in_openais_shape(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    answer_with(engine, hf_tokenizer, "how are you?")
    engine.cached_tokens = 3
    body = http.post("/v1/chat/completions", json=CHAT).json()
    prompt = encode(hf_tokenizer, "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n")
    assert engine.requests[0].prompt == prompt
    assert engine.requests[0].sampling.max_tokens == MAX_MODEL_LEN - len(prompt)
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "base"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"content": "how are you?", "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    output = len(encode(hf_tokenizer, "how are you?"))
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": output,
        "total_tokens": len(prompt) + output,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_chat_streams_role_then_text_then_reason_then_usage(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    answer_with(engine, hf_tokenizer, "naïve 日本語 café")
    engine.step_s = 0.002
    request = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(http.post("/v1/chat/completions", json=request))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(middle) > 3
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "naïve 日本語 café"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(encode(hf_tokenizer, "naïve 日本語 café"))


def test_without_include_usage_no_chunk_speaks_of_it(http: httpx.Client) -> None:
    chunks = events(http.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_several_choices_are_told_apart_and_seeded_in_a_row(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    engine.reply = lambda request: encode(hf_tokenizer, f"seed {request.sampling.seed}")
    body = http.post("/v1/chat/completions", json={**CHAT, "n": 3, "seed": 7}).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["seed 7", "seed 8", "seed 9"]
    chunks = events(http.post("/v1/chat/completions", json={**CHAT, "n": 3, "seed": 7, "stream": True}))
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == ["seed 7", "seed 8", "seed 9"]


def test_completions_take_texts_and_token_ids(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    ids, other = encode(hf_tokenizer, "hello"), encode(hf_tokenizer, "the fox")
    for prompt, texts in (
        ("hello", ["hello"]),
        (["hello", "the fox"], ["hello", "the fox"]),
        (ids, ["hello"]),
        ([ids, other], ["hello", "the fox"]),
    ):
        engine.reset()
        body = http.post("/v1/completions", json={"model": "base", "prompt": prompt}).json()
        assert [choice["text"] for choice in body["choices"]] == texts
        assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
        assert [request.prompt for request in engine.requests] == [ids, other][: len(texts)]
        assert engine.requests[0].sampling.max_tokens == 16
        assert body["object"] == "text_completion"
        assert body["usage"]["prompt_tokens"] == sum(len(request.prompt) for request in engine.requests)


def test_n_choices_of_two_prompts_come_prompt_by_prompt(http: httpx.Client, engine: FakeEngine) -> None:
    body = http.post("/v1/completions", json={"model": "base", "prompt": ["hello", "world"], "n": 2}).json()
    assert [choice["text"] for choice in body["choices"]] == ["hello", "hello", "world", "world"]
    one_each = sum(len(request.prompt) for request in engine.requests[::2])
    assert body["usage"]["prompt_tokens"] == one_each


def test_default_of_sixteen_tokens_shrinks_to_what_fits(http: httpx.Client, engine: FakeEngine) -> None:
    http.post(
        "/v1/completions", json={"model": "base", "prompt": [5] * (MAX_MODEL_LEN - 3)}
    ).raise_for_status()
    assert engine.requests[0].sampling.max_tokens == 3


def test_max_tokens_ends_with_length(http: httpx.Client) -> None:
    choice = http.post("/v1/completions", json={**COMPLETION, "max_tokens": 1, "ignore_eos": True}).json()[
        "choices"
    ][0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("fox", "the quick brown "),
        (["zzz", "n f"], "the quick brow"),
        (["t"], ""),
        (["dog!"], "the quick brown fox jumps"),
    ],
)
def test_stop_strings_end_the_text_before_them_and_free_the_engine(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer, stream: bool, stop: str, shown: str
) -> None:
    engine.reply = lambda request: [t for c in "the quick brown fox jumps" for t in encode(hf_tokenizer, c)]
    engine.step_s = 0.001
    response = http.post(
        "/v1/completions", json={**COMPLETION, "stop": stop, "max_tokens": 100, "stream": stream}
    )
    choices = [chunk["choices"][0] for chunk in events(response)] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == shown
    assert choices[-1]["finish_reason"] == "stop"
    if stop != ["dog!"]:
        wait_until(lambda: engine.requests[0].request_id in engine.aborted or not engine.running)


def test_min_tokens_puts_stop_strings_off(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    engine.reply = lambda request: [t for c in "abcabc" for t in encode(hf_tokenizer, c)]
    body = http.post("/v1/completions", json={**COMPLETION, "stop": "c", "min_tokens": 4}).json()
    assert body["choices"][0]["text"] == "abcab"
    assert engine.requests[0].sampling.min_tokens == 4


def test_every_sampling_parameter_reaches_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.2,
        "repetition_penalty": 1.1,
        "seed": -1,
        "ignore_eos": True,
        "min_tokens": 2,
    }
    request = {
        **CHAT,
        **given,
        "max_completion_tokens": 5,
        "logit_bias": {"7": -100},
        "stop_token_ids": [9, 10],
    }
    http.post("/v1/chat/completions", json=request).raise_for_status()
    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in given} == {**given, "seed": 2**63 - 1}
    assert (sampling.max_tokens, sampling.logit_bias, sampling.stop_token_ids) == (5, {7: -100.0}, (9, 10))


def test_top_k_minus_one_and_top_p_zero_mean_what_they_mean_elsewhere(
    http: httpx.Client, engine: FakeEngine
) -> None:
    http.post("/v1/chat/completions", json={**CHAT, "top_k": -1, "top_p": 0}).raise_for_status()
    sampling = engine.requests[0].sampling
    assert (sampling.top_k, sampling.top_p, sampling.temperature) == (0, 1.0, 0.0)


def test_chat_logprobs_have_bytes_and_alternatives(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    answer_with(engine, hf_tokenizer, "é日")
    body = http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2}).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "é日"
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] == -0.5 for token in content)
    body = http.post("/v1/chat/completions", json={**CHAT, "logprobs": True}).json()
    assert all(token["top_logprobs"] == [] for token in body["choices"][0]["logprobs"]["content"])


def test_streamed_logprobs_come_with_the_text_they_belong_to(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    answer_with(engine, hf_tokenizer, "the lazy dog 日 x")
    engine.step_s = 0.001
    chunks = events(http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "stream": True}))
    tokens = [
        token
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == "the lazy dog 日 x"


def test_logprobs_of_a_stop_string_are_not_told(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    engine.reply = lambda request: [t for c in "abSTOPcd" for t in encode(hf_tokenizer, c)]
    body = http.post("/v1/completions", json={**COMPLETION, "stop": "STOP", "logprobs": 0}).json()
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["logprobs"]["tokens"] == ["a", "b"]


def test_echo_with_logprobs_scores_the_prompt(
    http: httpx.Client, engine: FakeEngine, hf_tokenizer: HfTokenizer
) -> None:
    answer_with(engine, hf_tokenizer, " fox")
    prompt = "the quick 日本"
    body = http.post(
        "/v1/completions", json={"model": "base", "prompt": prompt, "echo": True, "logprobs": 1}
    ).json()
    choice = body["choices"][0]
    assert choice["text"] == prompt + " fox"
    logprobs = choice["logprobs"]
    count = len(encode(hf_tokenizer, prompt)) + len(encode(hf_tokenizer, " fox"))
    assert {len(values) for values in logprobs.values()} == {count}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1] == -0.5
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert choice["text"][logprobs["text_offset"][-1] :] in " fox"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_no_tokens_scores_the_prompt_alone(
    http: httpx.Client, engine: FakeEngine, stream: bool
) -> None:
    request = {
        "model": "base",
        "prompt": [40, 41, 42],
        "echo": True,
        "max_tokens": 0,
        "logprobs": 0,
        "stream": stream,
    }
    response = http.post("/v1/completions", json=request)
    choice = events(response)[0]["choices"][0] if stream else response.json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 3
    assert choice["text"] == "".join(choice["logprobs"]["tokens"])
    assert choice["finish_reason"] == "length"


def test_adapters_go_to_the_engine_by_directory(http: httpx.Client, engine: FakeEngine, adapters) -> None:
    body = http.post("/v1/chat/completions", json={**CHAT, "model": "base/shapes"}).json()
    assert body["model"] == "base/shapes"
    assert engine.requests[0].adapter == AdapterRef("base/shapes", f"{adapters}/shapes")
    http.post("/v1/completions", json={**COMPLETION, "model": "base/far"}).raise_for_status()
    assert engine.requests[1].adapter == AdapterRef("base/far", "hf://somebody/far")


def test_models_list_bases_and_adapters(http: httpx.Client) -> None:
    body = http.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["base", "base/colours", "base/shapes", "org/absent"]
    base, colours = body["data"][:2]
    assert (base["parent"], base["root"], base["max_model_len"]) == (None, "base", MAX_MODEL_LEN)
    assert (colours["parent"], colours["root"], colours["object"]) == ("base", "base", "model")
    assert colours["created"] > 0 and colours["owned_by"]


def test_an_adapter_dropped_in_place_is_listed_and_served_at_once(http: httpx.Client, adapters) -> None:
    assert http.get("/v1/models/base/fresh").status_code == 404
    (adapters / "fresh").mkdir()
    config = adapters / "fresh" / "adapter_config.json"
    try:
        assert http.get("/v1/models/base/fresh").status_code == 404
        config.write_text("{}")
        assert "base/fresh" in [model["id"] for model in http.get("/v1/models").json()["data"]]
        http.post("/v1/chat/completions", json={**CHAT, "model": "base/fresh"}).raise_for_status()
    finally:
        config.unlink()
        config.parent.rmdir()


@pytest.mark.parametrize("path", ["base/shapes", "base%2Fshapes", "base", "org/absent", "org%2Fabsent"])
def test_one_model_is_found_with_its_slash_encoded_or_not(http: httpx.Client, path: str) -> None:
    assert http.get(f"/v1/models/{path}").json()["id"] == path.replace("%2F", "/")


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4",
        "base/none",
        "base/../base/shapes",
        "base/",
        "/base",
        "",
        "base/a\u0000b",
        "base/" + "x" * 9999,
        "nobase/shapes",
    ],
)
def test_unknown_models_are_named(http: httpx.Client, model: str) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        error = error_of(http.post(path, json={**body, "model": model}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert model[:100] in error["message"] and "/v1/models" in error["message"]


def test_a_model_whose_engine_was_never_there_is_503(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={**CHAT, "model": "org/absent"})
    assert error_of(response, 503)["code"] == "engine_unavailable"
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("code", "status", "name"),
    [
        (RejectCode.INVALID, 400, None),
        (RejectCode.CONTEXT_LENGTH, 400, "context_length_exceeded"),
        (RejectCode.ADAPTER_NOT_FOUND, 404, "model_not_found"),
        (RejectCode.ADAPTER_INVALID, 400, "adapter_invalid"),
        (RejectCode.OVERLOADED, 429, "slow_down"),
        (RejectCode.EXPIRED, 504, "request_timeout"),
        (RejectCode.UNAVAILABLE, 503, "engine_unavailable"),
        (RejectCode.INTERNAL, 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_refusals_have_their_status(
    http: httpx.Client, engine: FakeEngine, code: RejectCode, status: int, name: str | None, stream: bool
) -> None:
    engine.reject = lambda request: Rejected(request.request_id, code, "because", 2.5)
    response = http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    error = error_of(response, status)
    assert (error["message"], error["code"]) == ("because", name)
    if status in (429, 503):
        assert response.headers["retry-after"] == "3"


def test_one_refused_choice_refuses_the_request_and_aborts_the_others(
    http: httpx.Client, engine: FakeEngine
) -> None:
    def reject_third(request: Generate) -> Rejected | None:
        third = request.request_id.endswith("-2")
        return Rejected(request.request_id, RejectCode.OVERLOADED, "full") if third else None

    engine.reject = reject_third
    engine.silent = True
    error_of(http.post("/v1/chat/completions", json={**CHAT, "n": 4}), 429)
    http.get("/healthz")
    wait_until(lambda: len(engine.aborted) == 3)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            "/v1/chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": "fox " * 300}]},
            "messages",
        ),
        ("/v1/chat/completions", {**CHAT, "max_tokens": MAX_MODEL_LEN}, "messages"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 10**18}, "messages"),
        ("/v1/completions", {**COMPLETION, "prompt": [5] * MAX_MODEL_LEN}, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": ["fox", "fox " * 5000]}, "prompt"),
        ("/v1/completions", {**COMPLETION, "max_tokens": MAX_MODEL_LEN}, "prompt"),
    ],
)
def test_too_long_prompts_get_openais_sentence(http: httpx.Client, path: str, body: dict, param: str) -> None:
    error = error_of(http.post(path, json=body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert error["message"].startswith(
        f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, you"
    )
    assert "Please reduce the length of the" in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"a":NaN}', b"[" * 100_000, b'{"model":"\\ud800"}'],
)
def test_what_is_no_json_object_is_400(http: httpx.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert error_of(http.post(path, content=body), 400)["type"] == "invalid_request_error"


def test_too_large_bodies_are_413(http: httpx.Client) -> None:
    body = json.dumps({**COMPLETION, "prompt": "x" * 2**20}).encode()
    assert error_of(http.post("/v1/completions", content=body), 413)["code"] == "request_too_large"

    def in_pieces():
        for at in range(0, len(body), 50_000):
            yield body[at : at + 50_000]

    assert error_of(http.post("/v1/completions", content=in_pieces()), 413)["code"] == "request_too_large"


def test_unknown_addresses_and_methods_get_the_envelope(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "unknown_url"
    assert error_of(http.get("/"), 404)["code"] == "unknown_url"
    assert error_of(http.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
    assert error_of(http.delete("/v1/models/base"), 405)["code"] == "method_not_allowed"


def test_every_response_has_a_request_id_and_a_harmless_one_of_the_callers_is_kept(
    http: httpx.Client,
) -> None:
    assert http.get("/healthz").headers["x-request-id"].startswith("req_")
    assert http.post("/v1/chat/completions", json={**CHAT, "stream": True}).headers["x-request-id"]
    assert http.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_pages_of_a_configured_origin_may_call(http: httpx.Client) -> None:
    allowed = http.get("/v1/models", headers={"origin": "https://page.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert (
        "access-control-allow-origin"
        not in http.get("/v1/models", headers={"origin": "https://other.example"}).headers
    )


def test_metrics_count_by_model(http: httpx.Client, gateway: Gateway) -> None:
    http.post("/v1/chat/completions", json={**CHAT, "model": "base/colours"}).raise_for_status()
    http.post("/v1/chat/completions", json={**CHAT, "model": "invented"})
    text = http.get("/metrics").text
    line = (
        'loraland_gateway_requests_total{endpoint="/v1/chat/completions",model="base/colours",status="200"}'
    )
    assert line in text
    assert "loraland_gateway_time_to_first_token_seconds_count" in text
    assert 'loraland_gateway_engine_connected{model="base"} 1.0' in text
    assert 'loraland_gateway_engine_connected{model="org/absent"} 0.0' in text
    assert "invented" not in text


def test_readiness_names_the_engines(http: httpx.Client) -> None:
    assert http.get("/readyz").json() == {
        "status": "ready",
        "models": {"base": "ready", "org/absent": "unavailable"},
    }


def test_tokenize_and_detokenize_are_inverse(http: httpx.Client, hf_tokenizer: HfTokenizer) -> None:
    text = "<|im_start|>naïve 日本語<|im_end|>"
    body = http.post("/tokenize", json={"model": "base", "prompt": text}).json()
    assert body == {
        "tokens": encode(hf_tokenizer, text),
        "count": len(body["tokens"]),
        "max_model_len": MAX_MODEL_LEN,
        "token_strs": None,
    }
    assert http.post("/detokenize", json={"model": "base", "tokens": body["tokens"]}).json() == {
        "prompt": text
    }
    chat = http.post("/tokenize", json={"model": "base", "messages": CHAT["messages"]}).json()
    assert chat["tokens"] == encode(
        hf_tokenizer, "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    )
    error_of(http.post("/tokenize", json={"model": "base"}), 400)
    error_of(http.post("/detokenize", json={"model": "base", "tokens": [-1]}), 400)


def test_json_of_responses_has_no_surprises(http: httpx.Client) -> None:
    body = http.post("/v1/chat/completions", json=CHAT)
    assert body.headers["content-type"] == "application/json"
    assert msgspec.json.decode(body.content)["created"] > 1_700_000_000


def test_what_concerns_scheduling_reaches_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    body = {**CHAT, "priority": -3, "cache_salt": "ours", "deadline_s": 2.5, "n": 3}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert {(r.priority, r.cache_salt, r.deadline_s) for r in engine.requests} == {(-3, "ours", 2.5)}
    first = engine.requests[0].request_id
    assert [request.follows for request in engine.requests] == [None, first, first]
    http.post("/v1/chat/completions", json=CHAT)
    last = engine.requests[-1]
    assert (last.priority, last.cache_salt, last.deadline_s, last.follows) == (0, "", None, None)


@pytest.mark.parametrize(
    ("field", "value"), [("deadline_s", 0), ("deadline_s", -1.5), ("priority", "high"), ("cache_salt", 7)]
)
def test_scheduling_fields_out_of_range_are_named(http: httpx.Client, field: str, value: object) -> None:
    assert error_of(http.post("/v1/chat/completions", json={**CHAT, field: value}), 400)["param"] == field


@pytest.mark.parametrize(
    "more", [{}, {"stop": ["fox"]}, {"stop": ["fox"], "min_tokens": 4}, {"max_tokens": 5}, {"logprobs": 2}]
)
def test_several_tokens_at_once_read_like_one_after_the_other(
    http: httpx.Client, engine: FakeEngine, more: dict
) -> None:
    body = {"model": "base", "prompt": "the quick brown fox and the other fox jump", "max_tokens": 30, **more}
    engine.tokens_per_step = 1
    single = http.post("/v1/completions", json=body).json()
    engine.tokens_per_step = 7
    several = http.post("/v1/completions", json=body).json()
    assert several["choices"] == single["choices"]
    assert several["usage"] == single["usage"]


def test_adapters_says_what_the_engine_knows_and_what_it_does_not(
    http: httpx.Client, gateway: Gateway, engine: FakeEngine
) -> None:
    loaded = AdapterStatus(
        "base/colours", "resident", AdapterTier.DEVICE, "0123456789ab", 8, 2**20, 2**20, 1, 2, 0, 3.0
    )
    engine.report = AdapterReport(2, 1, 2**20, 2**21, 1, 2**20, 2**22, 5, [loaded])
    base, absent = http.get("/adapters").raise_for_status().json()["models"]
    assert base["unloaded"] == ["base/shapes"]
    assert base["engine"]["evictions"] == 5
    assert base["engine"]["adapters"][0]["name"] == "base/colours"
    assert base["engine"]["adapters"][0]["running"] == 2
    assert (absent["model"], absent["engine"]) == ("org/absent", None), "one that is down hides nothing"
