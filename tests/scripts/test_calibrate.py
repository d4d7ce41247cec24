"""The load test recovers known times, against what the server itself recorded."""

from collections.abc import Iterator

import pytest

from scripts.calibrate import known_server, measure_harness

pytestmark = pytest.mark.slow

TTFT_MS, GAP_MS, TOKENS = 60.0, 10.0, 20
ANSWER_S = (TTFT_MS + (TOKENS - 1) * GAP_MS) / 1000


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with known_server(TTFT_MS, GAP_MS, TOKENS) as address:
        yield address


@pytest.mark.parametrize(("streams", "open_loop"), [(1, False), (32, False), (32, True)])
def test_known_times_are_recovered(url: str, streams: int, open_loop: bool) -> None:
    got = measure_harness(url, streams, open_loop=open_loop, seconds=2.0, tokens=TOKENS, answer_s=ANSWER_S)
    assert got.requests > 3
    assert got.itl_mean_ms.truth >= GAP_MS - 0.5 and got.ttft_p50_ms.truth >= TTFT_MS - 0.5
    assert got.ttft_p50_ms.client == pytest.approx(got.ttft_p50_ms.truth, abs=10)
    assert got.itl_mean_ms.client == pytest.approx(got.itl_mean_ms.truth, abs=1)
    if got.requests_per_s is not None:
        assert got.requests_per_s.client == pytest.approx(got.requests_per_s.truth, rel=0.1)
