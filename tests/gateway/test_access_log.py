"""One line per request, with what matters and nothing that was said."""

import httpx
from structlog.testing import capture_logs

from tests.gateway.conftest import wait_until

SECRET = "the password is fox"


def test_one_line_per_request_without_its_text(http: httpx.Client) -> None:
    body = {
        "model": "base/shapes",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 4,
        "stream": True,
    }
    with capture_logs() as lines:
        response = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "abc"})
        assert "data: " in response.text
        wait_until(lambda: lines)
    (line,) = lines
    assert SECRET not in str(line)
    assert (line["event"], line["status"], line["model"]) == ("request", 200, "base/shapes")
    assert (line["request_id"], line["completion_tokens"]) == ("abc", 4)
    assert line["prompt_tokens"] > 4
    assert 0 < line["ttft_s"] <= line["seconds"]


def test_an_error_is_logged_by_its_code(http: httpx.Client) -> None:
    with capture_logs() as lines:
        http.post(
            "/v1/chat/completions", json={"model": "x", "messages": [{"role": "user", "content": SECRET}]}
        )
        http.get("/healthz")
        http.get("/nowhere")
        wait_until(lambda: len(lines) == 2)
    assert [(line["status"], line["error"]) for line in lines] == [
        (404, "model_not_found"),
        (404, "unknown_url"),
    ]
    assert lines[0]["model"] is None
