"""The table of every endpoint and parameter: supported, ignored because harmless, or refused. Knows no values' ranges.

Request parsing asks it about whatever is not a field of the body; README's tables are written from it
(`python -m scripts.api_tables`). To support something new: a field in `openai_schema.py` and its row here.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import msgspec

from gateway.openai_schema import (
    BatchFields,
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    EmbeddingFields,
    LoadAdapterFields,
    TokenizeFields,
    UnloadAdapterFields,
)
from gateway.responses_schema import ResponseFields


class Handling(StrEnum):
    SUPPORTED = "supported"
    IGNORED = "ignored"
    """Accepted at any value: it never changes an answer."""
    REFUSED = "refused"
    """400 `unsupported_parameter`, but for the values at which it makes no difference (null never makes one)."""


Body = type[msgspec.Struct]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one or more endpoints."""

    name: str
    bodies: tuple[Body, ...]
    origin: str
    handling: Handling = Handling.SUPPORTED
    harmless: tuple[Any, ...] = ()
    """Values at which a refused parameter is accepted."""
    note: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether leaving out a parameter that is not supported changes nothing at this value."""
        return self.handling is Handling.IGNORED or any(_same(value, fine) for fine in self.harmless)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of the API. What is refused answers 404 `unknown_url`."""

    address: str
    origin: str
    handling: Handling = Handling.SUPPORTED
    note: str = ""


CHAT = (ChatFields,)
COMPLETIONS = (CompletionFields,)
GENERATION = (ChatFields, CompletionFields)
TOKENIZE = (TokenizeFields,)
DETOKENIZE = (DetokenizeFields,)
EMBEDDING = (EmbeddingFields,)
BATCH = (BatchFields,)
LOAD = (LoadAdapterFields,)
UNLOAD = (UnloadAdapterFields,)
RESPONSE = (ResponseFields,)
EVERYWHERE = (*GENERATION, *EMBEDDING, *TOKENIZE, *DETOKENIZE)

OPENAI, VLLM, LORAX, OURS = "OpenAI", "vLLM", "LoRAX", "LoRA Land"
IGNORED, REFUSED = Handling.IGNORED, Handling.REFUSED

ENDPOINTS = (
    Endpoint("POST /v1/chat/completions", OPENAI),
    Endpoint("POST /v1/completions", OPENAI),
    Endpoint("POST /v1/embeddings", OPENAI, note="hidden states of the served model, pooled"),
    Endpoint("POST /v1/responses", OPENAI),
    Endpoint("GET /v1/responses/{response_id}", OPENAI),
    Endpoint("DELETE /v1/responses/{response_id}", OPENAI),
    Endpoint("POST /v1/responses/{response_id}/cancel", OPENAI, note="400: none runs in the background"),
    Endpoint("GET /v1/responses/{response_id}/input_items", OPENAI),
    Endpoint("POST /v1/files", OPENAI, note="see [Files and batches](#files-and-batches)"),
    Endpoint("GET /v1/files", OPENAI),
    Endpoint("GET /v1/files/{file_id}", OPENAI),
    Endpoint("GET /v1/files/{file_id}/content", OPENAI),
    Endpoint("DELETE /v1/files/{file_id}", OPENAI, note="not while a batch reads it: 400 `file_in_use`"),
    Endpoint("POST /v1/batches", OPENAI),
    Endpoint("GET /v1/batches", OPENAI),
    Endpoint("GET /v1/batches/{batch_id}", OPENAI),
    Endpoint("POST /v1/batches/{batch_id}/cancel", OPENAI),
    Endpoint("GET /v1/models", OPENAI),
    Endpoint("GET /v1/models/{model}", OPENAI),
    Endpoint("DELETE /v1/models/{model}", OPENAI, REFUSED, "405"),
    Endpoint("/v1/audio/…, /v1/images/…, /v1/videos/…", OPENAI, REFUSED, "text only"),
    Endpoint("/v1/moderations", OPENAI, REFUSED),
    Endpoint("/v1/assistants/…, /v1/threads/…, /v1/vector_stores/…", OPENAI, REFUSED),
    Endpoint("/v1/uploads/…, /v1/containers/…, /v1/evals/…", OPENAI, REFUSED),
    Endpoint("/v1/realtime", OPENAI, REFUSED),
    Endpoint("POST /tokenize", VLLM),
    Endpoint("POST /detokenize", VLLM),
    Endpoint("POST /v1/load_lora_adapter", VLLM, note="with `runtime_adapters = true`, else 404"),
    Endpoint("POST /v1/unload_lora_adapter", VLLM, note="likewise"),
    Endpoint("POST /generate", LORAX, note="see [From LoRAX](#from-lorax)"),
    Endpoint("POST /generate_stream", LORAX, note="likewise"),
)

