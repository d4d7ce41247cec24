"""Hugging Face directories: the same weights as transformers, and what is wrong with a bad one."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.checkpoint import CheckpointError, open_checkpoint
from engine.export import export_hf
from engine.kernels.reference import ReferenceKernels
from engine.model import Decoder
from tests.engine.tiny import CHAT_TEMPLATE, FAMILIES, write_tiny_model, write_tiny_tokenizer

TEXTS = [
    "Hello 12345, world!",
    "  a\n\n b\t 3.14 don't",
    "日本語 🎉 e\u0301",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def model_dir(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_transformers_loads(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, family))
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    if checkpoint.spec.tie_word_embeddings:
        del state["lm_head.weight"]
    assert checkpoint.names() == set(state)
    for name, expected in state.items():
        assert torch.equal(checkpoint.tensor(name, torch.float32), expected), name
        assert torch.equal(checkpoint.tensor(name, torch.bfloat16), expected.bfloat16()), name


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_is_a_tensor_only_when_it_is_not_tied(tie: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, "qwen2", tie=tie))
    assert ("lm_head.weight" in checkpoint.names()) is not tie


def test_a_sharded_checkpoint_reads_like_a_single_file(pristine: Path, tmp_path: Path) -> None:
    sharded = open_checkpoint(write_tiny_model(tmp_path, "llama", max_shard_size="100KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    single = open_checkpoint(pristine)
    for name in single.names():
        assert torch.equal(sharded.tensor(name, torch.float32), single.tensor(name, torch.float32)), name


def _mapped_mib() -> float:
    """File pages in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssFile:")[2].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
def test_loading_holds_one_layer_of_the_files_in_memory_at_a_time(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="20MB")
    write_tiny_tokenizer(tmp_path)
    size_mib = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 2**20
    assert size_mib > 50
    checkpoint, seen = open_checkpoint(tmp_path), []
    before = _mapped_mib()
    Decoder(checkpoint, torch.float32, ReferenceKernels(), 64, lambda *_: seen.append(_mapped_mib() - before))
    assert len(seen) == 4 and max(seen) < size_mib / 4


def test_a_tensor_outlives_the_release_of_its_file(pristine: Path) -> None:
    checkpoint = open_checkpoint(pristine)
    name = "model.norm.weight"
    held = checkpoint.tensor(name, torch.float32)
    checkpoint.release()
    assert torch.equal(held, load_file(pristine / "model.safetensors")[name])
    assert torch.equal(held, checkpoint.tensor(name, torch.float32))


def test_a_chat_template_file_is_folded_into_the_tokenizer_config(pristine: Path) -> None:
    files = open_checkpoint(pristine).files
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    config = json.loads(files["tokenizer_config.json"])
    assert (config["chat_template"], config["eos_token"]) == (CHAT_TEMPLATE, "<|im_end|>")


def test_end_tokens_of_the_generation_config_count_too(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert open_checkpoint(model_dir).spec.eos_token_ids == (2, 7)


def test_the_digest_follows_the_weights_and_the_files(model_dir: Path) -> None:
    before = open_checkpoint(model_dir).digest
    assert open_checkpoint(model_dir).digest == before
    _rewrite(model_dir, lambda weights: weights["model.norm.weight"].add_(1))
    changed = open_checkpoint(model_dir).digest
    (model_dir / "chat_template.jinja").write_text("other")
    assert len({before, changed, open_checkpoint(model_dir).digest}) == 3


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop(directory: Path) -> None:
    _rewrite(directory, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def _reshape(directory: Path) -> None:
    _rewrite(directory, lambda weights: weights.update({"model.norm.weight": torch.zeros(65)}))


def _add(directory: Path) -> None:
    _rewrite(
        directory, lambda weights: weights.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(2)})
    )


def _integers(directory: Path) -> None:
    _rewrite(
        directory, lambda weights: weights.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    )


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def _escape(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _lose_shard(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"model\.safetensors: not a whole safetensors file"),
        (_drop, r"model\.layers\.1\.mlp\.up_proj\.weight is missing .* in .*model\.safetensors"),
        (_reshape, r"model\.safetensors: model\.norm\.weight has shape \[65\], the config says \[64\]"),
        (_add, r"unexpected tensor model\.layers\.0\.self_attn\.q_norm\.weight"),
        (_pickle, r"pytorch_model\.bin is a pickle, which is never read"),
        (_escape, r"'\.\./\.\./etc/passwd' is not the name of a file beside it"),
        (_lose_shard, r"model-00001-of-00002\.safetensors: missing"),
        (lambda d: (d / "config.json").unlink(), r"config\.json: missing"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json: not a JSON object"),
        (lambda d: (d / "config.json").write_text("{}"), r"architectures must name one class"),
        (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json: missing"),
        (lambda d: (d / "generation_config.json").write_text("{"), r"generation_config\.json: not JSON"),
    ],
)
def test_a_damaged_directory_names_file_and_cause(
    damage: Callable[[Path], object], message: str, model_dir: Path
) -> None:
    damage(model_dir)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model_dir)


def test_integer_weights_are_refused_when_read(model_dir: Path) -> None:
    _integers(model_dir)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int8"):
        open_checkpoint(model_dir).tensor("model.norm.weight", torch.float32)


def test_an_address_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a directory .*nor package:NAME"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="package 'no-such-package' is not installed"):
        open_checkpoint("package:no-such-package")
    with pytest.raises(CheckpointError, match=r"holds 0 \.gguf files"):
        open_checkpoint("package:msgspec")


def test_an_exported_checkpoint_is_the_same_model_to_transformers(pristine: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pristine)
    export_hf(checkpoint, tmp_path, torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint.tensor(name, torch.bfloat16)), name
    assert open_checkpoint(tmp_path).spec == checkpoint.spec
    ours = tokenizers.Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text).ids


def test_an_export_never_overwrites_what_it_reads(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written over"):
        export_hf(open_checkpoint(model_dir), model_dir, torch.float32)
