"""What servers say about waiting, read as they say it."""

import pytest

from loadtest.asker import duration_s, retry_after_s
from loadtest.prices import LIST_PRICES, TokenPrice, price_of


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({}, None),
        ({"Retry-After": "20"}, 20.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
    ],
)
def test_pause_that_a_server_asks_for(headers: dict[str, str], pause: float | None) -> None:
    assert retry_after_s(headers, now_unix=60.0) == pause


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1.0), ("6m0s", 360.0), ("20ms", 0.02), ("1h2m3.5s", 3723.5), ("7", 7.0), ("x", None)],
)
def test_duration_of_a_rate_limit(text: str, seconds: float | None) -> None:
    assert duration_s(text) == (pytest.approx(seconds) if seconds is not None else None)


def test_a_dated_version_has_its_models_price_and_a_longer_name_its_own() -> None:
    assert price_of("gpt-4-0613", LIST_PRICES) == LIST_PRICES["gpt-4"]
    assert price_of("gpt-4o-mini", LIST_PRICES) == LIST_PRICES["gpt-4o-mini"]
    assert price_of("gpt-4-turbo-2024-04-09", LIST_PRICES) == LIST_PRICES["gpt-4-turbo"]
    assert price_of("mistral-7b/viggo", LIST_PRICES) is None
    assert price_of("gpt-4-vision", LIST_PRICES) is None


def test_cached_tokens_have_their_own_price() -> None:
    price = TokenPrice(prompt=10, output=20, cached_prompt=1)
    assert price.cost(1_000_000, 500_000, 500_000) == pytest.approx(5 + 0.5 + 10)
