"""Adapters in the form the kernels read, and the table of which slot holds what. Knows no files and no states.

The base's projections are fused, so an adapter's modules are slices of four fused outputs. Every adapter is one
contiguous slab at its true ranks: a rank-8 adapter costs rank-8 memory and work whatever else is resident.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.host_adapter import HostAdapter
from engine.kernels.reference import LoraGroup
from engine.spec import ModelSpec

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True, slots=True)
class DeviceAdapter:
    """A [rank, in] and B transposed, scaled [rank, out] of every adapted module, in the model's dtype."""

    slab: Tensor
    modules: dict[tuple[int, str], tuple[Tensor, Tensor]]
    groups: frozenset[str]
    """The fused projections it touches in any layer."""

    @property
    def num_bytes(self) -> int:
        return self.slab.numel() * self.slab.element_size()


def prepare_adapter(adapter: HostAdapter, dtype: torch.dtype) -> DeviceAdapter:
    """Copy a host adapter into one slab, with alpha/r folded into B (in float32, before rounding)."""
    size = sum(weights.a.numel() + weights.b.numel() for weights in adapter.modules.values())
    slab = torch.empty(size, dtype=dtype)
    modules: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    used = 0

    def place(values: Tensor) -> Tensor:
        nonlocal used
        view = slab[used : used + values.numel()].view(values.shape)
        used += values.numel()
        return view.copy_(values)

    for key, weights in adapter.modules.items():
        modules[key] = (place(weights.a), place(weights.b.float().T * weights.scaling))
    touched = {module for _, module in modules}
    groups = frozenset(group for group, members in GROUPS.items() if touched.intersection(members))
    return DeviceAdapter(slab, modules, groups)


class LoraSlots:
    """Which adapter is in which slot, as tables the kernels read; changed only between steps."""

    def __init__(self, spec: ModelSpec, slots: int) -> None:
        self._adapters: list[DeviceAdapter | None] = [None] * slots
        self._layers = spec.num_layers
        self._tables: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.groups: dict[str, list[LoraGroup]] = {}
        for name, members in GROUPS.items():
            sizes = [spec.linear_shape(member)[0] for member in members]
            shape = (spec.num_layers, slots, len(members))
            tables = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int32)
            self._tables[name] = tables
            offsets = torch.tensor(np.cumsum([0, *sizes[:-1]]), dtype=torch.int32)
            self.groups[name] = [
                LoraGroup(
                    offsets=offsets,
                    sizes=torch.tensor(sizes, dtype=torch.int32),
                    a_table=torch.from_numpy(tables[0][layer]),
                    b_table=torch.from_numpy(tables[1][layer]),
                    ranks=torch.from_numpy(tables[2][layer]),
                    weights=[[None] * len(members) for _ in range(slots)],
                )
                for layer in range(spec.num_layers)
            ]

    def install(self, slot: int, adapter: DeviceAdapter) -> None:
        """Make `slot` mean this adapter; it must be empty."""
        if self._adapters[slot] is not None:
            raise ValueError(f"slot {slot} is taken")
        self._adapters[slot] = adapter
        for (layer, module), (a, b) in adapter.modules.items():
            group, index = _PLACE[module]
            a_table, b_table, ranks = self._tables[group]
            a_table[layer, slot, index], b_table[layer, slot, index] = a.data_ptr(), b.data_ptr()
            ranks[layer, slot, index] = a.shape[0]
            self.groups[group][layer].weights[slot][index] = (a, b)

    def remove(self, slot: int) -> None:
        """Empty a slot; the adapter's memory is free once nobody else holds it."""
        self._adapters[slot] = None
        for name, members in GROUPS.items():
            for table in self._tables[name]:
                table[:, slot] = 0
            for group in self.groups[name]:
                group.weights[slot] = [None] * len(members)

    def active_groups(self, slots: frozenset[int]) -> frozenset[str]:
        """The fused projections that some adapter of the batch touches; the others cost nothing."""
        return frozenset().union(*(adapter.groups for slot in slots if (adapter := self._adapters[slot])))


_PLACE = {module: (group, index) for group, members in GROUPS.items() for index, module in enumerate(members)}