PARAMETERS = (
    Parameter("model", EVERYWHERE, OPENAI, note="of `/tokenize` and `/detokenize` optional: the first"),
    Parameter("messages", (*CHAT, *TOKENIZE), OPENAI, note="text only; images, audio and files are refused"),
    Parameter("prompt", (*COMPLETIONS, *TOKENIZE), OPENAI),
    Parameter("input", EMBEDDING, OPENAI),
    Parameter("encoding_format", EMBEDDING, OPENAI),
    Parameter("dimensions", EMBEDDING, OPENAI, REFUSED, note="an embedding is as long as the hidden state"),
    Parameter("pooling", EMBEDDING, OURS, note="`mean` (the default) or `last`"),
    Parameter("stream", GENERATION, OPENAI),
    Parameter("stream_options", GENERATION, OPENAI, note="`include_obfuscation` has no effect"),
    Parameter("n", GENERATION, OPENAI),
    Parameter("stop", GENERATION, OPENAI),
    Parameter("max_tokens", GENERATION, OPENAI),
    Parameter("max_completion_tokens", CHAT, OPENAI),
    Parameter("temperature", GENERATION, OPENAI),
    Parameter("top_p", GENERATION, OPENAI),
    Parameter("frequency_penalty", GENERATION, OPENAI),
    Parameter("presence_penalty", GENERATION, OPENAI),
    Parameter("logit_bias", GENERATION, OPENAI),
    Parameter("seed", GENERATION, OPENAI),
    Parameter("logprobs", GENERATION, OPENAI),
    Parameter("top_logprobs", CHAT, OPENAI),
    Parameter("response_format", CHAT, OPENAI, note="a `json_schema` is always enforced, `strict` or not"),
    Parameter("response_format", COMPLETIONS, VLLM, REFUSED, ({"type": "text"},)),
    Parameter("echo", COMPLETIONS, OPENAI),
    Parameter("best_of", COMPLETIONS, OPENAI, note="only as many as `n`"),
    Parameter("suffix", COMPLETIONS, OPENAI, REFUSED, ("",)),
    Parameter("user", (*GENERATION, *EMBEDDING), OPENAI, IGNORED),
    Parameter("safety_identifier", GENERATION, OPENAI, IGNORED),
    Parameter("metadata", GENERATION, OPENAI, IGNORED),
    Parameter("store", GENERATION, OPENAI, IGNORED, note="nothing is stored"),
    Parameter("prompt_cache_key", GENERATION, OPENAI, IGNORED, note="prefixes are cached without it"),
    Parameter("prompt_cache_options", GENERATION, OPENAI, IGNORED),
    Parameter("prompt_cache_retention", GENERATION, OPENAI, IGNORED),
    Parameter("service_tier", GENERATION, OPENAI, REFUSED, ("auto", "default"), "use `priority`"),
    Parameter("tools", CHAT, OPENAI, note="functions only; see [Tools](#tools)"),
    Parameter("tool_choice", CHAT, OPENAI),
    Parameter("parallel_tool_calls", CHAT, OPENAI),
    Parameter("tools", COMPLETIONS, OPENAI, REFUSED, ([],)),
    Parameter("tool_choice", COMPLETIONS, OPENAI, REFUSED, ("none", "auto")),
    Parameter("parallel_tool_calls", COMPLETIONS, OPENAI, IGNORED),
    Parameter("functions", GENERATION, OPENAI, REFUSED, ([],), "deprecated by OpenAI"),
    Parameter("function_call", GENERATION, OPENAI, REFUSED, ("none", "auto"), "deprecated by OpenAI"),
    Parameter("modalities", GENERATION, OPENAI, REFUSED, (["text"],)),
    Parameter("audio", GENERATION, OPENAI, REFUSED),
    Parameter("prediction", GENERATION, OPENAI, REFUSED),
    Parameter("reasoning_effort", GENERATION, OPENAI, REFUSED, ("none",)),
    Parameter("verbosity", GENERATION, OPENAI, REFUSED),
    Parameter("web_search_options", GENERATION, OPENAI, REFUSED),
    Parameter("moderation", GENERATION, OPENAI, REFUSED),
    Parameter("model", RESPONSE, OPENAI),
    Parameter("input", RESPONSE, OPENAI, note="text, function calls and their outputs"),
    Parameter("instructions", RESPONSE, OPENAI),
    Parameter("previous_response_id", RESPONSE, OPENAI),
    Parameter("store", RESPONSE, OPENAI, note="in memory, until the process ends"),
    Parameter("metadata", RESPONSE, OPENAI),
    Parameter("stream", RESPONSE, OPENAI),
    Parameter("stream_options", RESPONSE, OPENAI),
    Parameter("max_output_tokens", RESPONSE, OPENAI),
    Parameter("temperature", RESPONSE, OPENAI),
    Parameter("top_p", RESPONSE, OPENAI),
    Parameter("top_logprobs", RESPONSE, OPENAI),
    Parameter("include", RESPONSE, OPENAI, note="`message.output_text.logprobs`"),
    Parameter("text", RESPONSE, OPENAI, note="`format`"),
    Parameter("tools", RESPONSE, OPENAI, note="functions only"),
    Parameter("tool_choice", RESPONSE, OPENAI),
    Parameter("parallel_tool_calls", RESPONSE, OPENAI),
    Parameter("user", RESPONSE, OPENAI, IGNORED),
    Parameter("safety_identifier", RESPONSE, OPENAI, IGNORED),
    Parameter("prompt_cache_key", RESPONSE, OPENAI, IGNORED),
    Parameter("prompt_cache_options", RESPONSE, OPENAI, IGNORED),
    Parameter("prompt_cache_retention", RESPONSE, OPENAI, IGNORED),
    Parameter("max_tool_calls", RESPONSE, OPENAI, IGNORED),
    Parameter("background_options", RESPONSE, OPENAI, IGNORED),
    Parameter("background", RESPONSE, OPENAI, REFUSED, (False,)),
    Parameter("conversation", RESPONSE, OPENAI, REFUSED),
    Parameter("reasoning", RESPONSE, OPENAI, REFUSED, ({},)),
    Parameter("truncation", RESPONSE, OPENAI, REFUSED, ("disabled",)),
    Parameter("context_management", RESPONSE, OPENAI, REFUSED, ([],)),
    Parameter("service_tier", RESPONSE, OPENAI, REFUSED, ("auto", "default")),
    Parameter("prompt", RESPONSE, OPENAI, REFUSED),
    Parameter("moderation", RESPONSE, OPENAI, REFUSED),
    Parameter("seed", RESPONSE, VLLM),
    Parameter("top_k", RESPONSE, VLLM),
    Parameter("min_p", RESPONSE, VLLM),
    Parameter("repetition_penalty", RESPONSE, VLLM),
    Parameter("priority", RESPONSE, VLLM),
    Parameter("cache_salt", RESPONSE, VLLM),
    Parameter("deadline_s", RESPONSE, OURS),
    Parameter("adapters", RESPONSE, OURS),
    Parameter("tokens", DETOKENIZE, VLLM),
    Parameter("return_token_strs", TOKENIZE, VLLM),
    Parameter(
        "add_special_tokens",
        (*GENERATION, *EMBEDDING, *TOKENIZE),
        VLLM,
        note="a chat's template writes its own",
    ),
    Parameter("add_generation_prompt", (*CHAT, *TOKENIZE), VLLM),
    Parameter("continue_final_message", (*CHAT, *TOKENIZE), VLLM),
    Parameter("chat_template_kwargs", (*CHAT, *TOKENIZE), VLLM),
    Parameter("chat_template", (*CHAT, *TOKENIZE), VLLM, REFUSED, note="the model's or the adapter's own"),
    Parameter("documents", CHAT, VLLM, REFUSED, ([],)),
    Parameter("top_k", GENERATION, VLLM),
    Parameter("min_p", GENERATION, VLLM),
    Parameter("repetition_penalty", GENERATION, VLLM),
    Parameter("min_tokens", GENERATION, VLLM),
    Parameter("ignore_eos", GENERATION, VLLM),
    Parameter("stop_token_ids", GENERATION, VLLM),
    Parameter("skip_special_tokens", GENERATION, VLLM),
    Parameter("include_stop_str_in_output", GENERATION, VLLM, note="not with `stop_token_ids`"),
    Parameter(
        "truncate_prompt_tokens",
        (*GENERATION, *EMBEDDING),
        VLLM,
        note="keeps the last so many; not with `echo`",
    ),
    Parameter("structured_outputs", GENERATION, VLLM, note="`json`, `regex`, `choice`, `grammar` (Lark)"),
    Parameter("guided_json", GENERATION, VLLM),
    Parameter("guided_regex", GENERATION, VLLM),
    Parameter("guided_choice", GENERATION, VLLM),
    Parameter("guided_grammar", GENERATION, VLLM, note="Lark"),
    Parameter("guided_decoding_backend", GENERATION, VLLM, IGNORED),
    Parameter("guided_whitespace_pattern", GENERATION, VLLM, REFUSED),
    Parameter("priority", (*GENERATION, *EMBEDDING), VLLM, note="lower goes first"),
    Parameter("cache_salt", GENERATION, VLLM),
    Parameter("echo", CHAT, VLLM, REFUSED, (False,)),
    Parameter("use_beam_search", GENERATION, VLLM, REFUSED, (False,)),
    Parameter("length_penalty", GENERATION, VLLM, REFUSED, (1,)),
    Parameter("bad_words", GENERATION, VLLM, REFUSED, ([],)),
    Parameter("allowed_token_ids", GENERATION, VLLM, REFUSED, note="use `structured_outputs`"),
    Parameter("logits_processors", GENERATION, VLLM, REFUSED, ([],)),
    Parameter("prompt_logprobs", GENERATION, VLLM, REFUSED, note="use `echo` with `logprobs`"),
    Parameter("return_token_ids", GENERATION, VLLM, REFUSED, (False,)),
    Parameter("return_tokens_as_token_ids", GENERATION, VLLM, REFUSED, (False,)),
    Parameter("spaces_between_special_tokens", GENERATION, VLLM, IGNORED),
    Parameter("mm_processor_kwargs", GENERATION, VLLM, REFUSED, ({},)),
    Parameter("kv_transfer_params", GENERATION, VLLM, REFUSED, ({},)),
    Parameter("vllm_xargs", GENERATION, VLLM, REFUSED, ({},)),
    Parameter("include_reasoning", CHAT, VLLM, IGNORED),
    Parameter("request_id", GENERATION, VLLM, IGNORED, note="send `x-request-id`"),
    Parameter("input_file_id", BATCH, OPENAI),
    Parameter("endpoint", BATCH, OPENAI, note="chat completions, completions or embeddings"),
    Parameter("completion_window", BATCH, OPENAI, note="`24h`"),
    Parameter("metadata", BATCH, OPENAI),
    Parameter("output_expires_after", BATCH, OPENAI),
    Parameter("lora_name", (*LOAD, *UNLOAD), VLLM),
    Parameter("lora_path", LOAD, VLLM, note="a directory of the engine's machine, a URI, or `org/name`"),
    Parameter("load_inplace", LOAD, VLLM),
    Parameter("base_model_name", LOAD, VLLM, note="the first base when absent"),
    Parameter("is_3d_lora_weight", LOAD, VLLM, REFUSED, (False,)),
    Parameter("lora_int_id", UNLOAD, VLLM, IGNORED, note="names are enough"),
    Parameter("adapter_id", (*GENERATION, *EMBEDDING), LORAX, note="`model` then names the base"),
    Parameter("adapter_source", GENERATION, LORAX, IGNORED, note="the configuration says where adapters lie"),
    Parameter("api_token", GENERATION, LORAX, IGNORED, note="the engine has its own"),
    Parameter("merged_adapters", GENERATION, LORAX, REFUSED, note="use `adapters`"),
    Parameter("ignore_eos_token", GENERATION, LORAX, REFUSED, (False,), "use `ignore_eos`"),
    Parameter("adapters", GENERATION, OURS, note="the weighted sum of several"),
    Parameter("deadline_s", GENERATION, OURS, note="504 for what is not finished by then"),
)


@cache
def parameters_of(body: Body) -> dict[str, Parameter]:
    """Name -> row, of one body."""
    return {parameter.name: parameter for parameter in PARAMETERS if body in parameter.bodies}


def _same(value: Any, fine: Any) -> bool:
    """1 is 1.0, but true is not 1."""
    return isinstance(value, bool) == isinstance(fine, bool) and value == fine
