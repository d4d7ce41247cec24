"""Every native kernel against its torch twin, on ugly shapes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.kernels import CompileError
from engine.kernels.native import NativeKernels
from engine.kernels.reference import BLOCK, LoraEntry, LoraGroup, ReferenceKernels
from engine.lora import LoraSlots
from engine.model import Decoder
from tests.engine.tiny import write_tiny_model

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]
ANY_DTYPE = st.sampled_from(DTYPES)
ANY_WIDTH = st.one_of(st.integers(1, 100), st.sampled_from([128, 257, 576, 2100]))
ugly = settings(max_examples=80, deadline=None, derandomize=True)


def native(dtype: torch.dtype) -> NativeKernels:
    try:
        return NativeKernels(dtype)
    except CompileError as error:
        pytest.skip(f"no native kernels: {error}")


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def make_batch(
    lengths: list[tuple[int, int]], blocks: int, segments: list[tuple[int, int, int]] | None = None
) -> Batch:
    """Sequences given as (tokens before this step, tokens of this step), with shuffled pages."""
    order = torch.randperm(blocks).tolist()
    positions, slots, starts, tables = [], [], [0], []
    for before, new in lengths:
        table = [order.pop() for _ in range(-(-(before + new) // BLOCK))]
        tables.append(table)
        for position in range(before, before + new):
            positions.append(position)
            slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
        starts.append(starts[-1] + new)
    width = max(map(len, tables))
    segment_GX = torch.tensor(segments or [], dtype=torch.int32).view(-1, 3)
    return Batch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        kv_slots=torch.tensor(slots, dtype=torch.int32),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context=torch.tensor([before + new for before, new in lengths], dtype=torch.int32),
        tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
        max_context=max(before + new for before, new in lengths),
        segment_slot=segment_GX[:, 0].contiguous(),
        segment_start=segment_GX[:, 1].contiguous(),
        segment_end=segment_GX[:, 2].contiguous(),
        slots=frozenset(segment_GX[:, 0].tolist()),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 64, 7), (2, 48, 33), (3, 576, 960), (5, 30, 64), (4, 33, 40), (31, 64, 96)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_and_embedding_of_a_packed_weight(dtype, rows, inputs, outputs, biased):
    torch.manual_seed(rows)
    ours, twin = native(dtype), ReferenceKernels()
    weight, x = torch.randn(outputs, inputs).to(dtype) / inputs**0.5, torch.randn(rows, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    packed, plain = ours.pack_linear(weight, bias), twin.pack_linear(weight, bias)
    close(ours.linear(x, packed), twin.linear(x, plain), dtype)
    close(ours.logits(x, packed), twin.logits(x, plain), dtype)
    ids = torch.randint(outputs, (4,))
    assert torch.equal(ours.embed(ids, packed), twin.embed(ids, plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [128, 65])
def test_a_row_of_a_product_does_not_depend_on_the_batch(dtype, inputs):
    ours = native(dtype)
    x, packed = torch.randn(40, inputs).to(dtype), ours.pack_linear(torch.randn(96, inputs).to(dtype), None)
    whole = ours.linear(x, packed)
    for rows in (1, 2, 3, 5, 13, 27):
        assert torch.equal(ours.linear(x[:rows].contiguous(), packed), whole[:rows])
        assert torch.equal(ours.linear(x[-rows:].contiguous(), packed), whole[-rows:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 65), (20, 576)])
def test_norm_and_activation(dtype, rows, width):
    ours, twin = native(dtype), ReferenceKernels()
    residual, delta, weight = torch.randn(rows, width), torch.randn(rows, width).to(dtype), torch.rand(width)
    for change in (None, delta):
        mine, his = residual.clone(), residual.clone()
        found = ours.add_rms_norm(mine, change, weight, 1e-5, torch.empty(rows, width, dtype=dtype))
        expected = twin.add_rms_norm(his, change, weight, 1e-5, torch.empty(rows, width, dtype=dtype))
        close(found, expected, dtype)
        torch.testing.assert_close(mine, his)
        found, expected = (
            kernels.add_layer_norm(
                residual + 3, change, weight, weight / 2, 1e-5, torch.empty(rows, width, dtype=dtype)
            )
            for kernels in (ours, twin)
        )
        close(found, expected, dtype)
    gate_up = (torch.randn(rows, 2 * width) * 8).to(dtype)
    for name in ("silu_mul", "gelu_mul", "gelu"):
        close(getattr(ours, name)(gate_up), getattr(twin, name)(gate_up), dtype)
    mine, his = delta.clone(), delta.clone()
    ours.add(mine, gate_up[:, :width].contiguous())
    twin.add(his, gate_up[:, :width].contiguous())
    close(mine, his, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "count", "dim"), [(0, 1, 7), (0, 3, 16), (2, 4, 80), (1, 1, 257)])
def test_norms_of_heads_leave_the_rest_of_a_row(dtype, first, count, dim):
    ours, twin = native(dtype), ReferenceKernels()
    x = torch.randn(5, (first + count + 1) * dim).to(dtype)
    mine, his, weight = x.clone(), x.clone(), torch.rand(dim)
    ours.rms_norm(mine, first, count, weight, 1e-6)
    twin.rms_norm(his, first, count, weight, 1e-6)
    close(mine, his, dtype)
    assert torch.equal(mine[:, : first * dim], x[:, : first * dim])
    assert torch.equal(mine[:, -dim:], x[:, -dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary"),
    [
        (9, 3, 64, 64),
        (4, 4, 16, 16),
        (8, 1, 32, 32),
        (6, 2, 128, 128),
        (14, 2, 48, 48),
        (2, 2, 8, 8),
        (4, 4, 80, 32),
        (2, 1, 256, 256),
        (2, 2, 24, 6),
    ],
)
@pytest.mark.parametrize(
    ("window", "scale", "softcap"), [(None, None, None), (5, 0.3, 2.0), (40, None, 50.0)]
)
def test_rope_pages_and_attention_of_a_mixed_batch(
    dtype, heads, kv_heads, dim, rotary, window, scale, softcap
):
    torch.manual_seed(heads)
    ours, twin = native(dtype), ReferenceKernels()
    lengths = [(0, 1), (37, 1), (15, 1), (0, 29), (16, 17), (50, 3)]
    batch = make_batch(lengths, 40)
    angles = torch.rand(128, rotary // 2)
    shape = (40, kv_heads, dim, BLOCK), (40, kv_heads, BLOCK, dim)
    k, v = torch.randn(shape[0]).to(dtype), torch.randn(shape[1]).to(dtype)
    qkv = torch.randn(len(batch.positions), (heads + 2 * kv_heads) * dim).to(dtype)
    results = []
    for kernels in (ours, twin):
        mine, k_cache, v_cache = qkv.clone(), k.clone(), v.clone()
        kernels.rope_store(mine, batch, angles.cos(), angles.sin(), k_cache, v_cache, heads)
        attended = kernels.attention(
            mine, batch, k_cache, v_cache, heads, window, scale=scale, softcap=softcap
        )
        results.append((k_cache, v_cache, attended))
    for found, expected in zip(*results, strict=True):
        close(found, expected, dtype)


def lora_group(dtype, ranks: list[list[int]], sizes: list[int], inputs: int, tuned=()) -> LoraGroup:
    """Random adapters; those of the (slot, slice) in `tuned` have a scale and a bias too."""
    shape = len(ranks), len(sizes)
    entries, tables = [], [torch.zeros(shape, dtype=torch.int64) for _ in range(3)]
    for slot, row in enumerate(ranks):
        entries.append([])
        for index, (rank, size) in enumerate(zip(row, sizes, strict=True)):
            entry = LoraEntry(
                (torch.randn(rank, inputs) / 8).to(dtype) if rank else None,
                (torch.randn(rank, size) / 8).to(dtype) if rank else None,
                torch.randn(2, size) if (slot, index) in tuned else None,
            )
            for table, tensor in zip(tables, (entry.a, entry.b, entry.affine), strict=True):
                table[slot, index] = 0 if tensor is None else tensor.data_ptr()
            entries[-1].append(entry if entry.tensors() else None)
    return LoraGroup(
        offsets=torch.tensor([0, *sizes[:-1]], dtype=torch.int32),
        sizes=torch.tensor(sizes, dtype=torch.int32),
        a_table=tables[0],
        b_table=tables[1],
        affine_table=tables[2],
        ranks=torch.tensor(ranks, dtype=torch.int32),
        entries=entries,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tuned", [(), ((0, 0), (1, 1), (3, 0), (3, 1))], ids=["plain", "scaled"])
def test_lora_of_mixed_ranks_slices_and_rows_without_adapter(dtype, tuned):
    torch.manual_seed(0)
    ours, twin = native(dtype), ReferenceKernels()
    inputs, sizes = 72, [80, 33]
    group = lora_group(dtype, [[1, 8], [64, 0], [0, 3], [5, 256]], sizes, inputs, tuned)
    segments = [(0, 1, 2), (3, 2, 9), (1, 9, 50), (2, 52, 55)]
    batch = make_batch([(0, 56)], 8, segments)
    x, y = torch.randn(56, inputs).to(dtype), torch.randn(56, sum(sizes)).to(dtype)
    mine, his = y.clone(), y.clone()
    ours.lora(x, mine, batch, group)
    twin.lora(x, his, batch, group)
    close(mine, his, dtype)
    untouched = torch.ones(56, dtype=torch.bool)
    for _, start, end in segments:
        untouched[start:end] = False
    assert torch.equal(mine[untouched], y[untouched])
    assert not torch.equal(mine[~untouched], y[~untouched])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_of_one_and_a_bias_of_zero_change_no_bit(dtype):
    torch.manual_seed(0)
    ours, batch = native(dtype), make_batch([(0, 9)], 8, [(0, 0, 9)])
    plain = lora_group(dtype, [[7]], [97], 40)
    neutral = torch.stack([torch.ones(97), torch.zeros(97)])
    scaled = replace(plain, affine_table=torch.tensor([[neutral.data_ptr()]]))
    x, y = torch.randn(9, 40).to(dtype), torch.randn(9, 97).to(dtype)
    mine, same = y.clone(), y.clone()
    ours.lora(x, mine, batch, plain)
    ours.lora(x, same, batch, scaled)
    assert torch.equal(mine, same) and not torch.equal(mine, y)


def test_a_recorded_step_repeats_for_another_batch_of_as_many_rows():
    torch.manual_seed(0)
    ours, heads, dim = native(torch.float32), 2, 16
    linear = ours.pack_linear(torch.randn(4 * dim, 8), None)
    cosine, sine = torch.rand(64, dim // 2), torch.rand(64, dim // 2)
    x, qkv, attended = torch.randn(3, 8), torch.empty(3, 4 * dim), torch.empty(3, heads * dim)
    k, v = torch.zeros(9, 1, dim, BLOCK), torch.zeros(9, 1, BLOCK, dim)

    def compute(batch: Batch) -> None:
        ours.linear(x, linear, qkv)
        ours.rope_store(qkv, batch, cosine, sine, k, v, heads)
        ours.attention(qkv, batch, k, v, heads, None, attended)

    batches = [make_batch(lengths, 9) for lengths in ([(0, 1), (20, 2)], [(40, 3)], [(3, 1)] * 3)]
    replay = ours.record(compute, batches[0])
    for batch in batches:
        x.normal_()
        compute(batch)
        expected = attended.clone()
        attended.zero_()
        replay(batch)
        assert torch.equal(attended, expected)


def test_a_recorded_step_writes_to_the_pages_it_is_given(tmp_path):
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "model", "llama"))
    model, lora = Decoder(checkpoint, torch.float32, native(torch.float32), 64), LoraSlots(checkpoint.spec, 1)
    batch = make_batch([(0, 20)], 4)
    pages = []
    for _ in range(2):
        kv_cache = model.new_kv_cache(4)
        for layer in kv_cache:
            for tensor in layer:
                tensor.zero_()
        model.forward(batch, kv_cache, lora)
        pages.append(torch.stack([keys for keys, _ in kv_cache]))
    assert pages[0].any()
    assert torch.equal(pages[0], pages[1])


@ugly
@given(ANY_DTYPE, st.integers(0, 40), ANY_WIDTH, ANY_WIDTH, st.booleans(), st.data())
def test_rows_of_any_product_depend_on_themselves_alone(dtype, rows, inputs, outputs, biased, data):
    torch.manual_seed(0)
    ours, twin = native(dtype), ReferenceKernels()
    weight, x = torch.randn(outputs, inputs).to(dtype) / inputs**0.5, torch.randn(rows, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    packed = ours.pack_linear(weight, bias)
    found = ours.linear(x, packed)
    close(found, twin.linear(x, twin.pack_linear(weight, bias)), dtype)
    if rows:
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))
        assert torch.equal(ours.linear(x[start:stop].clone(), packed), found[start:stop])


@ugly
@given(
    ANY_DTYPE,
    st.lists(st.tuples(st.integers(0, 80), st.integers(1, 40)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 4, 6, 7, 13]),
    st.sampled_from([16, 48, 64, 80, 256]),
    st.sampled_from([None, 1, 2, 15, 16, 17, 50]),
    st.data(),
)
def test_attention_sees_no_page_it_should_not_and_rows_depend_on_themselves_alone(
    dtype, lengths, kv_heads, group, dim, window, data
):
    torch.manual_seed(0)
    ours, twin, heads = native(dtype), ReferenceKernels(), kv_heads * group
    blocks = sum(-(-(before + new) // BLOCK) for before, new in lengths)
    batch = make_batch(lengths, blocks)
    # What no sequence wrote is not a number.
    k_cache = torch.full((blocks, kv_heads, dim, BLOCK), torch.nan, dtype=dtype)
    v_cache = torch.full((blocks, kv_heads, BLOCK, dim), torch.nan, dtype=dtype)
    for table, context in zip(batch.tables.long(), batch.context.tolist(), strict=True):
        position = torch.arange(context)
        k_cache[table[position // BLOCK], :, :, position % BLOCK] = torch.randn(context, kv_heads, dim).to(
            dtype
        )
        v_cache[table[position // BLOCK], :, position % BLOCK] = torch.randn(context, kv_heads, dim).to(dtype)
    qkv = torch.randn(len(batch.positions), (heads + 2 * kv_heads) * dim).to(dtype)
    found = ours.attention(qkv, batch, k_cache, v_cache, heads, window)
    close(found, twin.attention(qkv, batch, k_cache, v_cache, heads, window), dtype)
    index = data.draw(st.integers(0, len(lengths) - 1))
    starts = batch.query_start.tolist()
    start = data.draw(st.integers(starts[index], starts[index + 1] - 1))
    stop = data.draw(st.integers(start + 1, starts[index + 1]))
    context = batch.positions.tolist()[stop - 1] + 1
    part = replace(
        batch,
        positions=batch.positions[start:stop],
        kv_slots=batch.kv_slots[start:stop],
        query_start=torch.tensor([0, stop - start], dtype=torch.int32),
        context=torch.tensor([context], dtype=torch.int32),
        tables=batch.tables[index : index + 1].clone(),
        max_context=context,
    )
    alone = ours.attention(qkv[start:stop].clone(), part, k_cache, v_cache, heads, window)
    assert torch.equal(alone, found[start:stop])


@ugly
@given(
    ANY_DTYPE,
    ANY_WIDTH,
    st.tuples(ANY_WIDTH, ANY_WIDTH),
    st.lists(st.tuples(*[st.sampled_from([0, 1, 3, 4, 5, 8, 33, 64, 1024])] * 2), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=4),
    st.booleans(),
    st.data(),
)
def test_rows_with_any_adapter_depend_on_themselves_alone(dtype, inputs, sizes, ranks, runs, tuned, data):
    torch.manual_seed(0)
    ours, twin = native(dtype), ReferenceKernels()
    group = lora_group(dtype, [list(row) for row in ranks], list(sizes), inputs, [(0, 1)] if tuned else ())
    segments, row = [], 1
    for slot, count in runs:
        segments.append((slot % len(ranks), row, row + count))
        row += count + slot % 2
    batch = make_batch([(0, row)], -(-row // BLOCK), segments)
    x, y = torch.randn(row, inputs).to(dtype) / inputs**0.5, torch.randn(row, sum(sizes)).to(dtype)
    mine, his = y.clone(), y.clone()
    ours.lora(x, mine, batch, group)
    twin.lora(x, his, batch, group)
    close(mine, his, dtype)
    for slot, first, end in segments:
        if first < end:
            start = data.draw(st.integers(first, end - 1))
            stop = data.draw(st.integers(start + 1, end))
            count = stop - start
            alone = y[start:stop].clone()
            part = make_batch([(0, count)], -(-count // BLOCK), [(slot, 0, count)])
            ours.lora(x[start:stop].clone(), alone, part, group)
            assert torch.equal(alone, mine[start:stop])
