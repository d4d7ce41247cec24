"""Every Prometheus metric of the engine, with its unit in its name. Knows only numbers.

What changes with every step is counted; what merely stands is read when somebody asks for the metrics. The `vllm:`
names are those that Kubernetes' routers for language models look for (Gateway API Inference Extension).
"""

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from engine.protocol import AdapterReport, AdapterTier
from engine.residency import AdapterState
from engine.tally import Tallies, Timing

STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LOAD_SECONDS = (0.001, 0.0025, *LATENCY_SECONDS, 60, 120)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
UNKNOWN_ADAPTER = "(unknown)"
"""The adapter label of requests that ended before anything usable was found under the name they gave."""
MERGED_ADAPTER = "(merged)"
"""That of all weighted sums: every request can invent one."""
PREFIX = "loraland_engine_"


@dataclass(frozen=True, slots=True)
class Observation:
    """What stands at one moment, and totals that others count."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_available: int
    preemptions: int
    proposed_tokens: int
    accepted_tokens: int
    evictions: int
    adapters: AdapterReport


class EngineMetrics:
    """One registry per engine; nothing global."""

    def __init__(self, model: str = "") -> None:
        self._model = model
        self._observe: Callable[[], Observation] | None = None
        self.adapters = Tallies()
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(PREFIX + name, text, registry=registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
        ) -> Histogram:
            return Histogram(PREFIX + name, text, labels, registry=registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of sequences that began to run")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in the prefix cache")
        self.generated_tokens = counter("generated_tokens", "Tokens sampled")
        self.step_seconds = histogram("step_seconds", "Time of one step", STEP_SECONDS)
        self.step_sequences = histogram("step_sequences", "Sequences in one step", COUNTS)
        self.step_tokens = histogram("step_tokens", "Tokens computed in one step", COUNTS)
        self.step_adapters = histogram("step_adapters", "Different adapters in one step", (0, *COUNTS[:7]))
        self.queue_seconds = histogram(
            "queue_seconds", "Arrival to first step, loading of the adapter included", LATENCY_SECONDS
        )
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Arrival to first token, in the engine", LATENCY_SECONDS
        )
        self.inter_token = histogram(
            "inter_token_seconds", "Between two tokens of a sequence, in the engine", LATENCY_SECONDS
        )
        self.load_seconds = histogram(
            "adapter_load_seconds",
            "Bringing an adapter up to a tier from the one below",
            LOAD_SECONDS,
            ("tier",),
        )
        registry.register(self)
        ProcessCollector(registry=registry)

    def watch(self, observe: Callable[[], Observation]) -> None:
        """What to ask, from any thread, whenever the metrics are asked for."""
        self._observe = observe

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from _of_adapters(self.adapters)
        if self._observe is not None:
            seen = self._observe()
            yield from _standing(seen)
            yield from _as_vllm(seen, self._model)


def _standing(seen: Observation) -> Iterator[Metric]:
    yield _gauge("running_sequences", "Sequences that hold KV blocks", seen.running)
    yield _gauge("waiting_sequences", "Sequences that wait for blocks or an adapter", seen.waiting)
    yield _gauge("kv_blocks", "KV blocks in the pool", seen.kv_blocks)
    yield _gauge("kv_blocks_available", "KV blocks that can be allocated now", seen.kv_blocks_available)
    yield _counter(
        "preemptions", "Sequences sent back to the queue: no blocks left, or others' turn", seen.preemptions
    )
    yield _counter("speculative_proposed_tokens", "Tokens guessed by prompt lookup", seen.proposed_tokens)
    yield _counter("speculative_accepted_tokens", "Guessed tokens that were right", seen.accepted_tokens)
    yield _counter("adapter_evictions", "Adapters removed from a device slot", seen.evictions)
    report = seen.adapters
    states = GaugeMetricFamily(PREFIX + "adapters", "Adapters by residency state", labels=["state"])
    counts = collections.Counter(adapter.state for adapter in report.adapters)
    for state in (each.name.lower() for each in AdapterState):
        states.add_metric([state], counts[state])
    yield states
    held = GaugeMetricFamily(PREFIX + "adapters_held", "Adapters that a tier holds", labels=["tier"])
    used = GaugeMetricFamily(PREFIX + "adapter_bytes", "Bytes of adapters that a tier holds", labels=["tier"])
    budget = GaugeMetricFamily(
        PREFIX + "adapter_budget_bytes", "Bytes of adapters that a tier may hold", labels=["tier"]
    )
    for tier, numbers in (
        (AdapterTier.HOST, (report.host_adapters, report.host_bytes, report.host_budget_bytes)),
        (AdapterTier.DEVICE, (report.slots_used, report.device_bytes, report.device_budget_bytes)),
    ):
        for family, number in zip((held, used, budget), numbers, strict=True):
            family.add_metric([tier], number)
    yield from (held, used, budget)
    yield _gauge("adapter_slots", "Adapters that can be resident at once", report.slots)


def _of_adapters(tallies: Tallies) -> Iterable[Metric]:
    requests = CounterMetricFamily(PREFIX + "requests", "Finished requests", labels=["adapter", "outcome"])
    prompt, cached, generated = (
        CounterMetricFamily(f"{PREFIX}adapter_{name}_tokens", text, labels=["adapter"])
        for name, text in (
            ("prompt", "Prompt tokens of sequences that began to run, by adapter"),
            ("cached", "Prompt tokens found in the prefix cache, by adapter"),
            ("generated", "Tokens sampled, by adapter"),
        )
    )
    queue, first, between = (
        SummaryMetricFamily(f"{PREFIX}adapter_{name}_seconds", text, labels=["adapter"])
        for name, text in (
            ("queue", "Arrival to first step, by adapter"),
            ("time_to_first_token", "Arrival to first token, by adapter"),
            ("inter_token", "Between two tokens of a sequence, by adapter"),
        )
    )

    def add(family: SummaryMetricFamily, name: str, timing: Timing) -> None:
        if timing.count:
            family.add_metric([name], timing.count, timing.seconds)

    for name, tally in tallies.all():
        for outcome, count in tally.requests.copy().items():
            requests.add_metric([name, outcome], count)
        prompt.add_metric([name], tally.prompt_tokens)
        cached.add_metric([name], tally.cached_tokens)
        generated.add_metric([name], tally.generated_tokens)
        add(queue, name, tally.queue)
        add(first, name, tally.time_to_first_token)
        add(between, name, tally.inter_token)
    return requests, prompt, cached, generated, queue, first, between


def _as_vllm(seen: Observation, model: str) -> Iterator[Metric]:
    for name, text, value in (
        ("num_requests_running", "Number of requests in model execution batches.", seen.running),
        ("num_requests_waiting", "Number of requests waiting to be processed.", seen.waiting),
        (
            "kv_cache_usage_perc",
            "KV-cache usage. 1 means 100 percent usage.",
            1 - seen.kv_blocks_available / max(1, seen.kv_blocks),
        ),
    ):
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        family.add_metric([model], value)
        yield family
    report = seen.adapters
    lora = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters that can be used at once, and those that are waited for; the value is the time.",
        labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
    )
    # The routers' protocol means by "running" what is loaded and ready, in use or not.
    ready = [adapter.name for adapter in report.adapters if adapter.state == "resident"]
    wanted = [adapter.name for adapter in report.adapters if adapter.state != "resident" and adapter.waiting]
    lora.add_metric([str(report.slots), _joined(wanted), _joined(ready)], time.time())
    yield lora


def _joined(names: list[str]) -> str:
    """As one label; a name with a comma would read as two."""
    return ",".join(dict.fromkeys(name for name in names if "," not in name))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)
