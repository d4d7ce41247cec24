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
from engine.checkpoint import Checkpoint, CheckpointError
from engine.kernels.reference import BLOCK, Linear, ReferenceKernels
from engine.lora import LoraSlots
from engine.quant import QuantisedWeight, Quantization, QuantizationError, quantise, stack
from engine.spec import ModelSpec
from engine.vocabulary import embed, logits

RECORDED_ROWS = 64
"""Steps of up to so many rows are recorded once and repeated: where few rows are computed, calling each kernel from
Python takes a good part of the time."""

KvCache = list[tuple[Tensor, Tensor]]
"""Per layer: keys [blocks, kv heads, head, BLOCK] and values [blocks, kv heads, BLOCK, head]."""


@dataclass(frozen=True, slots=True)
class Norm:
    """float32 [H]"""

    weight: Tensor
    bias: Tensor | None = None
    """Of a LayerNorm; an RMSNorm has none."""


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    norms: dict[str, Norm]
    """As `Family.layer_norms` names them."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None
    cosine: Tensor
    sine: Tensor


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
    beside: Tensor
    """[T, H] the same of a block that is computed in parallel."""
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
            beside=torch.empty(rows, spec.hidden_size if spec.family.parallel_blocks else 0, dtype=dtype),
            gate_up=torch.empty(rows, (1 + spec.gated) * spec.intermediate_size, dtype=dtype),
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
        quantization: Quantization = "none",
    ) -> None:
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.kernels = kernels
        checkpoint.served_as(quantization)
        # What a quantised checkpoint keeps in full is meant to be.
        self._quantization: Quantization = "none" if checkpoint.quantization != "none" else quantization
        everywhere = rope_tables(self.spec, max_positions)
        local = everywhere
        if self.spec.local_rope_theta is not None:
            local = rope_tables(self.spec, max_positions, self.spec.local_rope_theta)
        self._layers: list[Layer] = []
        for index in range(self.spec.num_layers):
            tables = everywhere if self.spec.windows[index] is None else local
            self._layers.append(self._load_layer(checkpoint, index, *tables))
            checkpoint.release()  # or the file would be in memory beside its packed form
            progress(index + 1, self.spec.num_layers)
        self._workspace = Workspace.allocate(self.spec, 0, dtype)
        self._recorded: dict[tuple[int, frozenset[str]], Callable[[Batch], None]] = {}
        self._recorded_for: tuple[KvCache, LoraSlots] | None = None
        """Whose addresses the recorded steps hold; kept, so that none is given to another tensor."""
        # As the model does: rounded to the dtype it computes in.
        self._embedding_scale = torch.tensor(self.spec.embedding_scale, dtype=dtype).item()
        self._norm = self._load_norm(checkpoint, self.spec.family.final_norm)
        # QLoRA leaves the head as it is; in a small model it is a fifth of what a token reads.
        head_form = "int8" if self._quantization == "int8" else "none"
        tied, bias = self.spec.tie_word_embeddings, None
        embedding = self._load_weight(checkpoint, "model.embed_tokens.weight", head_form if tied else "none")
        self._embedding = self._head = kernels.pack_linear(embedding, None)
        checkpoint.release()
        if not tied:
            if self.spec.family.biased:
                bias = checkpoint.tensor("lm_head.bias", dtype)
            self._head = kernels.pack_linear(self._load_weight(checkpoint, "lm_head.weight", head_form), bias)
        checkpoint.release()

    def _load_layer(self, checkpoint: Checkpoint, index: int, cosine: Tensor, sine: Tensor) -> Layer:
        prefix, spec = f"model.layers.{index}", self.spec

        def fused(group: str) -> Linear:
            members = spec.family.groups[group]
            names = [f"{prefix}.{spec.family.modules[member]}.{member}" for member in members]
            weights = [self._load_weight(checkpoint, f"{name}.weight", self._quantization) for name in names]
            bias_N = None
            if spec.has_bias(members[0]):
                bias_N = torch.cat([checkpoint.tensor(f"{name}.bias", self.dtype) for name in names])
            return self.kernels.pack_linear(stack(weights, self.dtype), bias_N)

        def head_norm(name: str) -> Tensor | None:
            return (
                self._load_norm(checkpoint, f"{prefix}.self_attn.{name}").weight
                if spec.family.qk_norm
                else None
            )

        return Layer(
            qkv=fused("qkv"),
            o=fused("o"),
            gate_up=fused("gate_up"),
            down=fused("down"),
            norms={
                use: self._load_norm(checkpoint, f"{prefix}.{name}")
                for use, name in spec.family.layer_norms.items()
            },
            q_norm=head_norm("q_norm"),
            k_norm=head_norm("k_norm"),
            window=spec.windows[index],
            cosine=cosine,
            sine=sine,
        )

    def _load_weight(
        self, checkpoint: Checkpoint, name: str, quantization: Quantization
    ) -> Tensor | QuantisedWeight:
        """[outputs, inputs] as the checkpoint stores it, if that is quantised, or quantised now."""
        stored = checkpoint.quantised(name)
        if stored is not None:
            return stored
        try:
            return quantise(checkpoint.tensor(name, self.dtype), quantization)
        except QuantizationError as error:
            raise CheckpointError(f"{checkpoint.root}: {name}: {error}") from error

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that a token is multiplied by, and of the embedding."""
        linears = [
            linear for layer in self._layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
        ]
        linears.append(self._embedding)
        if self._head is not self._embedding:
            linears.append(self._head)
        return sum(linear.nbytes for linear in linears)

    def _load_norm(self, checkpoint: Checkpoint, name: str) -> Norm:
        weight = checkpoint.tensor(f"{name}.weight", torch.float32) + self.spec.family.norm_offset
        if not self.spec.family.layer_norm:
            return Norm(weight)
        return Norm(weight, checkpoint.tensor(f"{name}.bias", torch.float32).clone())

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
        if self._embedding_scale != 1:
            work.residual.mul_(self._embedding_scale)
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
        ops, spec, eps = self.kernels, self.spec, self.spec.norm_eps
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        if spec.gated:
            activate = ops.silu_mul if spec.activation == "silu" else ops.gelu_mul
        else:
            activate = ops.gelu
        delta_TH: Tensor | None = None

        def project(x: Tensor, linear: Linear, group: str, index: int, out: Tensor) -> Tensor:
            ops.linear(x, linear, out)
            if group in adapted:
                ops.lora(x, out, batch, lora.groups[group][index])
            return out

        def add_norm(norm: Norm) -> None:
            if norm.bias is None:
                ops.add_rms_norm(work.residual, delta_TH, norm.weight, eps, work.x)
            else:
                ops.add_layer_norm(work.residual, delta_TH, norm.weight, norm.bias, eps, work.x)

        for index, layer in enumerate(self._layers):
            k_cache, v_cache = kv_cache[index]
            add_norm(layer.norms["input"])
            qkv_TN = project(work.x, layer.qkv, "qkv", index, work.qkv)
            if layer.q_norm is not None and layer.k_norm is not None:
                ops.rms_norm(qkv_TN, 0, heads, layer.q_norm, eps)
                ops.rms_norm(qkv_TN, heads, kv_heads, layer.k_norm, eps)
            ops.rope_store(qkv_TN, batch, layer.cosine, layer.sine, k_cache, v_cache, heads)
            ops.attention(
                qkv_TN,
                batch,
                k_cache,
                v_cache,
                heads,
                layer.window,
                work.attended,
                scale=spec.attention_scale,
                softcap=spec.attention_softcap,
            )
            delta_TH = project(work.attended, layer.o, "o", index, work.delta)
            if spec.family.parallel_blocks:
                attended_TH, out_TH = delta_TH, work.beside
            else:
                if "attended" in layer.norms:
                    ops.rms_norm(delta_TH, 0, 1, layer.norms["attended"].weight, eps)
                add_norm(layer.norms["mlp"])
                attended_TH, out_TH = None, work.delta
            hidden_TN = activate(project(work.x, layer.gate_up, "gate_up", index, work.gate_up), work.hidden)
            delta_TH = project(hidden_TN, layer.down, "down", index, out_TH)
            if "delta" in layer.norms:
                ops.rms_norm(delta_TH, 0, 1, layer.norms["delta"].weight, eps)
            if attended_TH is not None:
                ops.add(delta_TH, attended_TH)
        add_norm(self._norm)

    def logits(self, hidden_SH: Tensor, slots: Sequence[int | None], lora: LoraSlots) -> Tensor:
        """[S, H] -> float32 [S, vocabulary]; `slots`: each row's adapter."""
        logits_SV = logits(self.kernels, self._head, hidden_SH, slots, lora.heads(slots))
        cap = self.spec.logits_softcap
        return logits_SV if cap is None else torch.tanh(logits_SV / cap) * cap

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
        for group, members in self.spec.family.groups.items():
            if module in members:
                sizes = [self.spec.linear_shape(member)[0] for member in members]
                index = members.index(module)
                return getattr(self._layers[layer], group), sum(sizes[:index]), sizes[index]
        raise KeyError(module)


def rope_tables(
    spec: ModelSpec, max_positions: int, local_theta: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [P, D] of the rotary angles (Su et al. 2021), with linear or Llama-3 frequency scaling.

    With a `local_theta` those of layers that have a base of their own, and no scaling.
    """
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequencies = 1.0 / (local_theta or spec.rope_theta) ** exponents
    scaling = None if local_theta else spec.rope_scaling
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
