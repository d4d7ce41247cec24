"""`adapters: [{name, weight}]` through the official SDK."""

from typing import Any

import openai
import pytest

from tests.gateway.fake_engine import FakeEngine

HI: Any = [{"role": "user", "content": "hi"}]


def test_weights_and_names_reach_the_engine(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    adapters = [{"name": "shapes", "weight": 0.7}, {"name": "base/colours", "weight": -0.25}, {"name": "far"}]
    sdk.chat.completions.create(model="base", messages=HI, extra_body={"adapters": adapters})
    sdk.completions.create(model="base", prompt="hi", extra_body={"adapters": adapters})
    for request in engine.requests:
        assert request.adapter is not None and request.adapter.uri == ""
        assert [(part.ref.name, part.weight) for part in request.adapter.parts] == [
            ("base/shapes", 0.7),
            ("base/colours", -0.25),
            ("base/far", 1.0),
        ]
        assert request.adapter.name == "base/0.7*shapes+-0.25*colours+1*far"
    assert len(engine.requests) == 2


@pytest.mark.parametrize(
    ("model", "merged", "error", "param"),
    [
        ("base", [], openai.BadRequestError, "adapters"),
        ("base", [{"name": "shapes"}] * 9, openai.BadRequestError, "adapters"),
        ("base", "shapes", openai.BadRequestError, "adapters"),
        ("base", [{"weight": 1}], openai.BadRequestError, None),
        ("base", [{"name": "shapes", "wieght": 1}], openai.BadRequestError, None),
        ("base", [{"name": "shapes", "weight": "1"}], openai.BadRequestError, "adapters[0].weight"),
        ("base", [{"name": "shapes", "weight": 1e9}], openai.BadRequestError, "adapters[0].weight"),
        ("base/shapes", [{"name": "colours"}], openai.BadRequestError, "model"),
        ("base", [{"name": "shapes"}, {"name": "no"}], openai.NotFoundError, "adapters[1].name"),
        ("base", [{"name": "../shapes"}], openai.NotFoundError, "adapters[0].name"),
        ("base", [{"name": "other/shapes"}], openai.NotFoundError, "adapters[0].name"),
    ],
)
def test_what_cannot_be_merged_is_an_openai_error(
    model: str,
    merged: Any,
    error: type[openai.APIStatusError],
    param: str | None,
    sdk: openai.OpenAI,
    engine: FakeEngine,
) -> None:
    with pytest.raises(error) as caught:
        sdk.chat.completions.create(model=model, messages=HI, extra_body={"adapters": merged})
    if param is not None:
        assert caught.value.param == param
    assert not engine.requests
