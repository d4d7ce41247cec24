"""The tensors of a PEFT adapter: names and shapes checked against the base, each with the meaning PEFT gives to it.

Every tensor is used or the adapter is refused: nothing is half applied. Knows no files and no slots.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from engine.host_adapter import MAX_RANK, AdapterError, HostAdapter, LoraWeights, VocabularyWeights
from engine.peft_config import CONFIG_FILE, EMBEDDING, HEAD, WEIGHTS_FILE, PeftConfig
from engine.spec import ModelSpec
from engine.tensor_file import TensorFileError, view_tensors


def largest_file(spec: ModelSpec) -> int:
    """Bytes that the weights of an adapter for this base cannot exceed."""
    linears = (
        sum(sum(spec.linear_shape(module)) for module in spec.family.modules) * spec.num_layers * MAX_RANK
    )
    ends = 2 * (spec.vocab_size + spec.hidden_size) * MAX_RANK + 2 * spec.vocab_size * spec.hidden_size
    return 4 * (linears + ends) + 2**20


def read_peft(config: PeftConfig, weights: bytes, sha256: str, spec: ModelSpec, served: str) -> HostAdapter:
    """The adapter that the two files are.

    Args:
        weights: Contents of adapter_model.safetensors.
        sha256: Theirs.
        served: What the base is called, for messages.

    Raises:
        AdapterError: It does not fit the base, or holds what is not served.
    """
    parts = _Parts(_tensors(weights), config, spec, served)
    linears = _linear_paths(tuple(spec.family.modules.items()), spec.num_layers)
    config.check_targets(parts.adapted, linears, spec.tie_word_embeddings)
    modules: dict[tuple[int, str], LoraWeights] = {}
    biases: dict[tuple[int, str], Tensor] = {}
    for path, place in sorted(parts.linears.items(), key=lambda item: item[1]):
        outputs, inputs = spec.linear_shape(place[1])
        if path in parts.adapted:
            modules[place] = parts.lora(path, outputs, inputs)
        if (bias := parts.bias(path, outputs)) is not None:
            biases[place] = bias
    embedding, head = parts.vocabulary(EMBEDDING), parts.vocabulary(HEAD)
    parts.check_finite()
    if config.ties and spec.tie_word_embeddings and embedding is not None and head is None:
        head = _tied(embedding, config)
    scalings = {"/".join(map(str, place)): module.scaling for place, module in modules.items()}
    loras = list(modules.values())
    for name, end in (("embedding", embedding), ("head", head)):
        if end is not None and end.lora is not None:
            scalings[name] = end.lora.scaling
            loras.append(end.lora)
    canonical = json.dumps([scalings, head is not None])
    tensors = [tensor for lora in loras for tensor in lora.tensors()] + list(biases.values())
    for end in (embedding, head):
        if end is not None:
            tensors += [tensor for tensor in (end.matrix, end.bias, *end.base_lengths) if tensor is not None]
    return HostAdapter(
        digest=hashlib.sha256(f"{canonical} {sha256}".encode()).hexdigest(),
        modules=modules,
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        rank=max((lora.a.shape[0] for lora in loras), default=0),
        biases=biases,
        embedding=embedding,
        head=head,
    )


@lru_cache(maxsize=8)
def _linear_paths(modules: tuple[tuple[str, str], ...], num_layers: int) -> tuple[tuple[str, ...], ...]:
    """Of every linear, layer by layer."""
    return tuple(
        tuple(f"model.layers.{layer}.{block}.{module}" for module, block in modules)
        for layer in range(num_layers)
    )


_PREFIX = "base_model.model."
_KINDS = {
    "lora_A": r"lora_A(?:\.default)?\.weight",
    "lora_B": r"lora_B(?:\.default)?\.weight",
    "lora_bias": r"lora_B(?:\.default)?\.bias",
    "lora_embedding_A": r"lora_embedding_A(?:\.default)?",
    "lora_embedding_B": r"lora_embedding_B(?:\.default)?",
    "magnitude": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "base_weight": r"base_layer\.weight",
    "bias": r"(?:base_layer\.|modules_to_save\.(?:default\.)?)?bias",
    "weight": r"(?:modules_to_save\.(?:default\.)?)?weight",
}
"""What a tensor is -> the end of its name; `default` is the adapter's name, which PEFT leaves out when it saves."""
_TENSOR_NAME = re.compile(
    rf"{re.escape(_PREFIX)}(?P<path>[\w.]+?)\.(?:{'|'.join(f'(?P<{kind}>{end})' for kind, end in _KINDS.items())})"
)
_LINEAR_PATH = re.compile(r"model\.layers\.(\d{1,6})\.(\w+)\.(\w+)")


