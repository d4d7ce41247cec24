"""The machine a benchmark ran on: what it is, and what its processes use of it. Knows no server."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parent.parent


@dataclass(slots=True)
class MemoryPeak:
    """The most that was seen; the two need not be of one moment."""

    rss_bytes: int = 0
    pss_bytes: int = 0


@contextmanager
def watched_memory(process: psutil.Process, every_s: float = 1.0) -> Iterator[MemoryPeak]:
    """Samples a process and its descendants while the block runs."""
    peak, done = MemoryPeak(), threading.Event()

    def watch() -> None:
        while True:
            rss = pss = 0
            for each in family(process):
                with suppress(psutil.Error):
                    memory = each.memory_full_info()
                    rss, pss = rss + memory.rss, pss + memory.pss
            peak.rss_bytes, peak.pss_bytes = max(peak.rss_bytes, rss), max(peak.pss_bytes, pss)
            if done.wait(every_s):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for each in family(process):
        with suppress(psutil.Error):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def busy_seconds() -> float:
    """Processor seconds that this machine has worked, without those of this process."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Guests' time is in the user's time already.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return sum(times) - idle - guests - own.user - own.system


def about(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures or to repeat them: all but what was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "command": shlex.join(["python", "-m", script, *map(_without_place, sys.argv[1:])]),
        "commit": commit.stdout.strip() or None,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "options": {name: _without_place(str(value)) for name, value in vars(options).items()},
    }


def _without_place(argument: str) -> str:
    """A path's last part: where a file lies on this machine is nobody's concern."""
    return Path(argument).name if argument.startswith("/") else argument


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
