"""The `loraland` command against a small HTTP server that speaks as a gateway does."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway import cli

RUNNER = CliRunner()
MODELS = {
    "object": "list",
    "data": [
        {
            "id": "base",
            "object": "model",
            "created": 0,
            "owned_by": "x",
            "root": "the-weights",
            "parent": None,
        },
        {
            "id": "base/task",
            "object": "model",
            "created": 0,
            "owned_by": "x",
            "root": "/dir",
            "parent": "base",
        },
    ],
}


ADAPTERS = {
    "models": [
        {
            "model": "base",
            "unloaded": ["base/cold"],
            "engine": {
                "slots": 4,
                "slots_used": 1,
                "device_bytes": 1572864,
                "device_budget_bytes": 2**29,
                "host_adapters": 1,
                "host_bytes": 1572864,
                "host_budget_bytes": 2**30,
                "evictions": 3,
                "adapters": [
                    {
                        "name": "base/task",
                        "state": "resident",
                        "tier": "device",
                        "digest": "0123456789ab",
                        "rank": 8,
                        "host_bytes": 1572864,
                        "device_bytes": 1572864,
                        "slot": 0,
                        "running": 2,
                        "waiting": 1,
                        "used_s_ago": 125.0,
                    },
                    {
                        "name": "base/sick",
                        "state": "failed",
                        "tier": "source",
                        "digest": "",
                        "rank": 0,
                        "host_bytes": 0,
                        "device_bytes": 0,
                        "slot": None,
                        "running": 0,
                        "waiting": 0,
                        "used_s_ago": 4.0,
                        "reason": "The file is cut off.",
                    },
                ],
            },
        },
        {"model": "gone", "engine": None, "unloaded": []},
    ]
}


class Gateway(BaseHTTPRequestHandler):
    """`models/base/task` answers "wie geht's"; any other model is not found; model `dies` fails in mid-stream."""

    asked: list[dict]

    def do_GET(self) -> None:
        body = MODELS if self.path.startswith("/v1/models") else ADAPTERS
        self._send(200 if self.path in ("/v1/models", "/adapters") else 404, json.dumps(body).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if body["model"] == "dies":
            self._send(200, b'data: {"error": {"message": "the engine went away"}}\n\n')
        elif body["model"] != "base/task":
            error = {"message": "The model `x` does not exist", "type": "invalid_request_error"}
            self._send(404, json.dumps({"error": error}).encode())
        else:
            deltas = [{"role": "assistant"}, {"content": "wie "}, {"content": "geht's"}, {}]
            events = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
            events += [json.dumps({"choices": [], "usage": {}}), "[DONE]"]
            frames = [f"data: {event}\n\n" for event in events]
            self._send(200, "".join(frames).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def url() -> Iterator[str]:
    Gateway.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_command_has_help():
    top = RUNNER.invoke(cli.app, ["--help"]).output
    for command in ("serve", "engine", "gateway", "models", "adapters", "chat"):
        assert command in top
        assert RUNNER.invoke(cli.app, [command, "--help"]).exit_code == 0


def test_the_command_loads_no_torch_and_no_web_framework():
    check = "import sys, gateway.cli; sys.exit(bool({'torch', 'litestar', 'aiohttp'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_models_lists_ids_bases_and_origins(url: str, suffix: str):
    result = RUNNER.invoke(cli.app, ["models", "--url", url + suffix])
    assert result.exit_code == 0
    assert [line.split() for line in result.output.splitlines()[1:]] == [
        ["base", "the-weights"],
        ["base/task", "base", "/dir"],
    ]


def test_models_says_what_to_start_when_nothing_answers():
    result = RUNNER.invoke(cli.app, ["models", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert "loraland serve" in result.output


def test_models_refuses_an_address_without_a_scheme():
    result = RUNNER.invoke(cli.app, ["models", "--url", "localhost:8000"])
    assert result.exit_code == 2
    assert "http://" in result.output


@pytest.mark.parametrize("suffix", ["", "/v1/"])
def test_adapters_shows_state_memory_and_use(url: str, suffix: str):
    result = RUNNER.invoke(cli.app, ["adapters", "--url", url + suffix])
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0][:6] == ["base:", "1", "of", "4", "slots,", "1.5"]
    assert lines[2] == ["task", "resident", "8", "1.5", "2", "1", "2", "min", "ago", "0", "0123456789ab"]
    assert "The file is cut off." in result.output
    assert "gone: the engine does not answer" in result.output
    assert "cold" not in result.output and "1 more" in result.output
    assert "cold" in RUNNER.invoke(cli.app, ["adapters", "--all", "--url", url]).output


def test_adapters_gives_programs_what_the_gateway_said(url: str):
    result = RUNNER.invoke(cli.app, ["adapters", "--json", "--url", url])
    assert json.loads(result.output) == ADAPTERS


def test_watching_adapters_looks_again_until_interrupted(url: str, monkeypatch: pytest.MonkeyPatch):
    looks = 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("gateway.cli.time.sleep", sleep)
    result = RUNNER.invoke(cli.app, ["adapters", "--watch", "--url", url])
    assert (result.exit_code, looks) == (0, 3)
    assert "resident" in result.output


def test_chat_prints_the_streamed_answer(url: str):
    result = RUNNER.invoke(cli.app, ["chat", "base/task", "hello", "--system", "be kind", "--url", url])
    assert (result.exit_code, result.output) == (0, "wie geht's\n")
    assert Gateway.asked[0]["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
    ]


def test_chat_reads_the_question_from_standard_input(url: str):
    result = RUNNER.invoke(cli.app, ["chat", "base/task", "-", "--url", url], input="from a pipe")
    assert result.exit_code == 0
    assert Gateway.asked[0]["messages"] == [{"role": "user", "content": "from a pipe"}]


def test_chat_shows_the_gateways_own_message_on_an_error(url: str):
    result = RUNNER.invoke(cli.app, ["chat", "nothing", "hello", "--url", url])
    assert (result.exit_code, result.output) == (2, "The model `x` does not exist\n")


def test_chat_shows_a_failure_in_mid_stream(url: str):
    result = RUNNER.invoke(cli.app, ["chat", "dies", "hello", "--url", url])
    assert (result.exit_code, result.output) == (2, "the engine went away\n")


def test_a_configuration_that_is_not_there_is_named():
    result = RUNNER.invoke(cli.app, ["serve", "--config", "missing.toml"])
    assert result.exit_code == 2
    assert "missing.toml" in result.output


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cli._REQUIREMENTS, "engine", ("no_such_package",))
    result = RUNNER.invoke(cli.app, ["engine"])
    assert result.exit_code == 2
    assert "no_such_package" in result.output
    assert "pip install '.[engine]'" in result.output


def test_the_file_in_the_working_directory_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert cli._find_config(None).is_absolute(), "the checkout's own, when there is none here"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "loraland.toml").touch()
    assert cli._find_config(None) == Path("scripts/loraland.toml")
    (tmp_path / "loraland.toml").touch()
    assert cli._find_config(None) == Path("loraland.toml")
