"""Any adapter survives its file, and no damaged byte goes unnoticed."""

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_lora import Adapter, BaseIdentity, Block, Delta, Dense, LowRank, Sparse
from edge_lora.errors import EdgeLoraError

dtypes = st.sampled_from([np.dtype("f4"), np.dtype("f2"), np.dtype(ml_dtypes.bfloat16)])
scales = st.floats(-4, 4, width=32)


@st.composite
def values(draw, *shape):
    plain = draw(arrays.arrays(np.float32, shape, elements=st.floats(-8, 8, width=16)))
    return plain.astype(draw(dtypes))


def ascending(draw, limit):
    return np.array(sorted(draw(st.sets(st.integers(0, limit - 1), max_size=40))), np.uint32)


@st.composite
def forms(draw, out_features, in_features):
    kind, scale = draw(st.sampled_from(["low_rank", "sparse", "row", "col", "dense"])), draw(scales)
    if kind == "low_rank":
        rank = draw(st.integers(1, 3))
        return LowRank(draw(values(rank, in_features)), draw(values(rank, out_features)), scale)
    if kind == "sparse":
        indices = ascending(draw, out_features * in_features)
        return Sparse(indices, draw(values(indices.size)), scale)
    if kind == "dense":
        return Dense(draw(values(out_features, in_features)), scale)
    count, width = (out_features, in_features)[:: 1 if kind == "row" else -1]
    indices = ascending(draw, count)
    return Block(kind, indices, draw(values(indices.size, width)), scale)


@st.composite
def adapters(draw):
    deltas = {}
    for number in range(draw(st.integers(1, 3))):
        shape = (draw(st.sampled_from([1, 5, 16, 32])), draw(st.sampled_from([1, 3, 17])))
        found = draw(st.lists(forms(*shape), min_size=1, max_size=2))
        deltas[f"layers.{number}.weight"] = Delta(shape, "F32", tuple(found), "0123456789abcdef")
    base = BaseIdentity("ab" * 32, draw(st.text(max_size=5)))
    return Adapter(draw(st.text(max_size=5)), "any", base, deltas, alpha=draw(scales))


@given(adapters())
def test_file_to_adapter_to_file_is_byte_identical(adapter):
    with tempfile.TemporaryDirectory() as folder:
        first = adapter.save(Path(folder) / "a.safetensors")
        loaded = Adapter.load(first)
        second = loaded.save(Path(folder) / "b.safetensors")
        assert loaded.content_hash == adapter.content_hash
        assert first.read_bytes() == second.read_bytes()


@given(adapters(), st.data())
def test_a_damaged_tensor_byte_never_loads(adapter, data):
    """A damaged header may still be a sound one; damaged tensors never load."""
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.save(Path(folder) / "a.safetensors")
        blob = bytearray(path.read_bytes())
        tensors_start = 8 + int.from_bytes(blob[:8], "little")
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(blob)
        tensors_start = 8 + int.from_bytes(
            adapter.save(path.with_name("b")).read_bytes()[:8], "little"
        )
        try:
            Adapter.load(path)
        except EdgeLoraError:
            return
        assert at < tensors_start
