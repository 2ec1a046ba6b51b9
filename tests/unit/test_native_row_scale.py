"""Row scales and bottlenecks in the compiled core."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edge_lora import Bottleneck, LowRank, RowScale, Sparse, reference
from edge_lora.errors import NativeError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
from native_images import Packed, adapter_file, image_of

SHAPES = [(1, 1), (15, 5), (16, 64), (17, 65), (48, 300), (300, 17)]
PACKINGS = ("panels", "shuffled", "oi", "io")


def normal(*size, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal(size) / 4).astype(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def forms(shape, dtype=np.float32):
    out_features, in_features = shape
    return {
        "rows": RowScale(normal(out_features, dtype=dtype), 0.3),
        "columns": RowScale(normal(in_features, dtype=dtype), -1.7, "col"),
    }


@pytest.mark.parametrize("stored", ["oi", "io"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_alone(dtype, shape, stored, tmp_path):
    slot = Packed(tmp_path, shape, PACKINGS, stored)
    image, before = image_of(slot), slot.blocks()
    for form in forms(shape, dtype).values():
        patch = image.compile([(adapter_file(tmp_path, {"w": [form]}, {"w": shape}, 0.7), 1.1)])
        assert patch.changed == slot.weight.size
        image.swap(patch)
        wanted = reference.apply(slot.weight, [(form, 0.7 * 1.1)])
        assert all(same_bits(w, wanted) for w in slot.weights())
        image.swap(None)
        assert all(same_bits(a, b) for a, b in zip(slot.blocks(), before, strict=True))
    assert image.differing_slots() == []


def test_composed_with_all_else_whatever_is_in(tmp_path):
    shape = (48, 300)
    slot = Packed(tmp_path, shape, PACKINGS)
    image, scales = image_of(slot), forms(shape)
    low_rank = LowRank(normal(5, 300, seed=1), normal(5, 48, seed=2), 0.5)
    sparse = Sparse(np.arange(0, 14_400, 7, dtype=np.uint32), normal(2058, seed=3))
    dora, ia3 = [low_rank, scales["rows"]], [scales["columns"]]
    mixed = [scales["rows"], sparse, low_rank, scales["columns"]]
    files = {
        name: adapter_file(tmp_path, {"w": these}, {"w": shape}, name=name)
        for name, these in (("dora", dora), ("ia3", ia3), ("mixed", mixed))
    }
    for weights in ({"dora": 1.0}, {"dora": 0.3, "ia3": 1.2}, {"mixed": 1, "ia3": -1}, {"ia3": 1}):
        image.swap(image.compile([(files[name], w) for name, w in weights.items()]))
        these = {"dora": dora, "ia3": ia3, "mixed": mixed}
        terms = [(form, w) for name, w in weights.items() for form in these[name]]
        wanted = reference.apply(slot.weight, terms)
        assert all(same_bits(w, wanted) for w in slot.weights()), weights
    image.swap(None)
    assert image.differing_slots() == []


def test_zeros_change_nothing(tmp_path):
    shape = (16, 20)
    slot = Packed(tmp_path, shape)
    image = image_of(slot)

    def changed(form, weight=1.0):
        return image.compile(
            [(adapter_file(tmp_path, {"w": [form]}, {"w": shape}), weight)]
        ).changed

    assert changed(RowScale(np.zeros(16, np.float32))) == 0
    assert changed(RowScale(np.zeros(20, np.float32), axis="col")) == 0
    assert changed(RowScale(np.ones(16, np.float32)), weight=0.0) == 0
    assert changed(RowScale(np.eye(1, 16, dtype=np.float32)[0])) == slot.weight.size


def test_saved_and_loaded(tmp_path):
    shape, path = (48, 300), str(tmp_path / "patch")
    slot = Packed(tmp_path, shape)
    image = image_of(slot)
    for form in forms(shape, np.float16).values():
        image.compile([(adapter_file(tmp_path, {"w": [form]}, {"w": shape}), 1.0)]).save(path)
        image.swap(image.load_patch(path))
        assert same_bits(image.merged("w"), reference.apply(slot.weight, [(form, 1.0)]))


def test_what_is_not_finite_is_refused(tmp_path):
    shape = (16, 20)
    slot = Packed(tmp_path, shape)
    image = image_of(slot)
    for values, weight in ((3e38, 1.0), (3e38, 1e10), (1e30, 1e30)):
        form = RowScale(np.full(16, values, np.float32))
        file = adapter_file(tmp_path, {"w": [form]}, {"w": shape})
        with pytest.raises(NativeError, match="w: base \\+ delta is not finite"):
            image.compile([(file, weight)])
    huge = RowScale(np.full(16, 1e37, np.float32))  # near the limit: every value is computed
    image.compile([(adapter_file(tmp_path, {"w": [huge]}, {"w": shape}), 1.0)])


def test_an_unfused_run_has_other_forms(tmp_path):
    shape = (16, 20)
    low_rank = LowRank(normal(2, 20), normal(2, 16))
    file = adapter_file(tmp_path, {"w": [low_rank, RowScale(normal(16))]}, {"w": shape})
    assert file.low_rank("w") is None


def test_a_bottleneck_is_not_fused(tmp_path):
    site = Bottleneck(normal(3, 20), normal(16, 3), act="gelu", up_bias=normal(16))
    form = RowScale(normal(16))
    slot = Packed(tmp_path, (16, 20))
    image = image_of(slot)
    before = image.sha256()
    shapes = {"w": (16, 20), "mlp": (16, 20)}
    file = adapter_file(tmp_path, {"w": [form], "mlp": [site]}, shapes)
    with pytest.raises(UnsupportedError, match="mlp: a bottleneck runs unfused"):
        image.compile([(file, 1.0)])
    assert image.sha256() == before
    assert file.low_rank("mlp") is None
