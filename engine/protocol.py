"""The wire between gateway and engine: msgspec Structs in msgpack over one WebSocket. Token ids only, no text.

The gateway opens one WebSocket to `GET /v1/wire` of the engine and sends `Generate` and `Abort`. The engine
answers with `EngineStatus` (at once, then every second), one `StepOutput` per engine step that produced
anything for this gateway, and `Rejected` for a request that ends without (more) tokens. Every `Generate` ends
with exactly one final message: a `SequenceOutput` whose `finish_reason` is set, or a `Rejected`. Closing the
socket aborts every request that came over it.

The engine's other HTTP routes: `/healthz`, `/readyz`, `/metrics`, `/v1/model` (`ModelFacts` as JSON),
`/v1/model/files/{name}` (the tokenizer files named in `ModelFacts.files`) and `/adapters` (`AdapterReport` as JSON).
"""

from enum import StrEnum
from typing import Literal

import msgspec

WIRE_PATH = "/v1/wire"
FACTS_PATH = "/v1/model"
FILES_PATH = "/v1/model/files"
ADAPTER_FILES_PATH = "/v1/adapters/files"
ADAPTERS_PATH = "/adapters"
PIN_PATH = "/adapters/pin"
UNPIN_PATH = "/adapters/unpin"
"""`POST` with an `AdapterRef` as JSON: load it and keep it on the device; let it go."""
MAX_FRAME_BYTES = 64 * 1024 * 1024


class AdapterRef(msgspec.Struct, frozen=True):
    """Where an adapter lives. Its identity (a digest of config and weights) is computed by the engine."""

    name: str
    """What people call it: `<base>/<task>`; used in messages and metrics only."""
    uri: str
    """A directory in PEFT format: a path, `file://`, `hf://org/repo@revision`, `s3://` or what else fsspec reads, or
    `https://` of a directory or an archive."""
    sha256: str | None = None
    """When given, the digest of `adapter_model.safetensors`; anything else is refused."""
    parts: tuple["AdapterPart", ...] = ()
    """When given, the adapter is the weighted sum of these, and `uri` is empty."""


class AdapterPart(msgspec.Struct, frozen=True):
    """One adapter of a weighted sum."""

    ref: AdapterRef
    weight: float


class AdapterFiles(msgspec.Struct, frozen=True):
    """What an adapter brought for the text side; msgpack, from `GET ADAPTER_FILES_PATH?uri=...&version=...`.

    204 when the version given is the one there is."""

    version: str
    files: dict[str, bytes]
    """Of chat_template.jinja, tokenizer_config.json and tokenizer.json those that there are."""


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must look like; it is compiled in the engine, where the masks over token ids are used."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    value: str = ""
    """The schema as JSON, the regular expression, the choices as a JSON list of strings, or the Lark grammar."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. Defaults are OpenAI's; the gateway has checked the ranges."""

    max_tokens: int
    min_tokens: int = 0
    """No end-of-sequence or stop token may be sampled before this many tokens."""
    temperature: float = 1.0
    """0 is greedy: argmax of the logits after penalties and bias."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """With a seed the tokens do not depend on what else is in the batch. Without one the engine draws it."""
    logprobs: int | None = None
    """None: no logprobs. N: the sampled token's, and those of the N likeliest tokens."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for the prompt's tokens (the first has none)."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Ends the sequence like the model's own end tokens; not affected by `ignore_eos`."""
    grammar: Grammar | None = None
    """Only tokens that the grammar allows are sampled, and an end token exactly where it may end: `ignore_eos` and
    `min_tokens` mean nothing then."""


class Generate(msgspec.Struct, frozen=True, tag="generate", omit_defaults=True):
    """One sequence to continue. `request_id` is unique among the requests of one connection."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    follows: str | None = None
    """Another choice of the same request, sent just before over the same connection: same prompt, same adapter. Its
    prompt is computed once and its blocks are shared."""
    priority: int = 0
    """Lower goes first, and may preempt higher."""
    deadline_s: float | None = None
    """Seconds after arrival at which the request is given up: it ends with `EXPIRED`."""
    tenant: str = ""
    """Tenants take turns, as adapters do."""
    cache_salt: str = ""
    """Prefixes are shared only among requests with the same salt."""
    pooling: Literal["mean", "last"] | None = None
    """When given, nothing is sampled: the one output holds the prompt's hidden states, pooled (`embedding`)."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Free the request at once. Nothing more is sent for it; an unknown id is ignored."""

    request_id: str