@lru_cache(maxsize=4096)
def _read_name(name: str) -> tuple[str, str, tuple[int, str, str] | None] | None:
    """Path, kind and, of a linear, (layer, block, projection); None: nothing that PEFT writes."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None:
        return None
    linear = _LINEAR_PATH.fullmatch(match["path"])
    kind = next(kind for kind in _KINDS if match[kind] is not None)
    return match["path"], kind, None if linear is None else (int(linear[1]), linear[2], linear[3])


class _Parts:
    """The tensors by module and kind, checked for what may stand beside what."""

    def __init__(
        self, tensors: Mapping[str, Tensor], config: PeftConfig, spec: ModelSpec, served: str
    ) -> None:
        self._config = config
        self._spec = spec
        self._bases = f"the adapter's config names the base {config.base!r}, served is {served!r}"
        self._modules: dict[str, dict[str, Tensor]] = {}
        self.linears: dict[str, tuple[int, str]] = {}
        """Path -> (layer, projection) of every linear the adapter touches."""
        self._used: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            path, kind = self._place(name)
            kinds = self._modules.setdefault(path, {})
            if kind in kinds:
                raise AdapterError(f"{WEIGHTS_FILE}: {name}: stored twice, under two names")
            kinds[kind] = tensor
        if not self._modules:
            raise AdapterError(f"{WEIGHTS_FILE}: holds no weights")
        for path in self._modules:
            self._check(path)
        self.adapted = {path for path, kinds in self._modules.items() if self._half("A", path) in kinds}
        """Paths of the modules with LoRA weights."""
        for path in (EMBEDDING, HEAD):
            if config.replaces(path) and "weight" not in self._modules.get(path, ()):
                raise AdapterError(
                    f"{CONFIG_FILE}: modules_to_save names {path}, but {WEIGHTS_FILE} has none"
                )

    def check_finite(self) -> None:
        """Refuse an adapter with NaN or infinity in what was used of it."""
        # One call for all: one a tensor would give the interpreter away and wait for it hundreds of times. A norm of
        # large numbers overflows, so what it finds is looked at again.
        if torch.nn.utils.get_total_norm(self._used.values()).isfinite():
            return
        for name, tensor in self._used.items():
            if not tensor.isfinite().all():
                raise AdapterError(f"{WEIGHTS_FILE}: {name} holds NaN or infinite values")

    def lora(self, path: str, outputs: int, inputs: int) -> LoraWeights:
        rank = self._config.rank(path)
        a = self._tensor(path, self._half("A", path), (rank, inputs))
        b = self._tensor(path, self._half("B", path), (outputs, rank))
        magnitude = self._optional(path, "magnitude", (outputs,))
        bias = self._optional(path, "lora_bias", (outputs,))
        if self._config.use_dora and magnitude is None:
            raise AdapterError(f"{WEIGHTS_FILE}: {path} has no lora_magnitude_vector, use_dora is true")
        if self._config.lora_bias and bias is None and path != EMBEDDING:
            raise AdapterError(f"{WEIGHTS_FILE}: {path} has no lora_B.bias, lora_bias is true")
        return LoraWeights(a, b, self._config.scaling(path), magnitude, bias)

    def bias(self, path: str, outputs: int) -> Tensor | None:
        """What stands in place of the base's bias."""
        return self._optional(path, "bias", (outputs,))

    def vocabulary(self, path: str) -> VocabularyWeights | None:
        """What is done to the embedding or the head, if anything."""
        if path not in self._modules:
            return None
        shape = rows, hidden = self._spec.vocab_size, self._spec.hidden_size
        lora = None
        if path in self.adapted:
            lora = self.lora(path, *((hidden, rows) if path == EMBEDDING else shape))
        base = self._optional(path, "base_weight", shape)
        return VocabularyWeights(
            lora=lora,
            matrix=self._optional(path, "weight", shape),
            bias=self._optional(path, "bias", (rows,)),
            base_lengths=() if base is None else (row_lengths(base),),
        )

    def _place(self, name: str) -> tuple[str, str]:
        read = _read_name(name)
        if read is None:
            raise AdapterError(f"{WEIGHTS_FILE}: {name} is nothing that a LoRA adapter of PEFT holds")
        path, kind, linear = read
        if path not in (EMBEDDING, HEAD):
            if linear is None and kind == "bias":
                raise AdapterError(f"{WEIGHTS_FILE}: {name}: trained biases are served on linears only")
            if linear is None or self._spec.family.modules.get(linear[2]) != linear[1]:
                raise AdapterError(
                    f"{WEIGHTS_FILE}: {name} is not a LoRA weight of a projection of this base"
                )
            self.linears[path] = linear[0], linear[2]
            if linear[0] >= self._spec.num_layers:
                layers = f"this base has {self._spec.num_layers} layers"
                raise AdapterError(f"{WEIGHTS_FILE}: {path}: {layers}; {self._bases}")
        return path, kind

    def _check(self, path: str) -> None:
        """What a module may hold, by the configuration and by what else it holds."""
        config, kinds = self._config, self._modules[path]
        half_a, half_b = self._half("A", path), self._half("B", path)
        adapted = half_a in kinds
        if adapted != (half_b in kinds):
            lone, partner = ("A", "B") if adapted else ("B", "A")
            raise AdapterError(f"{WEIGHTS_FILE}: {path} has lora_{lone} but no lora_{partner}")
        tied = path == HEAD and config.ties and config.replaces(EMBEDDING) and self._spec.tie_word_embeddings
        may_replace = path in (EMBEDDING, HEAD) and (config.replaces(path) or tied)
        # PEFT stores the base's whole head beside LoRA on it, with its bias if it has one.
        of_base = path == HEAD and self._spec.family.biased and "base_weight" in kinds
        trains_bias = path != EMBEDDING and (
            config.bias == "all" or (config.bias == "lora_only" and adapted) or may_replace or of_base
        )
        allowed = {
            half_a: True,
            half_b: True,
            "magnitude": config.use_dora and adapted,
            "lora_bias": config.lora_bias and adapted and path != EMBEDDING,
            "bias": trains_bias,
            "weight": may_replace and not adapted,
            "base_weight": path in (EMBEDDING, HEAD) and adapted,
        }
        for kind in kinds:
            if not allowed.get(kind, False):
                raise AdapterError(
                    f"{WEIGHTS_FILE}: {path} has a {kind}, which {CONFIG_FILE} gives no use for "
                    f"(bias {config.bias!r}, use_dora {config.use_dora}, lora_bias {config.lora_bias}, "
                    f"modules_to_save {config.replaces(path)})"
                )

    def _optional(self, path: str, kind: str, shape: tuple[int, ...]) -> Tensor | None:
        return self._tensor(path, kind, shape) if kind in self._modules[path] else None

    def _tensor(self, path: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        tensor, name = self._modules[path][kind], f"{path}.{kind}"
        if tuple(tensor.shape) != shape:
            rank = f" (rank {self._config.rank(path)} by {CONFIG_FILE})" if kind.startswith("lora_") else ""
            raise AdapterError(
                f"{WEIGHTS_FILE}: {name} has shape {list(tensor.shape)}, expected {list(shape)}{rank}; {self._bases}"
            )
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise AdapterError(f"{WEIGHTS_FILE}: {name} is {tensor.dtype}, not a float of 16 or 32 bits")
        self._used[name] = tensor
        return tensor

    @staticmethod
    def _half(half: str, path: str) -> str:
        return f"lora_embedding_{half}" if path == EMBEDDING else f"lora_{half}"


def row_lengths(matrix_NH: Tensor) -> Tensor:
    """[N] float32."""
    return torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in matrix_NH.split(4096)])


def _tied(embedding: VocabularyWeights, config: PeftConfig) -> VocabularyWeights:
    """What PEFT's ensure_weight_tying makes of the head when only the embedding is stored."""
    lora = embedding.lora
    if lora is not None:
        lora = LoraWeights(a=lora.b.T, b=lora.a.T, scaling=config.scaling(HEAD))
    return VocabularyWeights(lora=lora, matrix=embedding.matrix)


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return view_tensors(data)
    except TensorFileError as error:
        if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise AdapterError(
                f"{WEIGHTS_FILE}: a pickle, not safetensors; pickles are never read"
            ) from error
        raise AdapterError(
            f"{WEIGHTS_FILE}: not a whole safetensors file (cut off or damaged): {error}"
        ) from error
