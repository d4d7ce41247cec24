"""The soak against a small server: its load, its arithmetic, its adapters."""

import argparse
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from engine.protocol import AdapterReport
from gateway.adapter_list import AdapterList, ModelAdapters
from scripts import soak
from scripts.bench_client import Answer, BenchError


class Server:
    """A gateway and engine in one. Every tenth completion fails."""

    def __init__(self) -> None:
        self.models: list[str] = []
        self.evictions = 0
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.models.append(body["model"])
        if len(self.models) % 10 == 0:
            return web.Response(status=503, text="full")
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await response.write(b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n')
        usage = json.dumps({"usage": {"prompt_tokens": 8, "completion_tokens": body["max_tokens"]}})
        await response.write(f"data: {usage}\n\n".encode())
        return response

    async def adapters(self, _: web.Request) -> web.Response:
        self.evictions += 1
        report = AdapterReport(4, 3, 300, 400, 5, 500, 400, self.evictions, [])
        return web.Response(body=msgspec.json.encode(AdapterList([ModelAdapters("base", report, [])])))

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="# HELP x\nprocess_resident_memory_bytes 1.048576e+08\n")


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made, app = Server(), web.Application()
    app.router.add_post("/v1/completions", made.complete)
    app.router.add_get("/adapters", made.adapters)
    app.router.add_get("/metrics", made.metrics)
    async with TestServer(app) as running:
        made.url = str(running.make_url("")).rstrip("/")
        yield made


OPTIONS = argparse.Namespace(
    minutes=0.02,
    reference_minutes=0.02,
    users=3,
    resident=2,
    exponent=1.0,
    prompt_tokens=8,
    output_tokens=4,
    every=0.3,
    settle=0.1,
    seed=1,
)


async def test_the_run_compares_zipf_with_resident_and_watches_memory(
    server: Server, capsys: pytest.CaptureFixture[str]
):
    names = [f"soak-{number:04d}" for number in range(50)]
    minutes, samples, summary = await soak.soak(OPTIONS, server.url, server.url, names)
    assert {line.phase for line in minutes} == {"resident", "zipf"}
    assert summary.throughput_ratio == pytest.approx(
        summary.zipf_tokens_per_s / summary.resident_tokens_per_s, rel=0.01
    )
    assert summary.answers + summary.failures == len(server.models)
    assert summary.failures == len(server.models) // 10 and "503" in summary.first_failures[0]
    assert summary.adapters_used > OPTIONS.resident
    assert samples[0].engine_rss_mib == samples[0].gateway_rss_mib == 100.0
    assert summary.engine_rss_slope_mib_per_h == 0
    assert not summary.within_budgets, "memory holds 500 of 400 bytes"
    text = capsys.readouterr().out + soak.conclusion(summary)
    assert "zipf" in text and "BEYOND the budgets" in text


async def test_only_the_resident_adapters_are_asked_in_the_reference(server: Server):
    options = argparse.Namespace(**{**vars(OPTIONS), "minutes": 0.002, "settle": 0.0})
    names = [f"soak-{number:04d}" for number in range(50)]
    await soak.soak(options, server.url, "", names)
    asked = Counter(model.rpartition("/")[2] for model in server.models)
    assert asked["soak-0000"] > 20 and asked["soak-0001"] > 20


def test_the_second_most_popular_adapter_is_asked_half_as_often():
    choose = soak.zipf(["a", "b", "c"], random.Random(0), 1.0)
    counts = Counter(choose() for _ in range(11_000))
    assert counts["a"] == pytest.approx(6000, rel=0.05)
    assert counts["b"] == pytest.approx(3000, rel=0.08)
    assert counts["c"] == pytest.approx(2000, rel=0.1)


def test_a_slope_is_per_hour_and_skips_what_is_not_known():
    assert soak.slope_per_h([(0, 100.0), (1800, None), (3600, 112.0)]) == 12.0
    assert soak.slope_per_h([(0, 100.0), (1, None)]) is None


def test_a_phase_without_settled_answers_is_no_measurement():
    report = AdapterReport(1, 0, 0, 1, 0, 0, 1, 0, [])
    phase = soak.Phase("resident", 0.0, 10.0, [Answer(0.0, [1.0, 2.0], 2, 1)], [], set())
    with pytest.raises(BenchError, match="too short"):
        soak.summarize([phase], [], report, settle_s=5.0)


def test_adapters_beyond_the_distinct_ones_are_links_and_are_made_once(tmp_path: Path):
    names = soak.prepare(tmp_path, 5, 2, rank=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    files = [tmp_path / name / "adapter_model.safetensors" for name in names]
    assert len({os.stat(file).st_ino for file in files}) == 2
    assert soak.prepare(tmp_path, 5, 2, rank=1) == names
