"""The stream reader: what counts as a token's arrival, and that no split of the bytes changes it."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.stream import CompletionStream, SseDecoder, error_message


def frame(payload: object) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def delta(**said: object) -> bytes:
    return frame({"choices": [{"index": 0, "delta": said, "finish_reason": None}]})


FINISH = frame({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
USAGE = frame(
    {
        "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
    }
)
DONE = b"data: [DONE]\n\n"


def heard(*pieces: bytes) -> CompletionStream:
    """Piece k arrives at second k; the body ends one second after the last."""
    stream = CompletionStream()
    for second, piece in enumerate(pieces):
        stream.feed(piece, float(second))
    stream.close(float(len(pieces)))
    return stream


def test_role_chunk_is_no_token() -> None:
    stream = heard(delta(role="assistant", content=""), delta(content="a"), FINISH, DONE)
    assert stream.event_times == [1.0]


def test_usage_chunk_is_no_token_and_gives_the_counts() -> None:
    stream = heard(delta(content="a"), FINISH, USAGE, DONE)
    assert stream.event_times == [0.0]
    assert (stream.prompt_tokens, stream.completion_tokens, stream.cached_tokens) == (9, 3, 4)


@pytest.mark.parametrize(
    "said",
    [{"reasoning_content": "hm"}, {"reasoning": "hm"}, {"tool_calls": [{"index": 0}]}, {"content": "a"}],
)
def test_any_generated_content_counts(said: dict) -> None:
    assert heard(delta(**said), FINISH, DONE).event_times == [0.0]


def test_completions_text_counts_and_empty_text_does_not() -> None:
    stream = heard(
        frame({"choices": [{"text": ""}]}),
        frame({"choices": [{"text": "a"}]}),
        frame({"choices": [{"text": "", "finish_reason": "length"}]}),
        DONE,
    )
    assert stream.event_times == [1.0]
    assert stream.finish_reason == "length"
    assert stream.ended_well


def test_done_time_is_that_of_the_done_marker_not_of_the_body_end() -> None:
    assert heard(delta(content="a"), FINISH, DONE, b": still open\n\n").done_at == 2.0


def test_error_event_after_tokens_is_an_error_with_its_code() -> None:
    stream = heard(delta(content="a"), frame({"error": {"message": "engine lost", "code": "engine_lost"}}))
    assert stream.error == "engine_lost: engine lost"
    assert not stream.ended_well
    assert stream.event_times == [0.0]


def test_stream_without_finish_is_cut_off() -> None:
    stream = heard(delta(content="a"), delta(content="b"))
    assert stream.error is not None and "finish reason" in stream.error


def test_incomplete_last_event_is_not_heard() -> None:
    stream = heard(delta(content="a"), delta(content="b").rstrip(b"\n"))
    assert stream.event_times == [0.0]


def test_garbage_is_an_error_not_a_crash() -> None:
    for junk in (b"data: {nope\n\n", b"data: \xff\xfe\n\n"):
        assert heard(junk).error is not None
    odd = frame({"choices": [7, {"delta": None}, {"delta": {"content": None}}], "usage": "none"})
    assert heard(odd, frame([1]), FINISH, DONE).event_times == []


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_every_line_ending_is_read(ending: bytes) -> None:
    body = b": hello\n\nevent: x\ndata: one\ndata:two\n\nid: 7\n\ndata: three\n\n".replace(b"\n", ending)
    assert SseDecoder().feed(body) == [b"one\ntwo", b"three"]


def test_event_is_complete_at_its_blank_line_even_with_lone_returns() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\r\r") == [b"a"]
    assert decoder.feed(b"data: b\r\n\r") == [b"b"]
    assert decoder.feed(b"\ndata: c\n\n") == [b"c"]


def test_byte_order_mark_is_skipped() -> None:
    assert SseDecoder().feed(b"\xef\xbb\xbfdata: a\n\n") == [b"a"]


@given(
    data=st.lists(st.text("ab:é {}", max_size=6).filter(lambda t: t.strip()), max_size=5),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
def test_no_split_of_the_bytes_changes_the_events(data: list[str], ending: str, cuts: list[int]) -> None:
    body = "".join(f"data: {text}{ending}{ending}" for text in data).encode()
    decoder = SseDecoder()
    edges = sorted({0, len(body), *(min(cut, len(body)) for cut in cuts)})
    events = [event for a, b in pairwise(edges) for event in decoder.feed(body[a:b])]
    assert events == [text.encode() for text in data]


def test_error_message_of_any_shape_is_one_short_line() -> None:
    assert error_message({"error": {"message": "no\nsuch model", "code": "model_not_found"}}) == (
        "model_not_found: no such model"
    )
    assert error_message({"error": "plain"}) == "plain"
    assert error_message({"detail": "x"}) == "{'detail': 'x'}"
    assert len(error_message("y" * 5000)) == 300
