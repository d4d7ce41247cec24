"""KV blocks: nothing is lost, nothing is held twice, and equal prefixes are found."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.kv_blocks import BlockPool

SIZE = 4


def keys(pool: BlockPool, tokens: list[int], digest: str | None = None) -> list[bytes]:
    found: list[bytes] = []
    pool.extend_keys(found, (digest or "").encode(), tokens, len(tokens) // SIZE)
    return found


def test_a_prefix_is_found_after_its_owner_has_gone():
    pool = BlockPool(8, SIZE)
    chain = keys(pool, list(range(12)))
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, key in zip(blocks, chain, strict=True):
        pool.register(block, key)
    pool.release(blocks)
    assert pool.num_available == 8
    assert pool.match(keys(pool, [*range(8), 99, 99, 99, 99])) == blocks[:2]


def test_adapters_do_not_share_prefixes():
    pool = BlockPool(8, SIZE)
    tokens = list(range(8))
    assert set(keys(pool, tokens, "a")).isdisjoint(keys(pool, tokens, "b"))
    assert set(keys(pool, tokens, "a")).isdisjoint(keys(pool, tokens, None))


def test_a_key_covers_everything_before_its_block():
    pool = BlockPool(8, SIZE)
    first, second = keys(pool, [1, 2, 3, 4, 5, 6, 7, 8]), keys(pool, [9, 2, 3, 4, 5, 6, 7, 8])
    assert first[1] != second[1]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    pool = BlockPool(3, SIZE)
    chain = keys(pool, list(range(12)))
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, key in zip(blocks, chain, strict=True):
        pool.register(block, key)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match(chain) == blocks[:2]


def test_allocating_too_much_changes_nothing():
    pool = BlockPool(3, SIZE)
    assert pool.allocate(4) is None
    assert pool.num_available == 3


def test_without_caching_nothing_is_remembered():
    pool = BlockPool(3, SIZE, caching=False)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.register(blocks[0], b"key")
    assert pool.match([b"key"]) == []


def test_releasing_what_is_not_held_is_an_error():
    pool = BlockPool(3, SIZE)
    with pytest.raises(ValueError, match="released more often"):
        pool.release([0])


class Blocks(RuleBasedStateMachine):
    """Tables come and go; contents are modelled beside the pool."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12, SIZE)
        self.alive: dict[int, list[int]] = {}
        self.written: dict[int, tuple] = {}
        self.count = 0

    @rule(
        target=tables,
        digest=st.sampled_from([None, "a"]),
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    )
    def start(self, digest, tokens):
        chain = keys(self.pool, tokens, digest)
        cached = self.pool.match(chain)
        for index, block in enumerate(cached):
            assert self.written[block] == (digest, *tokens[: (index + 1) * SIZE]), "found the wrong content"
        self.pool.hold(cached)
        fresh = self.pool.allocate(self.pool.blocks_for(len(tokens)) - len(cached))
        if fresh is None:
            self.pool.release(cached)
            return None
        assert not any(block in table for block in fresh for table in self.alive.values()), (
            "written while shared"
        )
        self.count += 1
        table = self.alive[self.count] = cached + fresh
        for index in range(len(cached), len(chain)):
            self.written[table[index]] = (digest, *tokens[: (index + 1) * SIZE])
            self.pool.register(table[index], chain[index])
        return self.count

    @rule(table=consumes(tables))
    def finish(self, table):
        if table is not None:
            self.pool.release(self.alive.pop(table))

    @invariant()
    def books_agree(self):
        self.pool.check(list(self.alive.values()))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
