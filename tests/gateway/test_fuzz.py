"""Whatever is sent, the answer is one of OpenAI's shapes, and never a server error."""

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.parameters import PARAMETERS

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]

numbers = st.one_of(
    st.integers(-3, 200),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(10**30), 10**400, 1e308, -0.0, 1e-320]),
    st.floats(allow_nan=False, allow_infinity=False),
)
texts = st.one_of(
    st.text(max_size=20), st.sampled_from(["base", "base/shapes", "user", "\x00", "<|im_end|>"])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
names = st.sampled_from(sorted({parameter.name for parameter in PARAMETERS}))
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool", "x", 1])},
        optional={"content": values, "name": values, "tool_calls": values},
    ),
    max_size=3,
)
bodies = st.one_of(
    st.dictionaries(names | st.text(max_size=5), values, max_size=6),
    st.builds(
        lambda fields, **known: {**known, **fields},
        st.dictionaries(names, values, max_size=2),
        model=st.just("base"),
        messages=messages,
        max_tokens=st.just(2),
    ),
    st.builds(
        lambda fields, prompt: {"model": "base", "prompt": prompt, "max_tokens": 2, **fields},
        st.dictionaries(names, values, max_size=2),
        values,
    ),
)


def assert_well_formed(response: httpx.Response) -> None:
    assert response.headers["x-request-id"]
    if response.status_code == 200:
        return
    assert response.status_code in (400, 404), (response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert len(error["message"]) < 1000


@SETTINGS
@given(path=st.sampled_from(PATHS), body=bodies)
def test_any_json_is_answered(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert_well_formed(http.post(path, content=json.dumps(body)))


@SETTINGS
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60))
def test_any_bytes_are_answered(http: httpx.Client, path: str, body: bytes) -> None:
    assert_well_formed(http.post(path, content=body))


@SETTINGS
@given(path=st.sampled_from(PATHS[:2]), cut=st.integers(0, 200), junk=st.binary(max_size=6))
def test_any_broken_body_is_answered(http: httpx.Client, path: str, cut: int, junk: bytes) -> None:
    good = json.dumps(
        {
            "model": "base",
            "messages": [{"role": "user", "content": "naïve \ud83d\ude00"}],
            "max_tokens": 2,
            "n": 2,
        }
    ).encode()
    cut = min(cut, len(good))
    assert_well_formed(http.post(path, content=good[:cut] + junk + good[cut + len(junk) :]))


@SETTINGS
@given(model=st.text(max_size=30))
def test_any_model_id_is_answered(http: httpx.Client, model: str) -> None:
    request = http.build_request("GET", "/v1/models/x")
    quoted = "".join(f"%{byte:02X}" for byte in model.encode())
    request.url = request.url.copy_with(raw_path=b"/v1/models/" + quoted.encode())
    assert_well_formed(http.send(request))


def test_nests_of_any_depth_are_answered(http: httpx.Client) -> None:
    for depth in (10, 500, 1000, 5000, 200_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            nest = opening * depth + "1" + closing * depth
            for field in ("messages", "metadata", "prompt", "logit_bias", "tools"):
                body = f'{{"model": "base", "{field}": {nest}}}'
                if len(body) < 2**20:
                    assert_well_formed(http.post("/v1/chat/completions", content=body))


def test_lone_surrogates_are_answered(http: httpx.Client) -> None:
    for text in (r"\ud800", r"\udc00", r"x\ud800x", r"\ud800\ud800", r"\ud83d\ude00"):
        for body in (
            f'{{"model": "base", "messages": [{{"role": "user", "content": "{text}"}}], "max_tokens": 1}}',
            f'{{"model": "{text}", "prompt": "a"}}',
            f'{{"model": "base", "prompt": "{text}", "stop": "{text}", "max_tokens": 1}}',
            f'{{"model": "base", "{text}": 1}}',
        ):
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            assert_well_formed(http.post(path, content=body))
