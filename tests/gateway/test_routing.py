"""Aliases, splits and fallbacks: which model answers a name, and which name the client sees."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer as HfTokenizer

from engine.protocol import RejectCode, Rejected
from gateway.config import (
    ConfigError,
    GatewayConfig,
    ModelConfig,
    UpstreamConfig,
    UpstreamModelConfig,
    check_config,
)
from gateway.routing import Names, arm_of
from tests.gateway.conftest import Background, Gateway, encode
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.fake_upstream import WORDS, FakeUpstream, chat_events, refuse

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
THEIRS = "".join(WORDS)
OURS = "hello world"


def config_of(**changes: Any) -> GatewayConfig:
    settings: dict[str, Any] = {
        "models": (ModelConfig(name="base", engine="http://127.0.0.1:1", table={"shapes": "hf://a/b"}),),
        "upstreams": (
            UpstreamConfig(
                name="far",
                url="http://127.0.0.1:1/v1",
                retries=0,
                models=(UpstreamModelConfig(name="gpt-4"),),
            ),
        ),
        "aliases": {"latest": "gpt-4", "mine": "base/shapes"},
        "splits": {"test": {"gpt-4": 3, "mine": 1}},
        "fallbacks": {"gpt-4": ("base/shapes",), "base/shapes": ("gpt-4",)},
    }
    return GatewayConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def module_upstream(background: Background) -> Iterator[FakeUpstream]:
    upstream = FakeUpstream()
    background.run(upstream.start())
    yield upstream
    background.run(upstream.stop())


@pytest.fixture(scope="module")
def routing_gateway(
    background: Background,
    session_engine: FakeEngine,
    module_upstream: FakeUpstream,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    config = config_of()
    models = (ModelConfig(name="base", engine=session_engine.url, table={"shapes": "hf://a/b"}),)
    far = UpstreamConfig(
        name="far",
        url=module_upstream.url,
        retries=0,
        breaker_failures=1000,
        models=(UpstreamModelConfig(name="gpt-4", remote="gpt-4-0613"),),
    )
    gateway = Gateway(
        background,
        GatewayConfig(
            models=models,
            upstreams=(far,),
            aliases=config.aliases,
            splits=config.splits,
            fallbacks=config.fallbacks,
            database=str(tmp_path_factory.mktemp("routing") / "gateway.db"),
        ),
    )
    gateway.wait_until_ready()
    yield gateway
    gateway.close()


@pytest.fixture
def upstream(module_upstream: FakeUpstream) -> FakeUpstream:
    module_upstream.replies = []
    module_upstream.bodies = []
    return module_upstream


@pytest.fixture
def routed(
    routing_gateway: Gateway, engine: FakeEngine, upstream: FakeUpstream, hf_tokenizer: HfTokenizer
) -> Iterator[openai.OpenAI]:
    engine.reply = lambda request: encode(hf_tokenizer, OURS)
    routing_gateway.wait_until_ready()
    with openai.OpenAI(base_url=routing_gateway.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(sdk: openai.OpenAI, model: str, **more: Any) -> tuple[str | None, str, str | None]:
    """The answer, the `model` that the client sees, and the one that the header names."""
    raw = sdk.chat.completions.with_raw_response.create(model=model, messages=MESSAGES, **more)
    chat = raw.parse()
    return chat.choices[0].message.content, chat.model, raw.headers.get("x-loraland-model")


@pytest.mark.parametrize(
    ("name", "text", "answered"),
    [
        ("base/shapes", OURS, "base/shapes"),
        ("mine", OURS, "base/shapes"),
        ("gpt-4", THEIRS, "gpt-4"),
        ("latest", THEIRS, "gpt-4"),
    ],
)
def test_the_client_sees_its_own_name_and_the_header_who_answered(
    routed: openai.OpenAI, name: str, text: str, answered: str
) -> None:
    assert ask(routed, name) == (text, name, answered)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_our_engine_answers_for_an_upstream_that_fails(
    routed: openai.OpenAI, upstream: FakeUpstream, status: int, stream: bool
) -> None:
    upstream.replies = [refuse(status)]
    if not stream:
        assert ask(routed, "gpt-4") == (OURS, "gpt-4", "base/shapes")
        return
    chunks = list(routed.chat.completions.create(model="gpt-4", messages=MESSAGES, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == OURS
    assert {chunk.model for chunk in chunks} == {"gpt-4"}


@pytest.mark.parametrize("code", [RejectCode.OVERLOADED, RejectCode.UNAVAILABLE])
def test_an_upstream_answers_for_our_engine(
    routed: openai.OpenAI, engine: FakeEngine, upstream: FakeUpstream, code: RejectCode
) -> None:
    engine.reject = lambda request: Rejected(request.request_id, code, "no")
    assert ask(routed, "mine") == (THEIRS, "mine", "gpt-4")
    assert upstream.asked[0]["model"] == "gpt-4-0613"


def test_a_bad_request_is_not_asked_twice(
    routed: openai.OpenAI, engine: FakeEngine, upstream: FakeUpstream
) -> None:
    upstream.replies = [refuse(400)]
    with pytest.raises(openai.BadRequestError, match="status 400"):
        ask(routed, "gpt-4")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(routed, "base/shapes", temperature=-1)
    assert len(upstream.bodies) == 1


def test_when_all_fail_the_first_error_is_told(
    routed: openai.OpenAI, engine: FakeEngine, upstream: FakeUpstream
) -> None:
    upstream.replies = [refuse(503)]
    engine.reject = lambda request: Rejected(request.request_id, RejectCode.INVALID, "cannot")
    with pytest.raises(openai.InternalServerError, match="status 503") as caught:
        ask(routed, "gpt-4")
    assert caught.value.response.headers["x-loraland-model"] == "gpt-4"


def test_nothing_falls_back_once_a_byte_was_sent(
    routed: openai.OpenAI, engine: FakeEngine, upstream: FakeUpstream
) -> None:
    upstream.replies = [upstream.stream(chat_events({"model": "gpt-4-0613"})[:3], then="die")]
    with pytest.raises(openai.APIError, match="connection"):
        list(routed.chat.completions.create(model="gpt-4", messages=MESSAGES, stream=True))
    assert engine.requests == []


def test_a_user_stays_in_one_arm(routed: openai.OpenAI) -> None:
    for user in ("ann", "bob", "cid", "dan"):
        assert len({ask(routed, "test", user=user)[2] for _ in range(3)}) == 1


def test_every_name_is_listed(routed: openai.OpenAI) -> None:
    cards = {card.id: card for card in routed.models.list()}
    assert {"base", "gpt-4", "latest", "mine", "test"} <= cards.keys()
    assert routed.models.retrieve("test") == cards["test"]


def test_a_response_falls_back_to_our_engine(routed: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.replies = [refuse(503)]
    answered = routed.responses.create(model="gpt-4", input="a")
    assert (answered.output_text, answered.model) == (OURS, "gpt-4")


def test_arms_get_their_shares() -> None:
    shares = {"a": 3.0, "b": 1.0, "never": 0.0}
    arms = Counter(arm_of("split", shares, str(who)) for who in range(4000))
    assert set(arms) == {"a", "b"}
    assert 0.72 < arms["a"] / 4000 < 0.78


def test_a_circle_of_fallbacks_asks_nobody_twice() -> None:
    names = Names(config_of())
    assert names.chain("latest", "x") == ["gpt-4", "base/shapes"]
    assert names.chain("mine", "x") == ["base/shapes", "gpt-4"]
    assert "base" not in names


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": (), "upstreams": ()}, "at least one"),
        ({"aliases": {"a": "b", "b": "a"}}, "circle"),
        ({"aliases": {"a": "nowhere"}}, "nowhere"),
        ({"aliases": {"gpt-4": "base"}}, "twice"),
        ({"aliases": {" ": "base"}}, "cannot be a name"),
        ({"splits": {"s": {"base": 0}}}, "share"),
        ({"splits": {"s": {"base": -1}}}, "between"),
        ({"fallbacks": {"gpt-5": ("base",)}}, "gpt-5"),
        ({"upstreams": (UpstreamConfig(name="x", url="nonsense"),)}, "http"),
        ({"upstreams": (UpstreamConfig(name="x", url="http://x", retries=-1),)}, "retries"),
        (
            {"upstreams": (UpstreamConfig(name="x", url="http://x", api_key_env="NOT_SET_ANYWHERE"),)},
            "NOT_SET_ANYWHERE",
        ),
    ],
)
def test_a_mistake_in_names_is_named(changes: dict[str, Any], words: str) -> None:
    bare = {"aliases": {}, "splits": {}, "fallbacks": {}}
    with pytest.raises(ConfigError, match=words):
        check_config(config_of(**{**bare, **changes}), "here")
