"""The decoder: one class for every family, driven by a `ModelSpec`. Knows no requests, only a `Batch`.

Shape suffixes: T rows (tokens of the step), H hidden, N outputs of a projection, P position, D half a head.
The residual stream is float32 whatever the weights are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from engine.batch import Batch
from engine.checkpoint import Checkpoint
from engine.kernels.reference import BLOCK, Linear, ReferenceKernels
from engine.lora import GROUPS, LoraSlots
from engine.spec import ModelSpec
from engine.vocabulary import embed, logits

RECORDED_ROWS = 64
"""Steps of up to so many rows are recorded once and repeated: where few rows are computed, calling each kernel from
Python takes a good part of the time."""

KvCache = list[tuple[Tensor, Tensor]]
"""Per layer: keys [blocks, kv heads, head, BLOCK] and values [blocks, kv heads, BLOCK, head]."""


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: Tensor
    qkv: Linear
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the layers of a step write to, layer after layer."""

    residual: Tensor
    """[T, H] float32"""
    x: Tensor
    """[T, H] normalised residual."""
    qkv: Tensor
    attended: Tensor
    delta: Tensor
    """[T, H] what a block adds to the residual."""
    gate_up: Tensor
    hidden: Tensor
    """[T, intermediate]"""

    @classmethod
    def allocate(cls, spec: ModelSpec, rows: int, dtype: torch.dtype) -> "Workspace":
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return cls(
            residual=torch.empty(rows, spec.hidden_size),
            x=torch.empty(rows, spec.hidden_size, dtype=dtype),
            qkv=torch.empty(rows, queries + 2 * keys, dtype=dtype),
            attended=torch.empty(rows, queries, dtype=dtype),
            delta=torch.empty(rows, spec.hidden_size, dtype=dtype),
            gate_up=torch.empty(rows, 2 * spec.intermediate_size, dtype=dtype),
            hidden=torch.empty(rows, spec.intermediate_size, dtype=dtype),
        )

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    def first(self, rows: int) -> "Workspace":
        return Workspace(*(getattr(self, field.name)[:rows] for field in fields(self)))


