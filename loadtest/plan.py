"""What a run will do: its stages, its requests, its clock. Knows nothing of Locust or of results."""

import ipaddress
from typing import Literal
from urllib.parse import urlsplit

import msgspec

Endpoint = Literal["chat", "completions"]
PromptKind = Literal["words", "tasks"]
Arrivals = Literal["poisson", "constant"]


class Stage(msgspec.Struct, frozen=True):
    """A constant number of closed-loop users, or an open loop at `rate`; each request to one of `models`."""

    mode: str
    """What the report calls the adapter choice: `base`, `1 adapter`, `25 adapters`."""
    users: int
    models: tuple[str, ...]
    """The `model` names that requests carry; the base model's own name when `adapters` is 0."""
    adapters: int
    weights: tuple[float, ...] = ()
    """How often each of `models` is drawn against the others; empty: all alike."""
    rate: float | None = None
    """Requests a second of an open loop, whose `users` is 0; None for users who wait for their answers."""

    @property
    def title(self) -> str:
        if self.rate is not None:
            return self.mode
        return f"{self.mode}, {self.users} user{'s' if self.users != 1 else ''}"


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request must keep to count as good, in milliseconds; None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    total_ms: float | None = None


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the load process needs. Holds the name of the API key's variable, never the key."""

    run: str
    base_url: str
    """Without the trailing `/v1`."""
    endpoint: Endpoint
    model: str
    stages: tuple[Stage, ...]
    stage_seconds: float
    """Ramp and steady window together."""
    ramp_seconds: float
    think_seconds: float = 0.0
    """Pause of a user between an answer and its next request."""
    prompt_kind: PromptKind = "words"
    prompt_tokens: int = 64
    prompt_tokens_most: int | None = None
    """With it each prompt's length is drawn from `prompt_tokens` to here, both included."""
    max_tokens: int = 32
    max_tokens_least: int | None = None
    """With it each request's limit is drawn from here to `max_tokens`, both included."""
    shared_prefix_tokens: int = 0
    """Length of an opening that all prompts to one model have in common."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    ignore_eos: bool = False
    temperature: float | None = None
    """None: not sent, the server's own default holds."""
    ask_usage: bool = True
    """Send `stream_options.include_usage`."""
    warm_up: bool = True
    """One short request to every model before the first stage that uses it."""
    timeout_s: float = 120.0
    """Longest silence of a server before the request counts as failed."""
    api_key_env: str = "OPENAI_API_KEY"
    arrivals: Arrivals = "poisson"
    """Of the stages with a rate."""
    limits: Limits = Limits()
    """Of goodput, in the stages with a rate."""
    experiment: str | None = None
    """Name of the experiment that this is a run of."""
    seed: int = 0
    nonce: str = ""
    """Changes every prompt of a run, so that no run meets the prefix cache of an earlier one."""


def mode_name(adapters: int) -> str:
    """How the report names a choice among so many adapters."""
    if adapters == 0:
        return "base"
    return f"{adapters} adapter{'s' if adapters != 1 else ''}"


def is_loopback(url: str) -> bool:
    """Whether the address names this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
