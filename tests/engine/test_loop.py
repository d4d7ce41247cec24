"""The engine's thread from the outside: every request ends, and whatever it held is free."""

import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.fake_runner import FakeRunner
from engine.host_adapter import AdapterError, AdapterNotFoundError, HostAdapter, LoraWeights
from engine.loop import EngineLoop, ModelLimits
from engine.protocol import (
    AdapterRef,
    FinishReason,
    Generate,
    RejectCode,
    Rejected,
    SamplingParams,
    StepOutput,
)
from engine.sampler import sample
from engine.step import ChunkResult, StepPlan, StepResult


class Adapters:
    """Stands for the files: versions, digests, failures and how long reading takes."""

    def __init__(self):
        self.versions: dict[str, int] = {"good": 1, "other": 1, "slow": 1, "bad": 1}
        self.release = threading.Event()
        self.reads: list[str] = []

    def version_of(self, ref: AdapterRef) -> int:
        if ref.uri not in self.versions:
            raise AdapterNotFoundError(f"there is no adapter {ref.name!r}")
        return self.versions[ref.uri]

    def read(self, ref: AdapterRef) -> HostAdapter:
        self.reads.append(ref.uri)
        if ref.uri == "slow":
            self.release.wait(10)
        if ref.uri == "bad":
            raise AdapterError(f"{ref.uri}/adapter_model.safetensors: the file is cut off")
        weights = LoraWeights(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
        return HostAdapter(f"{ref.uri}-{self.versions[ref.uri]}", {(0, "q_proj"): weights}, 64, 2)


class World:
    def __init__(self, runner: FakeRunner | None = None, **config):
        self.runner = runner or FakeRunner(64, 16)
        self.adapters = Adapters()
        self.messages: queue.Queue = queue.Queue()
        self.crashed = threading.Event()
        self.engine = EngineLoop(
            self.runner,
            EngineConfig(**{"model": "none", "name": "fake", "adapter_slots": 2, **config}),
            ModelLimits(1000, 512, (2,)),
            self.receive,
            read_adapter=self.adapters.read,
            device_bytes=lambda adapter: 64,
            version_of=self.adapters.version_of,
            on_crash=self.crashed.set,
        )
        self.engine.start()

    def receive(self, outbox) -> None:
        for key, found in outbox.items():
            for message in found:
                self.messages.put((key, message))

    def submit(
        self,
        request_id: str,
        adapter: str | None = None,
        connection: int = 1,
        prompt=(5, 6, 7),
        follows: str | None = None,
        deadline_s: float | None = None,
        **sampling,
    ):
        params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, **sampling})
        ref = None if adapter is None else AdapterRef(adapter, adapter)
        request = Generate(request_id, list(prompt), params, ref, follows=follows, deadline_s=deadline_s)
        self.engine.submit(connection, request)

    def wait(self, request_id: str, timeout_s: float = 5.0):
        """(tokens, how it ended) of one request; what others get meanwhile is put back."""
        tokens, others, deadline = [], [], time.monotonic() + timeout_s
        try:
            while True:
                key, message = self.messages.get(timeout=max(0.01, deadline - time.monotonic()))
                if isinstance(message, Rejected):
                    if message.request_id == request_id:
                        return tokens, message
                    others.append((key, message))
                    continue
                ended = None
                for output in message.outputs:
                    if output.request_id != request_id:
                        others.append((key, StepOutput([output])))
                        continue
                    tokens += output.token_ids
                    ended = output.finish_reason
                if ended is not None:
                    return tokens, ended
        finally:
            with self.messages.mutex:  # in front of what has come meanwhile
                self.messages.queue.extendleft(reversed(others))

    def is_idle(self) -> bool:
        """Whether everything is free within a second."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            status = self.engine.status()
            if (status.running, status.waiting, status.kv_blocks_free) == (0, 0, status.kv_blocks_total):
                return True
            time.sleep(0.005)
        return False


def eventually(claim: Callable[[], bool]) -> bool:
    """Whether it becomes true within five seconds."""
    deadline = time.monotonic() + 5
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.adapters.release.set()
    made.engine.stop()


def test_requests_with_and_without_adapters_end_with_tokens(world):
    world.submit("base")
    world.submit("one", "good")
    world.submit("two", "other")
    for name in ("base", "one", "two"):
        tokens, ending = world.wait(name)
        assert len(tokens) == 4 and ending is FinishReason.LENGTH
    assert world.is_idle()
    assert sorted(world.engine.status().adapters_resident) == ["good", "other"]


def test_a_cold_adapter_does_not_hold_up_the_others(world):
    world.submit("cold", "slow")
    for index in range(5):
        world.submit(f"r{index}")
        tokens, _ = world.wait(f"r{index}")
        assert len(tokens) == 4
    world.adapters.release.set()
    tokens, ending = world.wait("cold")
    assert len(tokens) == 4 and ending is FinishReason.LENGTH


def test_an_unknown_and_a_broken_adapter_are_refused_with_the_reason(world):
    world.submit("unknown", "nowhere")
    _, ending = world.wait("unknown")
    assert ending.code is RejectCode.ADAPTER_NOT_FOUND and "nowhere" in ending.message
    world.submit("broken", "bad")
    _, ending = world.wait("broken")
    assert ending.code is RejectCode.ADAPTER_INVALID and "the file is cut off" in ending.message
    assert "adapter_model" in ending.message and "bad/" not in ending.message
    world.submit("broken again", "bad")
    assert world.wait("broken again")[1].code is RejectCode.ADAPTER_INVALID
    assert world.adapters.reads == ["bad"], "a failure just seen is not tried again"
    assert world.is_idle()


def test_more_adapters_than_slots_take_turns(world):
    world.adapters.versions.update({name: 1 for name in "abcdef"})
    for name in "abcdef":
        world.submit(name, name)
    for name in "abcdef":
        assert world.wait(name)[1] is FinishReason.LENGTH
    assert len(world.runner.slots) == 2


def test_a_republished_adapter_is_read_again_and_meets_no_old_prefix(world):
    prompt = tuple(range(5, 60))
    world.submit("old", "good", prompt=prompt)
    world.wait("old")
    world.submit("warm", "good", prompt=prompt)
    _, message = world.messages.get(timeout=5)
    assert message.outputs[0].cached_tokens == 48
    world.wait("warm")
    world.adapters.versions["good"] = 2
    world.submit("new", "good", prompt=prompt)
    _, message = world.messages.get(timeout=5)
    assert message.outputs[0].cached_tokens == 0
    assert world.adapters.reads == ["good", "good"]


@pytest.mark.parametrize("adapter", [None, "good", "slow"])
def test_abort_frees_everything_wherever_the_request_is(adapter):
    world = World(FakeRunner(64, 16, step_s=0.01))
    world.submit("long", adapter, max_tokens=400)
    if adapter != "slow":
        world.messages.get(timeout=5)
    world.engine.abort(1, "long")
    assert world.is_idle()
    world.engine.abort(1, "long")
    world.engine.abort(1, "never heard of")
    world.submit("next")
    assert world.wait("next")[1] is FinishReason.LENGTH
    world.adapters.release.set()
    world.engine.stop()


def test_a_lost_connection_frees_its_requests_and_no_others():
    world = World(FakeRunner(64, 16, step_s=0.005))
    world.submit("gone", connection=1, max_tokens=400)
    world.submit("stays", connection=2, max_tokens=40)
    world.messages.get(timeout=5)
    world.engine.disconnect(1)
    tokens, ending = world.wait("stays")
    assert len(tokens) == 40 and ending is FinishReason.LENGTH
    assert world.is_idle()
    world.engine.stop()


def test_an_expired_request_is_answered_and_nothing_more_is_computed_for_it():
    world = World(FakeRunner(64, 16, step_s=0.01))
    world.submit("late", deadline_s=0.1, max_tokens=400)
    tokens, ending = world.wait("late")
    assert ending.code is RejectCode.EXPIRED and "0.1 s" in ending.message
    assert 0 < len(tokens) < 40
    world.submit("never begun", "slow", deadline_s=0.1)
    assert world.wait("never begun")[1].code is RejectCode.EXPIRED
    assert world.is_idle()
    world.submit("in time", deadline_s=30.0)
    assert world.wait("in time")[1] is FinishReason.LENGTH
    world.adapters.release.set()
    world.engine.stop()


def test_a_far_deadline_does_not_keep_what_has_ended(world):
    for index in range(300):
        world.submit(f"r{index}", deadline_s=3600.0, max_tokens=1)
        world.wait(f"r{index}")
    assert len(world.engine._deadlines) < 100


def test_a_queue_full_of_tokens_says_when_to_come_again():
    world = World(FakeRunner(64, 16, step_s=0.02), max_sequences=1, max_waiting_tokens=100)
    world.submit("running", max_tokens=300)
    world.messages.get(timeout=5)
    world.submit("large", prompt=(5,) * 300)
    world.submit("small")
    _, ending = world.wait("small")
    assert ending.code is RejectCode.OVERLOADED and "300 prompt tokens" in ending.message
    assert ending.retry_after_s and 1 <= ending.retry_after_s <= 60
    world.engine.abort(1, "running")
    assert world.wait("large")[1] is FinishReason.LENGTH
    world.engine.stop()


def test_a_queue_full_of_one_adapter_takes_in_another_and_serves_it_at_once():
    world = World(FakeRunner(256, 16, step_s=0.005), max_sequences=8, max_waiting=92)
    for index in range(100):
        world.submit(f"flood {index}", "good", max_tokens=200)
    world.submit("lone", "other", max_tokens=1)
    assert world.wait("lone")[1] is FinishReason.LENGTH
    _, ending = world.wait("flood 99")
    assert ending.code is RejectCode.OVERLOADED and 1 <= (ending.retry_after_s or 0) <= 60
    world.engine.stop()


def test_choices_follow_the_first_of_the_same_connection_and_prompt(world):
    prompt = tuple(range(5, 55))
    world.submit("a", prompt=prompt)
    world.submit("b", prompt=prompt, follows="a")
    world.submit("c", prompt=(9, 9, 9), follows="a")
    world.submit("d", prompt=prompt, follows="nobody")
    assert {world.wait(name)[1] for name in "abcd"} == {FinishReason.LENGTH}
    assert world.is_idle()


def test_a_flood_of_one_adapter_does_not_hold_up_another():
    world = World(FakeRunner(256, 16, step_s=0.005), max_sequences=8)
    for index in range(100):
        world.submit(f"flood {index}", "good", max_tokens=200)
    world.submit("first", "other", max_tokens=1)  # now both adapters are resident
    world.wait("first")
    started = time.monotonic()
    world.submit("lone", "other", max_tokens=1)
    assert world.wait("lone")[1] is FinishReason.LENGTH
    assert time.monotonic() - started < 0.5, "200 steps of the flood take a second"
    world.engine.stop()


@pytest.mark.parametrize(
    ("request_", "code", "part"),
    [
        ({"prompt": ()}, RejectCode.INVALID, "empty"),
        ({"prompt": (1000,)}, RejectCode.INVALID, "999"),
        ({"prompt": (-1,)}, RejectCode.INVALID, "999"),
        ({"logit_bias": {5000: 1.0}}, RejectCode.INVALID, "999"),
        ({"max_tokens": 0}, RejectCode.INVALID, "max_tokens"),
        ({"temperature": math.nan}, RejectCode.INVALID, "temperature"),
        ({"temperature": -1.0}, RejectCode.INVALID, "temperature"),
        ({"top_p": 0.0}, RejectCode.INVALID, "top_p"),
        ({"min_p": 1.5}, RejectCode.INVALID, "min_p"),
        ({"repetition_penalty": 0.0}, RejectCode.INVALID, "repetition_penalty"),
        ({"frequency_penalty": math.inf}, RejectCode.INVALID, "frequency_penalty"),
        ({"logit_bias": {5: math.nan}}, RejectCode.INVALID, "logit_bias"),
        ({"logprobs": -1}, RejectCode.INVALID, "logprobs"),
        ({"prompt_logprobs": -1}, RejectCode.INVALID, "prompt_logprobs"),
        ({"prompt": (5,) * 512}, RejectCode.CONTEXT_LENGTH, "512 tokens"),
    ],
)
def test_a_request_that_cannot_be_served_is_told_why(world, request_, code, part):
    world.submit("r", **request_)
    _, ending = world.wait("r")
    assert ending.code is code and part in ending.message
    assert world.is_idle()


class Sampling(FakeRunner):
    """Samples from made-up logits with the real sampler."""

    def run(self, plan: StepPlan) -> StepResult:
        sequences = [chunk.sequence for chunk in plan.chunks]
        logits_SV = 5 * torch.randn(len(sequences), 1000, generator=torch.Generator().manual_seed(1))
        return StepResult([ChunkResult([token]) for token in sample(logits_SV, sequences, (2,))])


@settings(max_examples=150, deadline=None)
@given(
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    top_k=st.integers(-1, 2**31 - 1),
    repetition_penalty=st.floats(0.01, 10),
    presence_penalty=st.floats(-2, 2),
    bias=st.floats(-100, 100),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@example(1e-300, 0.9, 0.0, 0, 1.0, 0.0, 0.0, 0)
@example(1.0, 1e-300, 0.0, 0, 1.0, 0.0, 0.0, 0)
def test_what_the_gateway_lets_through_can_be_sampled(
    sampling_world, temperature, top_p, min_p, top_k, repetition_penalty, presence_penalty, bias, seed
):
    sampling_world.submit(
        "r",
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        logit_bias={5: bias},
        seed=seed,
        max_tokens=2,
    )
    assert sampling_world.wait("r")[1] is FinishReason.LENGTH


@pytest.fixture(scope="module")
def sampling_world() -> Iterator[World]:
    made = World(Sampling(64, 16))
    yield made
    made.engine.stop()


@pytest.mark.parametrize(
    "tiny", [{"temperature": 1e-300, "top_p": 0.9}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_the_smallest_temperature_and_top_p_take_the_likeliest_token(sampling_world, tiny):
    sampling_world.submit("greedy")
    likeliest, _ = sampling_world.wait("greedy")
    sampling_world.submit("tiny", **tiny)
    assert sampling_world.wait("tiny")[0] == likeliest


def test_a_request_id_in_use_is_refused_and_the_first_goes_on():
    world = World(FakeRunner(64, 16, step_s=0.01))
    world.submit("r", max_tokens=20)
    world.submit("r")
    endings, tokens = [], 0
    while len(endings) < 2:
        _, message = world.messages.get(timeout=5)
        if isinstance(message, Rejected):
            endings.append(message.code)
        else:
            tokens += len(message.outputs[0].token_ids)
            endings += [o.finish_reason for o in message.outputs if o.finish_reason]
    assert endings == [RejectCode.INVALID, FinishReason.LENGTH] and tokens == 20
    world.engine.stop()


def test_a_full_queue_is_told_when_to_come_back():
    world = World(FakeRunner(64, 16, step_s=0.02), max_sequences=1, max_waiting=3)
    for index in range(8):
        world.submit(f"r{index}", max_tokens=3)
    endings = [world.wait(f"r{index}")[1] for index in range(8)]
    refused = [ending for ending in endings if isinstance(ending, Rejected)]
    assert refused and all(r.code is RejectCode.OVERLOADED and (r.retry_after_s or 0) >= 1 for r in refused)
    assert endings[0] is FinishReason.LENGTH
    world.engine.stop()


class Failing(FakeRunner):
    """Raises while a poisoned prompt is in the batch."""

    def run(self, plan: StepPlan) -> StepResult:
        if any(chunk.sequence.token_ids[0] == 666 for chunk in plan.chunks):
            raise RuntimeError("poisoned")
        return super().run(plan)


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on():
    world = World(Failing(64, 16))
    for _ in range(3):
        world.submit("poison", prompt=(666, 1))
        assert world.wait("poison")[1].code is RejectCode.INTERNAL
    world.submit("fine")
    assert world.wait("fine")[1] is FinishReason.LENGTH
    assert world.is_idle() and not world.crashed.is_set()
    world.engine.stop()


class Stubborn(FakeRunner):
    """Fails to fill or to empty a slot."""

    def __init__(self, *fails: str):
        super().__init__(64, 16)
        self._fails = fails

    def install_adapter(self, slot, prepared):
        super().install_adapter(slot, prepared)
        if "install" in self._fails:
            raise RuntimeError("out of memory")

    def remove_adapter(self, slot):
        super().remove_adapter(slot)
        if "remove" in self._fails:
            raise RuntimeError("stuck")


def test_an_adapter_that_cannot_be_installed_is_refused_and_the_engine_goes_on():
    world = World(Stubborn("install"), adapter_slots=1)
    for name in ("good", "other"):
        world.submit(name, name)
        ending = world.wait(name)[1]
        assert ending.code is RejectCode.ADAPTER_INVALID and "out of memory" in ending.message
        assert not world.runner.slots, "half an adapter is left in the slot"
    world.submit("base")
    assert world.wait("base")[1] is FinishReason.LENGTH
    assert world.is_idle() and not world.crashed.is_set()
    world.engine.stop()


def test_a_slot_that_cannot_be_emptied_does_not_end_the_engine():
    world = World(Stubborn("remove"), adapter_slots=1)
    for name in ("good", "other", "good"):
        world.submit(name, name)
        assert world.wait(name)[1] is FinishReason.LENGTH
    assert not world.crashed.is_set()
    world.engine.stop()


@pytest.mark.parametrize("error", [ValueError("Invalid IPv6 URL"), PermissionError("not allowed")])
def test_an_adapter_whose_place_cannot_be_looked_at_is_refused_and_the_engine_goes_on(world, error):
    def version_of(ref):
        raise error

    world.engine._version_of = version_of
    world.submit("r", "good")
    ending = world.wait("r")[1]
    assert ending.code is RejectCode.ADAPTER_INVALID and "good" in ending.message
    assert world.is_idle() and not world.crashed.is_set()


def test_invented_adapter_names_do_not_become_metrics(world):
    for index in range(3):
        world.submit(f"n{index}", f"invented-{index}")
        world.wait(f"n{index}")
        world.submit(f"e{index}", f"invented-{index}", prompt=())
        world.wait(f"e{index}")
    text = world.engine.metrics.render().decode()
    assert "invented" not in text
    assert 'loraland_engine_requests_total{adapter="(unknown)",outcome="adapter_not_found"} 3.0' in text


def test_stopping_tells_everybody():
    world = World(FakeRunner(64, 16, step_s=0.01))
    world.submit("long", max_tokens=400)
    world.messages.get(timeout=5)
    world.engine.stop()
    _, ending = world.wait("long")
    assert ending.code is RejectCode.UNAVAILABLE


def test_the_metrics_count_what_happened(world):
    world.submit("one", "good", prompt=(5,) * 20)
    world.wait("one")
    assert world.is_idle()
    text = world.engine.metrics.render().decode()
    assert "loraland_engine_prompt_tokens_total 20.0" in text
    assert "loraland_engine_generated_tokens_total 4.0" in text
    assert 'loraland_engine_requests_total{adapter="good",outcome="length"} 1.0' in text
    assert 'loraland_engine_adapters{state="resident"} 1.0' in text
    assert 'loraland_engine_adapter_prompt_tokens_total{adapter="good"} 20.0' in text
    assert 'loraland_engine_adapter_generated_tokens_total{adapter="good"} 4.0' in text
    assert 'loraland_engine_adapter_queue_seconds_count{adapter="good"} 1.0' in text
    assert 'loraland_engine_adapter_inter_token_seconds_count{adapter="good"} 3.0' in text
    assert "loraland_engine_queue_seconds_count 1.0" in text
    assert "loraland_engine_step_tokens_sum 23.0" in text, "twenty of the prompt, then three decodes"
    assert "loraland_engine_step_adapters_sum 4.0" in text
    for tier in ("host", "device"):
        assert f'loraland_engine_adapter_load_seconds_count{{tier="{tier}"}} 1.0' in text
        assert f'loraland_engine_adapters_held{{tier="{tier}"}} 1.0' in text
        assert f'loraland_engine_adapter_bytes{{tier="{tier}"}} 64.0' in text


def test_the_router_is_told_which_adapters_are_loaded_and_which_are_wanted(world):
    world.submit("one", "good")
    world.wait("one")
    world.submit("two", "slow")
    assert eventually(lambda: "slow" in world.adapters.reads)
    text = world.engine.metrics.render().decode()
    found = re.search(
        r'^vllm:lora_requests_info{max_lora="2",running_lora_adapters="good",waiting_lora_adapters="slow"} (\S+)$',
        text,
        re.MULTILINE,
    )
    assert found is not None and abs(float(found[1]) - time.time()) < 60
    assert 'vllm:num_requests_running{model_name="fake"} 0.0' in text
    assert 'vllm:num_requests_waiting{model_name="fake"} 1.0' in text
    assert re.search(r'^vllm:kv_cache_usage_perc{model_name="fake"} 0.0$', text, re.MULTILINE)
    world.adapters.release.set()
    world.wait("two")


def test_the_report_says_where_every_adapter_stands():
    world = World(FakeRunner(64, 16, step_s=0.01), adapter_loaders=1)
    try:
        world.submit("one", "good", max_tokens=200)
        world.messages.get(timeout=5)
        world.submit("two", "slow")
        world.submit("three", "bad")
        assert eventually(lambda: "slow" in world.adapters.reads)
        found = {adapter.name: adapter for adapter in world.engine.adapters().adapters}
        good, slow, bad = found["good"], found["slow"], found["bad"]
        assert (good.state, good.tier, good.running, good.waiting) == ("resident", "device", 1, 0)
        assert (good.rank, good.host_bytes, good.device_bytes, good.digest) == (2, 64, 64, "good-1")
        assert (slow.state, slow.tier, slow.slot, slow.waiting) == ("fetching", "source", None, 1)
        assert (bad.state, bad.waiting, bad.reason) == ("wanted", 1, "")
        world.adapters.release.set()
        world.wait("three")
        report = world.engine.adapters()
        bad = next(adapter for adapter in report.adapters if adapter.name == "bad")
        assert bad.state == "failed" and "cut off" in bad.reason and bad.waiting == 0
        assert (report.slots, report.device_budget_bytes, report.host_bytes) == (2, 512 * 2**20, 128)
    finally:
        world.adapters.release.set()
        world.engine.stop()


def test_a_request_that_is_preempted_waited_only_once():
    world = World(FakeRunner(6, 16))
    try:
        for name in "ab":
            world.submit(name, prompt=(5,) * 32, max_tokens=40)
        for name in "ab":
            world.wait(name)
        text = world.engine.metrics.render().decode()
        assert not re.search(r"^loraland_engine_preemptions_total 0.0$", text, re.MULTILINE)
        assert "loraland_engine_queue_seconds_count 2.0" in text
        assert "loraland_engine_prompt_tokens_total 64.0" in text
    finally:
        world.engine.stop()
