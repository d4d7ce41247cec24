"""Every Prometheus metric of the engine, with its unit in its name. Knows only numbers."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
UNKNOWN_ADAPTER = "(unknown)"
"""The adapter label of requests refused before anything was found under the name they gave."""
MERGED_ADAPTER = "(merged)"
"""That of all weighted sums: every request can invent one."""


class EngineMetrics:
    """One registry per engine; nothing global."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"loraland_engine_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"loraland_engine_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"loraland_engine_{name}", text, registry=registry, buckets=buckets)

        self.running = gauge("running_sequences", "Sequences that hold KV blocks")
        self.waiting = gauge("waiting_sequences", "Sequences that wait for blocks or an adapter")
        self.kv_blocks = gauge("kv_blocks", "KV blocks in the pool")
        self.kv_blocks_available = gauge("kv_blocks_available", "KV blocks that can be allocated now")
        self.adapters = gauge("adapters", "Adapters by residency state", ("state",))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of admitted sequences")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in the prefix cache")
        self.generated_tokens = counter("generated_tokens", "Tokens sampled")
        self.preemptions = counter(
            "preemptions", "Sequences sent back to the queue: no blocks left, or others' turn"
        )
        self.proposed_tokens = counter("speculative_proposed_tokens", "Tokens guessed by prompt lookup")
        self.accepted_tokens = counter("speculative_accepted_tokens", "Guessed tokens that were right")
        self.evictions = counter("adapter_evictions", "Adapters removed from a device slot")
        self.requests = counter("requests", "Finished requests", ("adapter", "outcome"))
        self.adapter_tokens = counter("adapter_tokens", "Tokens sampled, by adapter", ("adapter",))
        self.step_seconds = histogram("step_seconds", "Time of one step", STEP_SECONDS)
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Arrival to first token, in the engine", LATENCY_SECONDS
        )
        self.inter_token = histogram(
            "inter_token_seconds", "Between two tokens of a sequence, in the engine", LATENCY_SECONDS
        )
        self.load_seconds = histogram(
            "adapter_load_seconds", "Reading and checking an adapter", LATENCY_SECONDS
        )

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