class Decoder:
    """Embedding, layers, head. `forward` writes the step's keys and values into the pages it is given."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        kernels: ReferenceKernels,
        max_positions: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.kernels = kernels
        self._cosine, self._sine = rope_tables(self.spec, max_positions)
        self._layers: list[Layer] = []
        for index in range(self.spec.num_layers):
            self._layers.append(self._load_layer(checkpoint, index))
            progress(index + 1, self.spec.num_layers)
        self._workspace = Workspace.allocate(self.spec, 0, dtype)
        self._recorded: dict[tuple[int, frozenset[str]], Callable[[Batch], None]] = {}
        self._recorded_for: tuple[KvCache, LoraSlots] | None = None
        """Whose addresses the recorded steps hold; kept, so that none is given to another tensor."""
        self._norm = checkpoint.tensor("model.norm.weight", torch.float32)
        self._embedding = kernels.pack_linear(checkpoint.tensor("model.embed_tokens.weight", dtype), None)
        if self.spec.tie_word_embeddings:
            self._head = self._embedding
        else:
            self._head = kernels.pack_linear(checkpoint.tensor("lm_head.weight", dtype), None)

    def _load_layer(self, checkpoint: Checkpoint, index: int) -> Layer:
        prefix, spec = f"model.layers.{index}", self.spec

        def fused(group: str, block: str, biased: bool) -> Linear:
            names = [f"{prefix}.{block}.{member}" for member in GROUPS[group]]
            weight_NH = torch.cat([checkpoint.tensor(f"{name}.weight", self.dtype) for name in names])
            bias_N = (
                torch.cat([checkpoint.tensor(f"{name}.bias", self.dtype) for name in names])
                if biased
                else None
            )
            return self.kernels.pack_linear(weight_NH, bias_N)

        return Layer(
            input_norm=checkpoint.tensor(f"{prefix}.input_layernorm.weight", torch.float32),
            qkv=fused("qkv", "self_attn", spec.qkv_bias),
            o=fused("o", "self_attn", spec.o_bias),
            post_norm=checkpoint.tensor(f"{prefix}.post_attention_layernorm.weight", torch.float32),
            gate_up=fused("gate_up", "mlp", spec.mlp_bias),
            down=fused("down", "mlp", spec.mlp_bias),
        )

    def new_kv_cache(self, num_blocks: int) -> KvCache:
        """Pages for every layer; their memory is only touched when written."""
        spec = self.spec
        keys = (num_blocks, spec.num_kv_heads, spec.head_dim, BLOCK)
        values = (num_blocks, spec.num_kv_heads, BLOCK, spec.head_dim)
        return [
            (torch.empty(keys, dtype=self.dtype), torch.empty(values, dtype=self.dtype))
            for _ in range(spec.num_layers)
        ]

    def forward(self, batch: Batch, kv_cache: KvCache, lora: LoraSlots) -> Tensor:
        """The normalised hidden state [T, H] of every row, in the model's dtype; overwritten by the next step."""
        rows = len(batch.token_ids)
        if rows > self._workspace.rows:
            self._workspace = Workspace.allocate(self.spec, rows, self.dtype)
            self._recorded.clear()
        held = self._recorded_for
        if held is None or held[0] is not kv_cache or held[1] is not lora:
            self._recorded_for = kv_cache, lora
            self._recorded.clear()
        work = self._workspace.first(rows)
        embeddings = lora.embeddings(batch.slots)
        work.residual.copy_(embed(self.kernels, self._embedding, self.dtype, batch, embeddings))
        adapted = lora.active_groups(batch.slots)
        compute = self._recorded.get((rows, adapted))
        if compute is None:
            layers = partial(self._compute_layers, work, kv_cache, lora, adapted)
            compute = self.kernels.record(layers, batch)
            if rows <= RECORDED_ROWS:
                self._recorded[rows, adapted] = compute
        compute(batch)
        return work.x

    def _compute_layers(
        self, work: Workspace, kv_cache: KvCache, lora: LoraSlots, adapted: frozenset[str], batch: Batch
    ) -> None:
        ops, spec = self.kernels, self.spec
        delta_TH: Tensor | None = None

        def project(x: Tensor, linear: Linear, group: str, index: int, out: Tensor) -> Tensor:
            ops.linear(x, linear, out)
            if group in adapted:
                ops.lora(x, out, batch, lora.groups[group][index])
            return out

        for index, layer in enumerate(self._layers):
            k_cache, v_cache = kv_cache[index]
            ops.add_rms_norm(work.residual, delta_TH, layer.input_norm, spec.rms_norm_eps, work.x)
            qkv_TN = project(work.x, layer.qkv, "qkv", index, work.qkv)
            ops.rope_store(qkv_TN, batch, self._cosine, self._sine, k_cache, v_cache, spec.num_heads)
            ops.attention(qkv_TN, batch, k_cache, v_cache, spec.num_heads, spec.sliding_window, work.attended)
            delta_TH = project(work.attended, layer.o, "o", index, work.delta)
            ops.add_rms_norm(work.residual, delta_TH, layer.post_norm, spec.rms_norm_eps, work.x)
            gate_up_TN = project(work.x, layer.gate_up, "gate_up", index, work.gate_up)
            ops.silu_mul(gate_up_TN, work.hidden)
            delta_TH = project(work.hidden, layer.down, "down", index, work.delta)
        ops.add_rms_norm(work.residual, delta_TH, self._norm, spec.rms_norm_eps, work.x)

    def logits(self, hidden_SH: Tensor, slots: Sequence[int | None], lora: LoraSlots) -> Tensor:
        """[S, H] -> float32 [S, vocabulary]; `slots`: each row's adapter."""
        return logits(self.kernels, self._head, hidden_SH, slots, lora.heads(slots))

    def rows(self, layer: int | None, module: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop of a weight [outputs, inputs] as it is computed with, float32."""
        linear, offset, _ = self._place(layer, module)
        return self.kernels.rows(linear, offset + start, offset + stop)

    def bias(self, layer: int | None, module: str) -> Tensor | None:
        """[outputs] float32"""
        linear, offset, size = self._place(layer, module)
        return None if linear.bias is None else linear.bias[offset : offset + size].float()

    def pack(self, weight_NH: Tensor) -> Linear:
        return self.kernels.pack_linear(weight_NH, None)

    def _place(self, layer: int | None, module: str) -> tuple[Linear, int, int]:
        """The packed weight a module is in, its first output there, and how many it has."""
        if layer is None:
            linear = self._embedding if module == "embed_tokens" else self._head
            return linear, 0, linear.num_outputs
        for group, members in GROUPS.items():
            if module in members:
                sizes = [self.spec.linear_shape(member)[0] for member in members]
                index = members.index(module)
                return getattr(self._layers[layer], group), sum(sizes[:index]), sizes[index]
        raise KeyError(module)


def rope_tables(spec: ModelSpec, max_positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [P, D] of the rotary angles (Su et al. 2021), with linear or Llama-3 frequency scaling."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        wavelengths = 2 * math.pi / frequencies
        low = scaling.original_max_position / scaling.low_freq_factor
        high = scaling.original_max_position / scaling.high_freq_factor
        smooth = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        scaled = torch.where(wavelengths > low, frequencies / scaling.factor, frequencies)
        frequencies = torch.where((wavelengths <= low) & (wavelengths >= high), blended, scaled)
    angles_PD = torch.outer(torch.arange(max_positions).float(), frequencies)
    return angles_PD.cos().contiguous(), angles_PD.sin().contiguous()