ToEngine = Generate | Abort


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence or stop token was sampled (it is not part of `token_ids`)."""
    LENGTH = "length"
    """`max_tokens` or the model's context length was reached."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logs of probabilities under the model's own distribution (before temperature and penalties)."""

    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens, best first, as (token id, logprob)."""


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache; meaningful in the request's first output."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token of `token_ids`, when asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry per prompt token, in the request's first output, when asked for."""
    embedding: bytes | None = None
    """float32, little-endian, of length 1 as a vector: the final normalised hidden states, pooled as asked for."""


class StepOutput(msgspec.Struct, frozen=True, tag="step"):
    """Every token of one engine step for one gateway."""

    outputs: list[SequenceOutput]


class RejectCode(StrEnum):
    INVALID = "invalid"
    """The request cannot be served as it stands (empty prompt, token id out of range, ...)."""
    CONTEXT_LENGTH = "context_length"
    ADAPTER_NOT_FOUND = "adapter_not_found"
    ADAPTER_INVALID = "adapter_invalid"
    """The adapter exists but cannot be used with this base; the message says why."""
    OVERLOADED = "overloaded"
    """The queue is full; try again after `retry_after_s`."""
    EXPIRED = "expired"
    """Its deadline has passed."""
    GRAMMAR_INVALID = "grammar_invalid"
    """The grammar cannot be compiled or followed; the message says why."""
    UNAVAILABLE = "unavailable"
    """The engine is shutting down."""
    INTERNAL = "internal"
    """The engine failed while working on this request; the fault is not the caller's."""


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """The request ended without (more) tokens. `message` is fit for the person who sent the request."""

    request_id: str
    code: RejectCode
    message: str
    retry_after_s: float | None = None


class EngineStatus(msgspec.Struct, frozen=True, tag="status"):
    """How busy the engine is; the first frame on every connection, then one a second."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    adapters_resident: list[str]
    """Names of the adapters that can be used without loading."""


FromEngine = StepOutput | Rejected | EngineStatus


class ModelFacts(msgspec.Struct, frozen=True):
    """What a gateway must know of the base model, served as JSON at `FACTS_PATH`."""

    name: str
    """The public name of the base model, e.g. `smollm2-135m`."""
    root: str
    """Where the weights came from."""
    max_model_len: int
    """Prompt plus output tokens of one request."""
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str
    files: list[str]
    """Names of the files at `FILES_PATH`: at least tokenizer.json and tokenizer_config.json."""
    digest: str
    """Changes whenever facts or files change."""
    quantization: str = "none"
    """How the weights of the projections are held: none, int8, nf4 or fp8."""


class AdapterTier(StrEnum):
    """Where the fastest copy of an adapter is."""

    SOURCE = "source"
    """Where its reference points; nothing of it is in memory."""
    HOST = "host"
    DEVICE = "device"


class AdapterStatus(msgspec.Struct, frozen=True):
    """One adapter that the engine knows. An adapter published anew is another one for as long as the old is in use."""

    name: str
    state: str
    """wanted, fetching, on_host, copying, resident or failed."""
    tier: AdapterTier
    digest: str
    """The first twelve digits of its identity; empty until it was read once."""
    rank: int
    """The largest of its ranks; 0 until it was read once."""
    host_bytes: int
    """Held in host memory now."""
    device_bytes: int
    """Held on the device now."""
    slot: int | None
    running: int
    """Sequences that compute with it."""
    waiting: int
    """Sequences that wait, for it or for their turn."""
    used_s_ago: float
    """Seconds since it was last asked for or released."""
    pinned: bool = False
    reason: str = ""
    """Why it failed, for the people who use it."""


class AdapterReport(msgspec.Struct, frozen=True):
    """Every adapter that the engine knows, the last used first, and what they take of its budgets."""

    slots: int
    slots_used: int
    device_bytes: int
    device_budget_bytes: int
    host_adapters: int
    host_bytes: int
    host_budget_bytes: int
    evictions: int
    """Since the engine started."""
    adapters: list[AdapterStatus]


encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
