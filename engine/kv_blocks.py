"""KV blocks: who holds which page, and which pages can be reused for the same prefix. Pure bookkeeping, no tensors.

A block is free, held (by one or more tables), or idle: held by nobody but still carrying a known prefix. Idle blocks
are reused for their prefix, or evicted, least recently used first, when no free one is left.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf


class BlockPool:
    """Reference-counted blocks with a prefix cache; block ids are 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = caching
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free or idle."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks to write to, each held once; None (and nothing changed) if there are not so many."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def match(self, keys: SequenceOf[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain of keys. Takes no hold of them."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def hold(self, blocks: SequenceOf[int]) -> None:
        """One more table uses these matched blocks."""
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)

    def release(self, blocks: SequenceOf[int]) -> None:
        """One table less uses these blocks. The end of a prefix is forgotten before its beginning."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is released more often than held")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def register(self, block: int, key: bytes) -> None:
        """Remember what a held, full, computed block contains. The first block with a key keeps it."""
        if self._caching and key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def extend_keys(self, keys: list[bytes], root: bytes, token_ids: SequenceOf[int], full: int) -> None:
        """Append to `keys` until it holds one for each of the first `full` blocks of the tokens.

        A key is a hash of the root (which adapter, whose cache) and every token up to the block's end, so equal keys
        mean equal KV.
        """
        while len(keys) < full:
            start = len(keys) * self.block_size
            parent = keys[-1] if keys else root
            tokens = array("q", token_ids[start : start + self.block_size]).tobytes()
            keys.append(hashlib.blake2b(parent + b"|" + tokens, digest_size=16).digest())

    def check(self, tables: SequenceOf[SequenceOf[int]]) -> None:
        """Raise `ValueError` unless the books agree with the tables that are alive (for tests)."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        if counts != self._references:
            raise ValueError("reference counts differ from the tables")
        unheld = {block for block, count in enumerate(counts) if count == 0}
        if set(self._free) | set(self._idle) != unheld or set(self._free) & set(self._idle):
            raise ValueError("free and idle blocks are not the unheld ones")
        if len(self._free) != len(set(self._free)):
            raise ValueError("a block is free twice")
        if {key: block for block, key in self._key_of.items()} != self._block_of:
            raise ValueError("the prefix cache disagrees with itself")
