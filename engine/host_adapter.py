"""An adapter in host memory, checked and ready to be prepared. Knows no files, no slots."""

from dataclasses import dataclass, field

from torch import Tensor

MAX_RANK = 1024
"""Of one adapted matrix; as in kernels/cpu.c."""


class AdapterError(Exception):
    """The adapter cannot be used; the message names the file and the cause, and is fit for the caller."""


class AdapterNotFoundError(AdapterError):
    """There is no adapter at this address."""


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapted matrix W [outputs, inputs]: y += scaling * (B A x + bias); for an embedding, x is one-hot.

    With a magnitude (DoRA, Liu et al. 2024) the matrix is W + scaling * B A with every row brought to that length
    (for an embedding every column, its outputs).
    """

    a: Tensor
    """[rank, inputs], in the dtype it was stored in."""
    b: Tensor
    """[outputs, rank]"""
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; not folded into the weights."""
    magnitude: Tensor | None = None
    """[outputs]"""
    bias: Tensor | None = None
    """[outputs], B's own."""

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.a, self.b, self.magnitude, self.bias) if tensor is not None]


@dataclass(frozen=True, slots=True)
class VocabularyWeights:
    """What an adapter does to the token embedding or to the head: LoRA, or another matrix in its place."""

    lora: LoraWeights | None = None
    matrix: Tensor | None = None
    """[vocabulary, hidden]"""
    bias: Tensor | None = None
    """[vocabulary] in place of the head's."""
    base_lengths: tuple[Tensor, ...] = ()
    """[vocabulary] lengths of the rows of the base's matrix, as the adapter was saved with it, if it was."""

    def tensors(self) -> list[Tensor]:
        own = [tensor for tensor in (self.matrix, self.bias, *self.base_lengths) if tensor is not None]
        return own + (self.lora.tensors() if self.lora else [])


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """A checked adapter."""

    digest: str
    """sha256 over scalings and weights: the same digest gives the same tokens."""
    modules: dict[tuple[int, str], LoraWeights]
    """By (layer, projection), e.g. (0, "q_proj")."""
    num_bytes: int
    rank: int
    """The largest of its modules' ranks."""
    biases: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """In place of the base's, by (layer, projection): [outputs]."""
    embedding: VocabularyWeights | None = None
    head: VocabularyWeights | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but low-rank deltas, which can be added to one another."""
        loras = [*self.modules.values(), *(end.lora for end in self.ends if end.lora is not None)]
        return (
            not self.biases
            and all(weights.magnitude is None and weights.bias is None for weights in loras)
            and all(end.matrix is None and end.bias is None for end in self.ends)
        )

    def device_bytes(self, item_bytes: int) -> int:
        """Bytes in device form, for weights of `item_bytes` a number (scales and biases are float32)."""
        loras = [*self.modules.values(), *(end.lora for end in self.ends if end.lora is not None)]
        tuned = [
            weights.b.shape[0]
            for weights in loras
            if weights.magnitude is not None or weights.bias is not None
        ]
        tuned += [
            len(bias)
            for bias in (*self.biases.values(), *(end.bias for end in self.ends))
            if bias is not None
        ]
        numbers = sum(weights.a.numel() + weights.b.numel() for weights in loras)
        numbers += sum(end.matrix.numel() for end in self.ends if end.matrix is not None)
        return numbers * item_bytes + sum(tuned) * 8

    @property
    def ends(self) -> list[VocabularyWeights]:
        return [end for end in (self.embedding, self.head) if end is not None]
