"""What is wrong with a batch's input file, line by line, in memory that does not grow with it."""

import io
import json
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from gateway.batch_input import MAX_PROBLEMS, StoppedError, check_input, parse_line, read_lines

ENDPOINT = "/v1/completions"


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    whole = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": {"model": "base"}} | changes
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def problems(*lines: bytes, max_bytes: int = 10_000) -> list[tuple[str, str | None, int | None]]:
    checked = check_input(io.BytesIO(b"\n".join(lines)), ENDPOINT, max_bytes, threading.Event())
    return [(problem.code, problem.param, problem.line) for problem in checked.problems]


def test_good_lines_are_counted_and_blank_ones_are_not():
    data = b"\xef\xbb\xbf" + line("a") + b"\r\n\n  \n" + line("b") + b"\n" + line("c", more=1)
    checked = check_input(io.BytesIO(data), ENDPOINT, 10_000, threading.Event())
    assert (checked.lines, checked.problems) == (3, [])
    assert [number for number, _ in read_lines(io.BytesIO(data), 10_000)] == [1, 4, 5]


def test_a_body_is_kept_as_it_was_written():
    assert bytes(parse_line(b'{"custom_id":"a","method":"POST","url":"x","body": { "a" : 1.50 } }').body) == (
        b'{ "a" : 1.50 }'
    )


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (b"[" * 9000, "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"null", "invalid_json_line", None),
        (line(...), "missing_required_parameter", "custom_id"),
        (line(""), "missing_required_parameter", "custom_id"),
        (line(url=...), "missing_required_parameter", "url"),
        (line(method=...), "missing_required_parameter", "method"),
        (line(body=...), "missing_required_parameter", "body"),
        (line(7), "invalid_type", "custom_id"),
        (line(url=None), "invalid_type", "url"),
        (line(body="{}"), "invalid_type", "body"),
        (line(body=None), "invalid_type", "body"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/chat/completions"), "url_mismatch", "url"),
        (line("good"), "duplicate_custom_id", "custom_id"),
        (line("x" * 11_000), "line_too_long", None),
    ],
)
def test_a_wrong_line_is_named(wrong: bytes, code: str, param: str | None):
    assert problems(line("good"), b"", wrong) == [(code, param, 3)]


def test_a_line_without_end_is_not_read_to_its_end():
    class Endless(io.BytesIO):
        blocks = 0

        def read(self, size: int | None = -1) -> bytes:
            self.blocks += 1
            return b"x" * (size or 0)

    file = Endless()
    checked = check_input(file, ENDPOINT, 2**21, threading.Event())
    assert [problem.code for problem in checked.problems] == ["line_too_long"]
    assert file.blocks <= 4


def test_an_empty_file_is_one_problem():
    assert problems(b"", b" ") == [("empty_file", None, None)]


def test_so_many_problems_are_enough():
    assert len(problems(*[b"{"] * 500)) == MAX_PROBLEMS


def test_looking_through_a_file_can_be_stopped():
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        check_input(io.BytesIO(line()), ENDPOINT, 10_000, stop)


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    def peak(lines: int) -> int:
        path = tmp_path / f"{lines}.jsonl"
        with path.open("wb") as file:
            file.writelines(line(f"request-number-{number}") + b"\n" for number in range(lines))
        tracemalloc.start()
        with path.open("rb") as file:
            assert check_input(file, ENDPOINT, 10_000, threading.Event()).lines == lines
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(60_000) < 1.5 * peak(20_000)
