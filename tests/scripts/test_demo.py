"""The demo with the fake engine: it runs to its end, and however it ends it leaves no process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scripts import demo

ROOT = Path(__file__).parent.parent.parent
DEMO = [sys.executable, "-m", "scripts.demo", "--fake"]


def test_the_tasks_shown_come_first_and_have_an_adapter():
    tasks = [task.name for task in demo.trained_tasks()]
    assert len(tasks) >= 2
    assert set(tasks[:2]) <= set(demo.SHOWN_TASKS)
    assert all((demo.TRAINED / name / "adapter_model.safetensors").exists() for name in tasks)


def test_a_free_port_is_free():
    assert demo.free_port() > 0


@pytest.mark.e2e
@pytest.mark.slow
def test_the_demo_lists_asks_and_stops():
    process = psutil.Popen(
        [*DEMO, "--load-seconds", "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    family = _family_when_serving(process)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "client.models.list()" in output
    for task in demo.trained_tasks()[:2]:
        assert f"{demo.BASE}/{task.name}" in output
    assert _living(family) == []


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_with_everything_it_started(number: signal.Signals):
    process = psutil.Popen(
        [*DEMO, "--serve", "--port", str(demo.free_port())],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = _family_when_serving(process)
    assert process.stdout is not None
    shown: list[str] = []
    for line in process.stdout:
        shown.append(line)
        if "Ctrl-C stops everything" in line:
            break
    assert "curl http://127.0.0.1" in "".join(shown)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert _living(family) == []


def _family_when_serving(process: psutil.Popen) -> list[psutil.Process]:
    """Engine, gateway and their supervisor, once all three run."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        family = process.children(recursive=True)
        modules = [each.cmdline()[2:3] for each in family if each.is_running() and each.status() != "zombie"]
        if ["engine"] in modules and ["gateway"] in modules:
            return family
        time.sleep(0.05)
    pytest.fail(f"engine and gateway did not start: {process.communicate()[0]}")


def _living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
