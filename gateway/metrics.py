"""Every metric of the gateway, with its unit. Knows nothing of how requests are served."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from engine.protocol import EngineStatus

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Only names that exist become the label `model`; anything else is the empty string."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "loraland_gateway_requests",
            "Finished HTTP requests; status 499: the client left first.",
            ["model", "endpoint", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "loraland_gateway_requests_in_flight", "HTTP requests being served.", registry=self.registry
        )
        self.request_seconds = Histogram(
            "loraland_gateway_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "loraland_gateway_time_to_first_token_seconds",
            "From the first byte of a request to its first token.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "loraland_gateway_prompt_tokens", "Tokens read.", ["model"], registry=self.registry
        )
        self.cached_tokens = Counter(
            "loraland_gateway_cached_prompt_tokens",
            "Tokens read that the engine's prefix cache held.",
            ["model"],
            registry=self.registry,
        )
        self.completion_tokens = Counter(
            "loraland_gateway_completion_tokens", "Tokens written.", ["model"], registry=self.registry
        )
        self.cost_usd = Counter(
            "loraland_gateway_cost_usd",
            "What upstreams' answers cost by the configured prices, in US dollars.",
            ["model"],
            registry=self.registry,
        )
        self.upstream_failures = Gauge(
            "loraland_gateway_upstream_failures",
            "Tries that failed by the upstream's fault, since the start.",
            ["upstream"],
            registry=self.registry,
        )
        self.upstream_open = Gauge(
            "loraland_gateway_upstream_open",
            "1 while the upstream's circuit is open: it is left alone.",
            ["upstream"],
            registry=self.registry,
        )
        self.engine_connected = Gauge(
            "loraland_gateway_engine_connected", "1 while the engine is.", ["model"], registry=self.registry
        )
        self.engine_sequences = Gauge(
            "loraland_gateway_engine_sequences",
            "Sequences in the engine, as it last reported.",
            ["model", "state"],
            registry=self.registry,
        )

    def observe_engine(self, model: str, status: EngineStatus | None) -> None:
        self.engine_connected.labels(model).set(status is not None)
        self.engine_sequences.labels(model, "running").set(status.running if status else 0)
        self.engine_sequences.labels(model, "waiting").set(status.waiting if status else 0)

    def observe_upstream(self, upstream: str, failures: int, is_open: bool) -> None:
        self.upstream_failures.labels(upstream).set(failures)
        self.upstream_open.labels(upstream).set(is_open)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
