"""The input file of a batch: its lines, and what is wrong with them. Knows no model, no database, no HTTP.

A million lines take no more memory than one: the file is read in blocks, and ids that were seen are on disk.
"""

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

BLOCK_BYTES = 2**20
MAX_PROBLEMS = 100
"""Of a file; after so many nobody reads on."""
BOM = b"\xef\xbb\xbf"


class BatchLine(msgspec.Struct, frozen=True):
    """One request of a batch; the body is as it was written."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Problem(msgspec.Struct, frozen=True):
    """Why a batch failed, as OpenAI has it in `errors.data`."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """Counted from 1."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of looking through a file."""

    lines: int
    problems: list[Problem]


class StoppedError(Exception):
    """Nobody wants the answer any more."""


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Number and text of every line that is not blank.

    A line longer than `max_bytes` is cut there, which is no JSON any more, and is the last.
    """
    number, rest = 0, b""
    while block := file.read(BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if not line.isspace() and line:
                yield number, line[:max_bytes]
            if len(line) > max_bytes:
                return
        if len(rest) > max_bytes:
            break
    if rest and not rest.isspace():
        yield number + 1, (rest if number else rest.removeprefix(BOM))[:max_bytes]


def check_input(file: BinaryIO, endpoint: str, max_line_bytes: int, stop: threading.Event) -> Checked:
    """Look through a whole file. Takes a thread some seconds for a million lines.

    Raises:
        StoppedError: `stop` was set.
    """
    problems: list[Problem] = []
    count = 0
    seen = sqlite3.connect("")  # a file of its own that is gone with the connection
    try:
        seen.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
        for number, text in read_lines(file, max_line_bytes):
            if stop.is_set():
                raise StoppedError
            count += 1
            problem = _problem(text, endpoint, number, max_line_bytes)
            if isinstance(problem, BatchLine):
                added = seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (problem.custom_id,))
                problem = None if added.rowcount else _duplicate(number)
            if problem is not None:
                problems.append(problem)
                if len(problems) == MAX_PROBLEMS:
                    break
    finally:
        seen.close()
    if count == 0:
        problems.append(Problem("empty_file", "The input file holds no requests."))
    return Checked(count, problems)


def parse_line(text: bytes) -> BatchLine:
    """A line that `check_input` found nothing wrong with."""
    return msgspec.json.decode(text, type=BatchLine)


def _problem(text: bytes, endpoint: str, number: int, max_bytes: int) -> BatchLine | Problem:
    """What is wrong with a line, or the line."""
    if len(text) >= max_bytes:
        message = f"This line is too long: a request may have at most {max_bytes} bytes."
        return Problem("line_too_long", message, line=number)
    try:
        line = parse_line(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _malformed(text, number)
    if not line.custom_id:
        return _missing("custom_id", number)
    if line.method != "POST":
        return Problem("invalid_method", "The method of every request must be 'POST'.", "method", number)
    if line.url != endpoint:
        message = f"The url of this request does not match the batch's endpoint, '{endpoint}'."
        return Problem("url_mismatch", message, "url", number)
    if not bytes(line.body).lstrip().startswith(b"{"):
        return Problem("invalid_type", "'body' must be an object.", "body", number)
    return line


def _malformed(text: bytes, number: int) -> Problem:
    try:
        document: Any = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Problem("invalid_json_line", "This line is not parseable as valid JSON.", line=number)
    if not isinstance(document, dict):
        return Problem("invalid_json_line", "This line is not a JSON object.", line=number)
    for name in BatchLine.__struct_fields__:
        if name not in document:
            return _missing(name, number)
    name = next(name for name in ("custom_id", "method", "url") if not isinstance(document[name], str))
    return Problem("invalid_type", f"'{name}' must be a string.", name, number)


def _missing(name: str, number: int) -> Problem:
    return Problem("missing_required_parameter", f"Missing required parameter: '{name}'.", name, number)


def _duplicate(number: int) -> Problem:
    message = "The custom_id of this request is that of another one; every request of a batch needs its own."
    return Problem("duplicate_custom_id", message, "custom_id", number)
