"""Bases from the Hugging Face hub, against a small hub on this machine."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.checkpoint import CheckpointError, open_checkpoint
from engine.hub import HubError, fetch_model
from tests.engine.tiny import write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one directory as `org/tiny` and refuses `org/gated` and everything else, as the hub does."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.served: list[str] = []
        self.tokens: set[str | None] = set()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if "org/gated" in self.path:
            self._answer(403, headers={"X-Error-Code": "GatedRepo"})
        elif "org/tiny" not in self.path:
            self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif not {"main", "v1", COMMIT}.intersection(parts):
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif parts[:4] == ["api", "models", "org", "tiny"] and parts[4] == "revision":
            self._answer(
                200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": self._tree("rfilename")})
            )
        elif parts[:4] == ["api", "models", "org", "tiny"]:
            self._answer(200, json.dumps(self._tree("path")))
        else:
            content = (self.server.directory / "/".join(parts[4:])).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            if self.command == "GET":
                self.server.served.append("/".join(parts[4:]))
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _tree(self, key: str) -> list[dict]:
        root = self.server.directory
        files = [path for path in root.rglob("*") if path.is_file()]
        return [
            {"type": "file", key: str(path.relative_to(root)), "size": path.stat().st_size, "oid": "0" * 40}
            for path in files
        ]

    def _answer(self, status: int, body: str | bytes = b"", headers: dict[str, str] | None = None) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(tmp_path, monkeypatch):
    directory = write_tiny_model(tmp_path / "repository", "llama", max_shard_size="100KB")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    (directory / "modeling_tiny.py").write_text("raise SystemExit")
    (directory / "original").mkdir()
    (directory / "original" / "model.safetensors").write_bytes(b"the same again")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with Hub(directory) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_only_configuration_tokenizer_and_weights_are_fetched(hub, tmp_path):
    directory = fetch_model("hf://org/tiny", endpoint=hub.endpoint, cache=tmp_path / "cache")
    assert directory.name == COMMIT
    fetched = {path.name for path in directory.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja"} <= fetched
    assert not fetched & {"pytorch_model.bin", "modeling_tiny.py", "original"}
    ours, theirs = open_checkpoint(directory), open_checkpoint(hub.directory)
    assert ours.digest == theirs.digest
    assert hub.tokens == {"Bearer hf_secret"}


def test_what_is_in_the_cache_is_not_fetched_again(hub, tmp_path):
    first = fetch_model("hf://org/tiny@v1", endpoint=hub.endpoint, cache=tmp_path / "cache")
    served = len(hub.served)
    assert fetch_model("hf://org/tiny@v1", endpoint=hub.endpoint, cache=tmp_path / "cache") == first
    assert len(hub.served) == served > 0


def test_without_a_network_the_cache_serves(hub, tmp_path):
    first = fetch_model("hf://org/tiny", endpoint=hub.endpoint, cache=tmp_path / "cache")
    assert fetch_model("hf://org/tiny", endpoint="http://127.0.0.1:1", cache=tmp_path / "cache") == first


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://org/gated", "gated: accept its terms at https://huggingface.co/org/gated and set HF_TOKEN"),
        ("hf://org/nothing", "no such model; if it is private, set HF_TOKEN"),
        ("hf://org/tiny@v9", "the model has no revision v9"),
        ("hf://tiny", "must be hf://organisation/name"),
        ("hf://org/tiny/model.gguf", "must be hf://organisation/name"),
        ("hf://org/..--x", "cannot be fetched: HFValidationError"),
    ],
)
def test_what_cannot_be_fetched_says_what_to_change(hub, uri, message, tmp_path):
    with pytest.raises(HubError, match=message):
        fetch_model(uri, endpoint=hub.endpoint, cache=tmp_path / "cache")


def test_an_unreachable_hub_is_an_error_that_says_so(tmp_path, monkeypatch):
    with pytest.raises(HubError, match=r"not .* in the cache, and the hub cannot be reached: ConnectError"):
        fetch_model("hf://org/tiny", endpoint="http://127.0.0.1:1", cache=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"hf://org/tiny: not .* in the cache"):
        open_checkpoint("hf://org/tiny")
