"""The Triton LoRA kernels against their torch twin, under Triton's interpreter, on ugly shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.reference import LoraGroup, ReferenceKernels
from tests.engine.test_kernels import lora_group, make_batch

triton_lora = pytest.importorskip("engine.kernels.triton_lora", reason="needs triton")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
DTYPES = [torch.float32, torch.float16]
Segments = list[tuple[int, int, int]]


def routed(segments: Segments, num_blocks: int | None = None):
    slots, rows = triton_lora.route(segments, num_blocks)
    return triton_lora.LoraRoute(torch.from_numpy(slots), torch.from_numpy(rows))


def check(
    dtype: torch.dtype,
    group: LoraGroup,
    segments: Segments,
    rows: int,
    inputs: int,
    num_blocks=None,
    split=None,
) -> None:
    x = torch.randn(rows, inputs).to(dtype)
    y = torch.randn(rows, int(group.sizes.sum())).to(dtype)
    found, expected = y.clone(), y.clone()
    max_rank = max(1, int(group.ranks.max()))
    triton_lora.lora(x, found, routed(segments, num_blocks), group, max_rank, split)
    ReferenceKernels().lora(x, expected, make_batch([(0, rows)], 8, segments), group)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    base = torch.ones(rows, dtype=torch.bool)
    for _, start, end in segments:
        base[start:end] = False
    assert torch.equal(found[base], y[base])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tuned", [(), ((0, 0), (1, 1), (3, 0), (3, 1))], ids=["plain", "scaled"])
def test_mixed_ranks_slices_and_rows_without_adapter(dtype, tuned):
    torch.manual_seed(0)
    group = lora_group(dtype, [[1, 8], [64, 0], [0, 3], [5, 70]], [200, 33], 300, tuned)
    segments = [(0, 1, 2), (3, 2, 9), (1, 9, 40), (3, 42, 44), (2, 44, 45)]
    check(dtype, group, segments, 46, 300, split=2)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=4),
    st.lists(st.sampled_from([0, 1, 3, 8, 17, 40]), min_size=8, max_size=8),
    st.integers(1, 600),
    st.sampled_from([(1, 5), (128, 129), (40, 260)]),
)
def test_any_segments_ranks_and_widths(runs, ranks, inputs, sizes):
    segments, row = [], 1
    for slot, rows in runs:
        segments.append((slot, row, row + rows))
        row += rows
    group = lora_group(torch.float32, [ranks[2 * i : 2 * i + 2] for i in range(4)], list(sizes), inputs)
    check(torch.float32, group, segments, row, inputs)


def test_blocks_without_rows_change_nothing():
    group = lora_group(torch.float32, [[4], [2]], [20], 64)
    check(torch.float32, group, [(1, 0, 3)], 3, 64, num_blocks=triton_lora.most_blocks(3, 2))


def test_the_same_step_gives_the_same_bits_and_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    group = lora_group(torch.float32, [[9], [30]], [70], 512)
    x, y = torch.randn(20, 512), torch.randn(20, 70)
    whole, again, alone = y.clone(), y.clone(), y.clone()
    for out in (whole, again):
        triton_lora.lora(x, out, routed([(0, 0, 4), (1, 4, 20)]), group, 30, 2)
    triton_lora.lora(x, alone, routed([(0, 2, 3)]), group, 30, 2)
    assert torch.equal(whole, again)
    assert torch.equal(whole[2], alone[2])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), max_size=8))
def test_every_row_is_in_one_block_of_its_slot(runs):
    segments, expected, row = [], {}, 0
    for slot, rows in runs:
        segments.append((slot, row, row + rows))
        expected.update(dict.fromkeys(range(row, row + rows), slot))
        row += rows
    slots, rows = triton_lora.route(segments, triton_lora.most_blocks(row, 5))
    found = [
        (int(each), int(slot)) for slot, own in zip(slots, rows, strict=True) for each in own if each >= 0
    ]
    assert dict(found) == expected and len(found) == len(expected)


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="2 blocks do not fit into 1"):
        triton_lora.route([(0, 0, 17)], 1)
