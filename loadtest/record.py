"""What is kept of a run: a row for each request, a line for each stage. Knows no metric.

All times are seconds of `time.perf_counter` since the run's start; `RunRecord.started_unix` ties them to the
calendar once.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from loadtest.plan import RunPlan

Outcome = Literal["completed", "failed", "incomplete"]

ROWS_FILE = "requests.jsonl"
RUN_FILE = "run.json"


class RequestRow(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One request, as measured. `incomplete`: still running when its stage ended, neither good nor bad."""

    run: str
    mode: str
    users: int
    phase: Literal["warmup", "load"]
    index: int
    """Number of the prompt within the run."""
    user: int
    model: str
    adapter: str | None
    """`model` when that is an adapter's name, None for the base."""
    cold: bool
    """The first request of the run to this model: it may include loading the adapter."""
    scheduled: float
    """When the request was due. In a closed loop: when the user was ready to send it."""
    sent: float
    headers: float | None
    first_content: float | None
    last_content: float | None
    done: float | None
    """End of the stream (`[DONE]`, or of the body); None for a request that never got so far."""
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    """The server's own counts, from `usage`."""
    events: int
    """Content events; not tokens."""
    gaps: tuple[float, ...]
    """Seconds between successive content events; `events - 1` of them."""
    outcome: Outcome
    status: int | None
    """HTTP status; None when no answer came."""
    error: str | None
    finish_reason: str | None


class StageStarted(msgspec.Struct, frozen=True, kw_only=True, tag="stage_started"):
    """`stage` is an index into `RunPlan.stages`."""

    stage: int
    at: float


class StageEnded(msgspec.Struct, frozen=True, kw_only=True, tag="stage_ended"):
    """A stage that ran, or ran in part. What the load process noticed about itself."""

    stage: int
    started: float
    steady_from: float
    steady_until: float
    """The steady window; empty (`steady_until <= steady_from`) when the stage was stopped in its ramp."""
    interrupted: bool
    spawned_users: int
    client_cpu_share: float
    """CPU seconds of the load process over seconds of the steady window; 1.0 is one full core."""
    loop_lag_ms: tuple[float, float, float]
    """p50, p99 and maximum by which ticks of 10 ms came late in the event loop, over the steady window."""
    locust_requests: int
    locust_failures: int
    locust_average_ms: float
    """Locust's own count and average over the whole stage: must agree with the rows."""


class Trouble(msgspec.Struct, frozen=True, kw_only=True, tag="trouble"):
    """Why the load process gave up before its plan was done."""

    message: str


Message = RequestRow | StageStarted | StageEnded | Trouble
"""What the load process says on its standard output, one JSON object a line."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where the load came from."""

    cpu: str
    cores: int
    ram_gib: float | None
    system: str
    versions: dict[str, str]


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`run.json`: all that a report needs besides the rows."""

    plan: RunPlan
    command: str
    started_unix: float
    machine: Machine
    server: str | None
    """The `Server` header of `/v1/models`."""
    stages: tuple[StageEnded, ...] = ()
    interrupted: bool = False
    trouble: str | None = None


def write_run(directory: Path, record: RunRecord) -> None:
    (directory / RUN_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def read_run(directory: Path) -> RunRecord:
    """Raises FileNotFoundError, or msgspec.DecodeError for a file that is not a run's."""
    return msgspec.json.decode((directory / RUN_FILE).read_bytes(), type=RunRecord)


def read_rows(lines: Iterable[bytes]) -> list[RequestRow]:
    """Rows of a JSONL file or pipe, empty lines skipped. Raises msgspec.DecodeError."""
    decoder = msgspec.json.Decoder(RequestRow)
    return [decoder.decode(line) for line in lines if line.strip()]
