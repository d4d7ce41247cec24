"""The benchmark's client, its arithmetic and its adapters for llama.cpp."""

import argparse
import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import msgspec
import psutil
import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engine.checkpoint import open_checkpoint
from scripts.bench_client import Answer, BenchError
from scripts.bench_cpu import Cell, Figure, Setting, adapter_set, measure, report, target_modules
from scripts.bench_machine import family, watched_memory
from scripts.bench_server import BASE, PACKAGE, Server, gguf_file, lora_gguf
from scripts.random_adapters import write_random_adapters


class Peer:
    """A completions server that streams as many tokens as it is asked for (`short` fewer)."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.at_once = 0
        self.most_at_once = 0
        self.short = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        response = web.StreamResponse()
        await response.prepare(request)
        count = body["max_tokens"] - self.short
        for _ in range(count):
            await asyncio.sleep(0.002)
            await response.write(b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n')
        self.at_once -= 1
        usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        await response.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
        return response


@pytest.fixture
def peer() -> Iterator[tuple[Peer, str]]:
    peer = Peer()
    started, stop = threading.Event(), asyncio.Event()
    found: list[tuple[asyncio.AbstractEventLoop, int]] = []

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", peer.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.append((asyncio.get_running_loop(), runner.addresses[0][1]))
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(10)
    loop, port = found[0]
    yield peer, f"http://127.0.0.1:{port}"
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_buffer(open_checkpoint(f"package:{PACKAGE}").files["tokenizer.json"])


OPTIONS = argparse.Namespace(min_requests=2, requests_per_user=2, prompt_tokens=32, output_tokens=5)


def _measure(
    peer: tuple[Peer, str], tokenizer: Tokenizer, adapters: int | None, *, by_name: bool, shared: int = 0
) -> Cell:
    server = Server("a peer", peer[1], psutil.Process(os.getpid()), by_name)
    setting = Setting(server, adapter_set("all", adapters) if adapters else None, shared)
    return measure(setting, tokenizer, OPTIONS, users=3, round_number=0, seed=1)


def test_a_cell_counts_the_tokens_of_all_requests(peer: tuple[Peer, str], tokenizer: Tokenizer):
    cell = _measure(peer, tokenizer, None, by_name=True)
    assert cell.requests == 6
    assert cell.output_tokens_per_s == pytest.approx(6 * 5 / cell.wall_s, rel=0.05)  # wall_s is rounded
    assert 0 < cell.ttft_p50_s <= cell.ttft_p90_s <= cell.wall_s
    assert cell.inter_token_p50_s >= 0.002
    assert cell.rss_mib > 0


def test_no_more_requests_at_once_than_users(peer: tuple[Peer, str], tokenizer: Tokenizer):
    _measure(peer, tokenizer, None, by_name=True)
    assert peer[0].most_at_once == 3


def test_every_prompt_is_another_and_of_the_length_asked_for(peer: tuple[Peer, str], tokenizer: Tokenizer):
    _measure(peer, tokenizer, None, by_name=True)
    prompts = [body["prompt"] for body in peer[0].bodies]
    assert len(set(prompts)) == 6
    assert {len(tokenizer.encode(prompt).ids) for prompt in prompts} == {32}


def test_adapters_are_named_in_the_model_to_ours(peer: tuple[Peer, str], tokenizer: Tokenizer):
    _measure(peer, tokenizer, 2, by_name=True)
    models = {f"{BASE}/all-linear-{number:02d}" for number in range(2)}
    assert {body["model"] for body in peer[0].bodies} == models


def test_adapters_are_named_in_the_lora_field_to_llama_cpp(peer: tuple[Peer, str], tokenizer: Tokenizer):
    _measure(peer, tokenizer, 2, by_name=False)
    assert {body["lora"][0]["id"] for body in peer[0].bodies} == {0, 1}


def test_an_answer_that_is_too_short_is_no_measurement(peer: tuple[Peer, str], tokenizer: Tokenizer):
    peer[0].short = 1
    with pytest.raises(BenchError, match="gave 4 tokens where 5"):
        _measure(peer, tokenizer, None, by_name=True)


def test_prompts_that_share_their_beginning_share_it_by_adapter(peer: tuple[Peer, str], tokenizer: Tokenizer):
    _measure(peer, tokenizer, 2, by_name=True, shared=20)
    beginnings: dict[str, set[str]] = {}
    for body in peer[0].bodies:
        beginnings.setdefault(body["model"], set()).add(body["prompt"].partition("\n\n")[0])
    assert [len(found) for found in beginnings.values()] == [1, 1]
    assert len(set.union(*beginnings.values())) == 2
    assert len({body["prompt"] for body in peer[0].bodies}) == 6


def test_targets_are_named_by_their_letters():
    assert target_modules("q,v") == ["q_proj", "v_proj"] and len(target_modules("all")) == 7
    assert adapter_set("q,v", 2).names == ("q-v-00", "q-v-01")
    with pytest.raises(BenchError, match="'w' is none of"):
        target_modules("q,w")


def test_the_tokens_of_an_answer_are_counted_when_they_came():
    answer = Answer(sent_s=0.0, times_s=[1.0, 2.0, 3.0, 4.0], tokens=8, prompt_tokens=1)
    assert answer.tokens_between(0, 2.5) == 4 and answer.tokens_between(2.5, 9) == 4


def _cell(server: str, adapters: int, round_number: int, rate: float) -> Cell:
    return Cell(
        server=server,
        adapters=adapters,
        targets="all" if adapters else "",
        users=25,
        round=round_number,
        requests=50,
        prompt_tokens=256,
        wall_s=1,
        output_tokens_per_s=rate,
        ttft_p50_s=1,
        ttft_p90_s=2,
        inter_token_p50_s=0.01,
        inter_token_p90_s=0.02,
        rss_mib=1000,
        pss_mib=900,
        cpu_cores=2,
        other_cores=0,
    )


def test_the_report_compares_medians():
    rates = {
        ("ours", 0): (200, 240, 220),
        ("ours", 25): (176, 100, 300),
        ("llama.cpp", 0): (110, 110, 110),
        ("llama.cpp", 25): (44, 44, 44),
    }
    cells = [
        _cell(server, adapters, number, rate)
        for (server, adapters), values in rates.items()
        for number, rate in enumerate(values)
    ]
    text = report(cells)
    assert "| ours | 25 | 25 all | 176.0 (100.0–300.0) |" in text
    assert "ours with adapters on all is 0.80 of the same without" in text
    assert "4.00 times llama.cpp with adapters" in text
    assert "ours without is 2.00 times llama.cpp without" in text


def test_the_report_says_what_the_prefix_cache_and_a_quantised_base_are_worth():
    cells = [_cell("ours", 0, 0, 100), _cell("ours, int8", 0, 0, 130)]
    for server, seconds in (("ours", 3.0), ("ours, prefix cache", 0.75)):
        cells.append(
            msgspec.structs.replace(_cell(server, 25, 0, 100), shared_tokens=200, ttft_p50_s=seconds)
        )
    text = report(cells, [Figure("idle CPU, % of a core", "ours, engine", [0.4])])
    assert "- 25 users: ours, int8 without is 1.30 times ours without" in text
    assert "first token 4.00 times as fast" in text
    assert "- idle CPU, % of a core: ours, engine: 0.4" in text


def test_an_adapter_for_llama_cpp_has_the_rows_of_q_in_its_order(tmp_path: Path):
    model = gguf_file()
    (adapter,) = write_random_adapters(tmp_path, ["a"], str(model), ("q_proj", "v_proj"))
    reader = gguf.GGUFReader(lora_gguf(adapter, model))
    written = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    weights = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.3.self_attn"
    v = weights[f"{prefix}.v_proj.lora_B.weight"].to(torch.float16)
    assert torch.equal(written["blk.3.attn_v.weight.lora_b"], v)
    # A head's rows i and i + 32 (rotated together in the Hugging Face layout) lie side by side in GGUF's.
    q = weights[f"{prefix}.q_proj.lora_B.weight"].to(torch.float16)
    assert torch.equal(written["blk.3.attn_q.weight.lora_b"][64 : 64 + 4], q[[64, 96, 65, 97]])


async def test_memory_of_descendants_counts(tmp_path: Path):
    child = await asyncio.create_subprocess_exec("sleep", "30")
    try:
        with watched_memory(psutil.Process(os.getpid()), every_s=0.05) as peak:
            await asyncio.sleep(0.2)
        assert psutil.Process(child.pid) in family(psutil.Process(os.getpid()))
        assert peak.rss_bytes > psutil.Process(os.getpid()).memory_info().rss / 2
        assert 0 < peak.pss_bytes <= peak.rss_bytes
    finally:
        child.kill()
        await child.wait()
