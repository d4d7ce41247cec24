"""The weighted sum of several adapters as one adapter. Knows no files and no slots.

A sum of low-rank deltas is a low-rank delta: the As stand on top of each other, the weighted Bs side by side, and the
ranks add up. It is exact (PEFT calls it `cat`), and the kernels see an adapter like any other.
"""

import hashlib
import json
from collections.abc import Sequence

import torch

from engine.host_adapter import MAX_RANK, AdapterError, HostAdapter, LoraWeights, VocabularyWeights


def merge_adapters(parts: Sequence[tuple[str, HostAdapter, float]]) -> HostAdapter:
    """The sum over (name, adapter, weight) of weight times what the adapter adds.

    Raises:
        AdapterError: A part is more than a sum of deltas, or the ranks add up to more than `MAX_RANK`.
    """
    if len(parts) == 1 and parts[0][2] == 1.0:
        return parts[0][1]
    for name, adapter, _ in parts:
        if not adapter.is_plain:
            raise AdapterError(
                f"{name} has DoRA, trained biases or replaced matrices, of which there is no weighted sum"
            )
    places = sorted({place for _, adapter, _ in parts for place in adapter.modules})
    modules = {
        place: _sum([(a.modules[place], weight) for _, a, weight in parts if place in a.modules])
        for place in places
    }
    embedding = _sum_of_ends([(a.embedding, weight) for _, a, weight in parts if a.embedding is not None])
    head = _sum_of_ends([(a.head, weight) for _, a, weight in parts if a.head is not None])
    canonical = json.dumps([[adapter.digest, weight] for _, adapter, weight in parts])
    loras = [*modules.values(), *(end.lora for end in (embedding, head) if end and end.lora)]
    tensors = [tensor for lora in loras for tensor in lora.tensors()]
    return HostAdapter(
        digest=hashlib.sha256(canonical.encode()).hexdigest(),
        modules=modules,
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        rank=max(lora.a.shape[0] for lora in loras),
        embedding=embedding,
        head=head,
    )


def _sum(terms: Sequence[tuple[LoraWeights, float]]) -> LoraWeights:
    """Scaling and weight go into B, in float32."""
    rank = sum(lora.a.shape[0] for lora, _ in terms)
    if rank > MAX_RANK:
        raise AdapterError(f"the ranks of the merged adapters add up to {rank}; the largest is {MAX_RANK}")
    a = torch.cat([lora.a.float() for lora, _ in terms])
    b = torch.cat([lora.b.float() * (lora.scaling * weight) for lora, weight in terms], dim=1)
    return LoraWeights(a, b, scaling=1.0)


def _sum_of_ends(terms: Sequence[tuple[VocabularyWeights, float]]) -> VocabularyWeights | None:
    loras = [(end.lora, weight) for end, weight in terms if end.lora is not None]
    if not loras:
        return None
    return VocabularyWeights(
        _sum(loras), base_lengths=tuple(each for end, _ in terms for each in end.base_lengths)
    )
