"""The tables of which slot holds which adapter, as the kernels read them. Knows no files and no states.

The base's projections are fused, so an adapter's modules are slices of four fused outputs. Every adapter is one
contiguous slab at its true ranks: a rank-8 adapter costs rank-8 memory and work whatever else is resident.
"""

from collections.abc import Collection

import numpy as np
import torch

from engine.device_adapter import DeviceAdapter, DeviceVocabulary
from engine.kernels.reference import LoraGroup
from engine.spec import ModelSpec


class LoraSlots:
    """Which adapter is in which slot, as tables the kernels read; changed only between steps."""

    def __init__(self, spec: ModelSpec, slots: int) -> None:
        self._adapters: list[DeviceAdapter | None] = [None] * slots
        self._members = spec.family.groups
        self._place = {
            module: (group, index)
            for group, members in spec.family.groups.items()
            for index, module in enumerate(members)
        }
        self._tables: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        self._touched: list[frozenset[str]] = [frozenset()] * slots
        self.groups: dict[str, list[LoraGroup]] = {}
        for name, members in spec.family.groups.items():
            sizes = [spec.linear_shape(member)[0] for member in members]
            shape = (spec.num_layers, slots, len(members))
            a, b, affine, ranks = (np.zeros(shape, kind) for kind in (np.int64, np.int64, np.int64, np.int32))
            self._tables[name] = a, b, affine, ranks
            offsets = torch.tensor(np.cumsum([0, *sizes[:-1]]), dtype=torch.int32)
            self.groups[name] = [
                LoraGroup(
                    offsets=offsets,
                    sizes=torch.tensor(sizes, dtype=torch.int32),
                    a_table=torch.from_numpy(a[layer]),
                    b_table=torch.from_numpy(b[layer]),
                    affine_table=torch.from_numpy(affine[layer]),
                    ranks=torch.from_numpy(ranks[layer]),
                    entries=[[None] * len(members) for _ in range(slots)],
                )
                for layer in range(spec.num_layers)
            ]

    def install(self, slot: int, adapter: DeviceAdapter) -> None:
        """Make `slot` mean this adapter; it must be empty."""
        if self._adapters[slot] is not None:
            raise ValueError(f"slot {slot} is taken")
        self._adapters[slot] = adapter
        self._touched[slot] = frozenset(self._place[module][0] for _, module in adapter.modules)
        for (layer, module), entry in adapter.modules.items():
            group, index = self._place[module]
            a_table, b_table, affine_table, ranks = self._tables[group]
            if entry.a is not None and entry.b is not None:
                a_table[layer, slot, index], b_table[layer, slot, index] = (
                    entry.a.data_ptr(),
                    entry.b.data_ptr(),
                )
                ranks[layer, slot, index] = entry.a.shape[0]
            if entry.affine is not None:
                affine_table[layer, slot, index] = entry.affine.data_ptr()
            self.groups[group][layer].entries[slot][index] = entry

    def remove(self, slot: int) -> None:
        """Empty a slot; the adapter's memory is free once nobody else holds it."""
        self._adapters[slot], self._touched[slot] = None, frozenset()
        for name, members in self._members.items():
            for table in self._tables[name]:
                table[:, slot] = 0
            for group in self.groups[name]:
                group.entries[slot] = [None] * len(members)

    def active_groups(self, slots: Collection[int]) -> frozenset[str]:
        """The fused projections that some adapter of the batch touches; the others cost nothing."""
        return frozenset().union(*(self._touched[slot] for slot in slots))

    def embeddings(self, slots: Collection[int | None]) -> dict[int, DeviceVocabulary]:
        """By slot, the adapters of the batch that change the embedding."""
        return {slot: adapter.embedding for slot, adapter in self._held(slots).items() if adapter.embedding}

    def heads(self, slots: Collection[int | None]) -> dict[int, DeviceVocabulary]:
        """By slot, the adapters of the batch that change the head."""
        return {slot: adapter.head for slot, adapter in self._held(slots).items() if adapter.head}

    def _held(self, slots: Collection[int | None]) -> dict[int, DeviceAdapter]:
        return {slot: held for slot in slots if slot is not None and (held := self._adapters[slot])}
