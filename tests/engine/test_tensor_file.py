"""A safetensors file as views: what safetensors reads, or the reason why not."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from engine.tensor_file import TensorFileError, view_tensors


def file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=6,
    )
)
def test_it_reads_what_safetensors_reads(kinds):
    tensors = {f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    data = save(tensors, {"format": "pt"})
    ours, theirs = view_tensors(data), load(data)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value)


def test_tensors_at_odd_places_are_read():
    data = file(
        {"a": tensor("U8", [1], [0, 1]), "b": tensor("F32", [1], [1, 5])}, b"\x07" + struct.pack("<f", 1.5)
    )
    assert view_tensors(data)["b"].tolist() == [1.5]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "longer than the file"),
        (b"\xff" * 100, "longer than the file"),
        (file(b"\xff"), "cannot be read"),
        (file(b"[" * 100_000), "cannot be read"),
        (file([]), "cannot be read"),
        (file({"a": {"dtype": "F32"}}), "cannot be read"),
        (file({"a": tensor("F31")}, b"0000"), "F31"),
        (file({"a": tensor()}), "4 bytes|describes"),
        (file({"a": tensor()}, b"00000000"), "of which the header describes"),
        (file({"a": tensor(shape=[2])}, b"0000"), "4 bytes for"),
        (file({"a": tensor(shape=[-1, -1])}, b"0000"), "4 bytes for"),
        (file({"a": tensor(shape=[0, 2**63], offsets=[0, 0])}), "0 bytes for"),
        (file({"a": tensor(), "b": tensor()}, b"0000"), "does not begin where"),
        (file({"a": tensor(offsets=[4, 8])}, b"00000000"), "does not begin where"),
        (file({"a": tensor(offsets=[0, -4])}, b"0000"), "does not begin where"),
    ],
)
def test_what_is_no_whole_file_is_refused_with_the_reason(data, reason):
    with pytest.raises(TensorFileError, match=reason):
        view_tensors(data)


@given(st.binary(max_size=40), st.integers(0, 200))
def test_damage_anywhere_never_ends_in_another_error(junk, at):
    data = bytearray(save({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}))
    data[at : at + len(junk)] = junk
    try:
        view_tensors(bytes(data))
    except TensorFileError as error:
        assert str(error)
