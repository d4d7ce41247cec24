"""Rows and stages for tests, with hand-written times."""

from itertools import pairwise
from typing import Any

from loadtest.plan import RunPlan, Stage
from loadtest.record import Machine, RequestRow, RunRecord, StageEnded

BASE = Stage(mode="base", users=2, models=("m",), adapters=0)


def row(sent: float, tokens: list[float], **changes: Any) -> RequestRow:
    """A completed request sent at `sent` whose text events came at `tokens` and which ended with the last."""
    facts: dict[str, Any] = {
        "run": "r",
        "mode": "base",
        "users": 2,
        "phase": "load",
        "index": 0,
        "user": 0,
        "model": "m",
        "adapter": None,
        "cold": False,
        "scheduled": sent,
        "sent": sent,
        "headers": sent,
        "first_content": tokens[0] if tokens else None,
        "last_content": tokens[-1] if tokens else None,
        "done": tokens[-1] if tokens else sent + 1,
        "prompt_tokens": 10,
        "cached_tokens": 0,
        "completion_tokens": len(tokens),
        "events": len(tokens),
        "gaps": tuple(b - a for a, b in pairwise(tokens)),
        "outcome": "completed",
        "status": 200,
        "error": None,
        "finish_reason": "stop",
    }
    return RequestRow(**{**facts, **changes})


def ended(steady_from: float = 10.0, steady_until: float = 20.0, **changes: Any) -> StageEnded:
    facts: dict[str, Any] = {
        "stage": 0,
        "started": steady_from - 1,
        "steady_from": steady_from,
        "steady_until": steady_until,
        "interrupted": False,
        "spawned_users": 2,
        "client_cpu_share": 0.1,
        "loop_lag_ms": (0.1, 0.5, 1.0),
        "locust_requests": 1,
        "locust_failures": 0,
        "locust_average_ms": 1.0,
    }
    return StageEnded(**{**facts, **changes})


def record(stages: tuple[Stage, ...], ends: tuple[StageEnded, ...], **changes: Any) -> RunRecord:
    plan: dict[str, Any] = {
        "run": "r",
        "base_url": "http://example.test",
        "endpoint": "chat",
        "model": "m",
        "stages": stages,
        "stage_seconds": 11,
        "ramp_seconds": 1,
    }
    facts = {name: changes.pop(name) for name in ("interrupted", "trouble") if name in changes}
    machine = Machine(cpu="abacus", cores=2, ram_gib=1.0, system="test", versions={"python": "3"})
    return RunRecord(
        plan=RunPlan(**{**plan, **changes}),
        command="python -m loadtest",
        started_unix=1.7e9,
        machine=machine,
        server=None,
        stages=ends,
        **facts,
    )
