"""The answers of a comparison, kept as they come: append-only JSON lines. Knows no server, no score.

Before a request leaves, its worst cost is written; after it has ended, what came of it. So a run that was killed knows
what it may have paid for without an answer, and one that goes on asks only what has none.
"""

import fcntl
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec


class JournalError(Exception):
    """The journal cannot be used or written; the message is fit for the user."""


class Asked(msgspec.Struct, frozen=True, kw_only=True, tag="asked"):
    """A request is about to leave."""

    key: str
    worst_cost: float


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """What came of one request. Times in seconds, costs in US dollars."""

    key: str
    task: str
    example: str
    side: Literal["left", "right"]
    model: str
    asked_unix: float
    text: str
    outcome: Literal["answered", "failed"]
    error: str | None = None
    status: int | None = None
    finish_reason: str | None = None
    ttft_s: float | None = None
    """Request sent on an open connection → first event with text."""
    total_s: float | None = None
    """Request sent on an open connection → end of the stream."""
    streaming_s: float | None = None
    """First → last event with text."""
    connect_s: float = 0.0
    """To open a connection for it; in no other time."""
    attempts: int = 1
    waited_s: float = 0.0
    """For the rate limit and before repeated attempts; in no other time."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    events: int = 0
    cost: float = 0.0
    """By token prices; 0 without one."""


Entry = Asked | Answer


def question_key(url: str, side: str, body: dict, example: str) -> str:
    """Who is asked what, how: the same key means that an answer can be used again."""
    facts = msgspec.json.encode([url, side, example, body], order="deterministic")
    return hashlib.sha256(facts).hexdigest()[:32]


class AnswerJournal:
    """One file, one writer. A line that a crash cut off is dropped."""

    def __init__(self, path: Path) -> None:
        """Raises JournalError when it cannot be opened, another run holds it, or it holds something else."""
        self.path = path
        self.answers: dict[str, Answer] = {}
        """The last answer to every key, failed ones too."""
        self.spent = 0.0
        """Dollars over all runs: what ended cost, and the worst case of what never did."""
        self._pending: dict[str, float] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise JournalError(f"{path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise JournalError(
                f"{path} is in use by another comparison; give --out another directory"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerJournal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def good_answers(self, keys: Sequence[str]) -> dict[str, Answer]:
        """Those of the keys that need not be asked again."""
        found = {key: self.answers[key] for key in keys if key in self.answers}
        return {key: answer for key, answer in found.items() if answer.outcome == "answered"}

    def append(self, entry: Entry) -> None:
        """Raises JournalError when the line did not reach the disk; nothing of it is left then."""
        line = msgspec.json.encode(entry) + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise JournalError(f"{self.path} cannot be written: {error.strerror}") from None
        self._take(entry)

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        decoder = msgspec.json.Decoder(Entry)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                self._take(decoder.decode(line))
            except msgspec.DecodeError as error:
                raise JournalError(f"{self.path}, line {number}: {error}") from None
        self._file.truncate(whole)

    def _take(self, entry: Entry) -> None:
        if isinstance(entry, Asked):
            self._pending[entry.key] = entry.worst_cost
            self.spent += entry.worst_cost
        else:
            self.spent += entry.cost - self._pending.pop(entry.key, 0.0)
            if entry.outcome == "answered" or entry.key not in self.answers:
                self.answers[entry.key] = entry
