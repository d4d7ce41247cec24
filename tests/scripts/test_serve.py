"""`loraland serve` with the fake engine: the real processes, and that nothing of them stays behind."""

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scripts.demo import free_port

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@contextmanager
def serving(tmp_path: Path) -> Iterator[tuple[psutil.Popen, str]]:
    """`loraland serve --fake`, ready, and the gateway's address."""
    port = free_port()
    command = [sys.executable, "-m", "gateway.cli", "serve", "--fake", "--config", "scripts/loraland.toml"]
    command += ["--port", str(port), "--engine-port", str(free_port())]
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        process = psutil.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 90
        while not _answers(f"http://127.0.0.1:{port}/readyz"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        family = process.children(recursive=True)
        yield process, f"http://127.0.0.1:{port}"
        process.wait(30)
    finally:
        left = [each for each in [process, *family] if each.is_running() and each.status() != "zombie"]
        for each in left:
            each.kill()
        assert left == [], log.read_text()


def test_it_answers_shows_who_speaks_and_stops_on_a_signal(tmp_path: Path):
    with serving(tmp_path) as (process, url):
        loraland = [sys.executable, "-m", "gateway.cli"]
        listed = subprocess.check_output([*loraland, "models", "--url", url], cwd=ROOT, text=True)
        assert {"smollm2-135m", "smollm2-135m/clinc150_domain"} <= set(listed.split())
        asked = [
            *loraland,
            "chat",
            "smollm2-135m/clinc150_domain",
            "hello",
            "--max-tokens",
            "4",
            "--url",
            url,
        ]
        assert subprocess.check_output(asked, cwd=ROOT, text=True).strip()
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    names = {line.split("│")[0].strip() for line in (tmp_path / "serve.log").read_text().splitlines()}
    assert names == {"engine", "gateway", "serve"}


@pytest.mark.parametrize("victim", ["engine", "gateway"])
def test_when_one_dies_the_other_is_stopped_and_the_exit_code_is_1(tmp_path: Path, victim: str):
    with serving(tmp_path) as (process, _):
        (child,) = [child for child in process.children() if child.cmdline()[1:3] == ["-m", victim]]
        child.kill()
    assert process.returncode == 1
    assert f"the {victim} was killed by SIGKILL" in (tmp_path / "serve.log").read_text()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
