"""Tiny random checkpoints and adapters, written by transformers and peft as anybody would. Knows nothing of ours."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers

VOCABULARY = 384
MAX_POSITIONS = 512
SLIDING_WINDOW = 8
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "phi", "gemma", "gemma2", "gemma3")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tiny_model(
    directory: Path, family: str, seed: int = 0, *, tie: bool | None = None, max_shard_size: str = "1GB"
) -> Path:
    """A Hugging Face directory in float32: config, safetensors, byte-level tokenizer with a chat template.

    "llama" has a head_dim of its own and grouped queries, "llama3" its rotary scaling, "mistral" a window of 8 in
    every layer, "qwen2" biases, "qwen3" normalised queries and keys, "phi" parallel blocks and LayerNorm, "gemma" scaled
    embeddings, "gemma2" soft caps and a window in every other layer, "gemma3" two rotary bases, one of them scaled.
    Weights are large enough that greedy output wanders.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(_config(family, tie), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    write_tiny_tokenizer(directory)
    return directory


def write_tiny_adapter(
    directory: Path,
    model_dir: Path,
    rank: int,
    targets: Sequence[str] | str,
    seed: int = 0,
    *,
    rslora: bool = False,
    alpha: float | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    **options: Any,
) -> Path:
    """A random PEFT adapter in which everything trainable was trained, enough to change greedy output.

    `alpha`: 2 * rank. `options`: further arguments of peft's LoraConfig.
    """
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},  # type: ignore[arg-type]
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        **options,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with warnings.catch_warnings():  # peft calls what transformers has just deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.simplefilter("ignore", UserWarning)  # and it has advice for every unusual format
        model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.1)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(str(directory))
    return directory


def write_tiny_tokenizer(directory: Path) -> None:
    """Byte-level BPE over `VOCABULARY` tokens, three of them special."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *alphabet))}
    merges = []
    letters = "Ġetaoinshrdlu"
    for first in letters:
        for second in letters[1:]:
            if len(vocabulary) < VOCABULARY:
                vocabulary[first + second] = len(vocabulary)
                merges.append([first, second])
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for index, token in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[2],
        "pad_token": _SPECIAL[2],
        "clean_up_tokenization_spaces": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _config(family: str, tie: bool | None) -> transformers.PretrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if family == "llama":
        return transformers.LlamaConfig(**common, head_dim=32, tie_word_embeddings=bool(tie))
    if family == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        return transformers.LlamaConfig(**common, tie_word_embeddings=tie is not False, rope_parameters=rope)
    if family == "mistral":
        return transformers.MistralConfig(
            **common, head_dim=16, sliding_window=SLIDING_WINDOW, tie_word_embeddings=bool(tie)
        )
    if family == "qwen2":
        return transformers.Qwen2Config(**common, tie_word_embeddings=tie is not False)
    if family == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=32, tie_word_embeddings=bool(tie))
    if family == "phi":
        return transformers.PhiConfig(**common, hidden_act="gelu_new")
    if family == "gemma":
        return transformers.GemmaConfig(**common, head_dim=32)
    windowed = {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    if family == "gemma2":
        return transformers.Gemma2Config(
            **common, **windowed, attn_logit_softcapping=3.0, final_logit_softcapping=5.0
        )
    if family == "gemma3":
        rope = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
        return transformers.Gemma3TextConfig(
            **common, **windowed, rope_parameters=rope, final_logit_softcapping=9.0
        )
    raise ValueError(f"no tiny {family}; there are {', '.join(FAMILIES)}")
