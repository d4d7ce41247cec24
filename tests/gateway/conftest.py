"""A gateway on a real port before a fake engine, both in one thread of their own; and a tiny tokenizer."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import structlog
import uvicorn
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from engine.protocol import ModelFacts
from gateway.app import create_app
from gateway.config import GatewayConfig, ModelConfig
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.postgres import Postgres, running_postgres

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you? naïve café",
    "1 2 3 ünïcödé 日本語",
]
MAX_MODEL_LEN = 200

Result = TypeVar("Result")


def build_tokenizer() -> HfTokenizer:
    """Byte-level BPE over every byte, with chat's special tokens."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<|plain added|>", special=False)])
    return tokenizer


class Background:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future: Future[Result] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(20)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Gateway:
    """A gateway under uvicorn, as in production, on a port of its own."""

    def __init__(self, background: Background, config: GatewayConfig) -> None:
        self._background = background
        settings = uvicorn.Config(
            create_app(config),
            host="127.0.0.1",
            port=0,
            http="httptools",
            ws="none",
            log_config=None,
            access_log=False,
        )
        self._server = uvicorn.Server(settings)
        self._serving = asyncio.run_coroutine_threadsafe(self._server.serve(), background.loop)
        wait_until(lambda: self._server.started or self._serving.done())
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def wait_until_ready(self) -> None:
        wait_until(lambda: httpx.get(self.url + "/readyz", trust_env=False).status_code == 200)

    def close(self) -> None:
        self._server.should_exit = True
        self._serving.result(20)


def wait_until(claim: Callable[[], Any], timeout_s: float = 10) -> None:
    """Fails when `claim` does not become true."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    """Log lines of the server's thread go nowhere; `structlog.testing.capture_logs` still sees them."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def hf_tokenizer() -> HfTokenizer:
    return build_tokenizer()


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


@pytest.fixture(scope="session")
def session_engine(background: Background, hf_tokenizer: HfTokenizer) -> Iterator[FakeEngine]:
    config = {"chat_template": TEMPLATE, "bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    files = {
        "tokenizer.json": hf_tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    facts = ModelFacts(
        name="base",
        root="nowhere",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=hf_tokenizer.get_vocab_size(),
        eos_token_ids=[2],
        dtype="float32",
        files=list(files),
        digest="1",
    )
    engine = FakeEngine(facts, files)
    background.run(engine.start())
    yield engine
    background.run(engine.kill())


@pytest.fixture
def engine(session_engine: FakeEngine) -> Iterator[FakeEngine]:
    """The engine behind `gateway`, behaving well at the start of every test."""
    session_engine.reset()
    yield session_engine
    wait_until(lambda: not session_engine.running)
    session_engine.reset()


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the adapters `colours` and `shapes`."""
    root = tmp_path_factory.mktemp("adapters")
    for task in ("shapes", "colours"):
        (root / task).mkdir()
        (root / task / "adapter_config.json").write_text("{}")
    return root


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `gateway` keeps its database and its files."""
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="session")
def session_gateway(
    background: Background, session_engine: FakeEngine, adapters: Path, stored: Path
) -> Iterator[Gateway]:
    model = ModelConfig(
        name="base",
        engine=session_engine.url,
        adapters=(f"{adapters}/{{task}}",),
        table={"far": "hf://somebody/far"},
    )
    absent = ModelConfig(name="org/absent", engine="http://127.0.0.1:1")
    config = GatewayConfig(
        models=(model, absent),
        max_body_mib=1,
        cors_allow_origins=("https://page.example",),
        database=str(stored / "gateway.db"),
        files=str(stored / "files"),
        max_file_mib=3,
    )
    gateway = Gateway(background, config)
    gateway.wait_until_ready()
    yield gateway
    gateway.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server that a test may stop and start; it runs again afterwards."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def gateway(session_gateway: Gateway, engine: FakeEngine) -> Gateway:
    session_gateway.wait_until_ready()
    return session_gateway


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def encode(tokenizer: HfTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
