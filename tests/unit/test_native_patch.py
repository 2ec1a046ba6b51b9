"""The compiled core against reference.py, to the bit: every form, dtype and layout."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edge_lora import Block, Dense, LowRank, Sparse, native, reference
from edge_lora.errors import AdapterMismatchError, NativeError, UnsupportedError
from edge_lora.index_codec import expand_lines

sys.path.insert(0, str(Path(__file__).parent))
from native_images import Packed, adapter_file, image_of

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
SHAPES = [(1, 1), (15, 5), (16, 64), (17, 65), (48, 300), (300, 17)]


def forms(shape, dtype, seed=1):
    """Return one form of every kind for a slot of ``shape``."""
    rng = np.random.default_rng(seed)
    out_features, in_features = shape

    def normal(*size):
        return (rng.standard_normal(size) / 8).astype(dtype)

    def some(limit):
        count = max(1, limit // 7)
        return np.sort(rng.choice(limit, count, replace=False)).astype(np.uint32)

    flat, rows, columns = some(out_features * in_features), some(out_features), some(in_features)
    found = {
        "low rank": LowRank(normal(3, in_features), normal(3, out_features), 0.7),
        "sparse": Sparse(flat, normal(flat.size), -1.3),
        "rows": Block("row", rows, normal(rows.size, in_features), 0.1),
        "columns": Block("col", columns, normal(columns.size, out_features), 3.0),
        "dense": Dense(normal(*shape), 0.9),
        "sparse set": Sparse(flat, normal(flat.size), mode="set"),
        "rows set": Block("row", rows, normal(rows.size, in_features), mode="set"),
        "columns set": Block("col", columns, normal(columns.size, out_features), mode="set"),
        "dense set": Dense(normal(*shape), mode="set"),
    }
    if out_features % 16 == 0:
        lines = some(out_features * in_features // 16)
        found["lines"] = Sparse(expand_lines(lines, in_features), normal(lines.size * 16))
    return found


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("stored", ["oi", "io"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_and_layout(dtype, shape, stored, tmp_path):
    slot = Packed(tmp_path, shape, ("panels", "shuffled", "oi", "io"), stored)
    image, before = image_of(slot), slot.blocks()
    for name, form in forms(shape, DTYPES[dtype]).items():
        file = adapter_file(tmp_path, {"w": [form]}, {"w": shape})
        patch = image.compile([(file, 1.0)])
        image.swap(patch)
        wanted = reference.apply(slot.weight, [(form, 1.0)])
        assert all(same_bits(w, wanted) for w in slot.weights()), name
        assert same_bits(image.merged("w"), wanted)
        if not isinstance(form, LowRank):
            assert patch.changed == (wanted != slot.weight).sum()
        image.swap(None)
        assert all(same_bits(a, b) for a, b in zip(slot.blocks(), before, strict=True)), name
    assert image.differing_slots() == []


def test_composition_is_the_reference_sum(tmp_path):
    shape = (32, 70)
    slot = Packed(tmp_path, shape, ("panels", "oi"))
    image = image_of(slot)
    one, two = forms(shape, np.float16, 1), forms(shape, np.float32, 2)
    cases = [
        ([one["sparse"]], [two["sparse"]]),  # overlapping entries
        ([one["sparse"], one["rows"]], [two["columns"], two["dense"]]),
        ([one["low rank"], one["sparse"]], [two["rows"], two["low rank"]]),
    ]
    for first, second in cases:
        a = adapter_file(tmp_path, {"w": first}, {"w": shape}, alpha=0.3, name="a")
        b = adapter_file(tmp_path, {"w": second}, {"w": shape}, alpha=-1.7, name="b")
        image.swap(image.compile([(a, 0.6), (b, 1.1)]))
        terms = [(form, 0.6 * 0.3) for form in first] + [(form, 1.1 * -1.7) for form in second]
        wanted = reference.apply(slot.weight, terms)
        assert all(same_bits(w, wanted) for w in slot.weights())
    image.swap(image.compile([(a, 0.0)]))
    np.testing.assert_array_equal(image.merged("w"), slot.weight)


def test_a_low_rank_delta_of_zero_changes_nothing(tmp_path):
    shape = (32, 70)
    slot = Packed(tmp_path, shape)
    image, some = image_of(slot), forms(shape, np.float32)
    a, b = some["low rank"].a, some["low rank"].bt

    def changed(these, weight=1.0):
        patch = image.compile([(adapter_file(tmp_path, {"w": these}, {"w": shape}), weight)])
        image.swap(patch)
        np.testing.assert_equal((image.merged("w") != slot.weight).any(), patch.changed > 0)
        return patch.changed

    no_b, no_a = LowRank(a, np.zeros_like(b)), LowRank(np.zeros_like(a), b)
    assert changed([no_b]) == changed([no_a]) == changed([no_b, no_a]) == 0
    assert changed([some["low rank"]], 0.0) == 0
    assert changed([no_b, some["low rank"]]) == changed([no_b, some["sparse"]]) == 32 * 70
    one = b * 0
    one[-1, -1] = 1
    assert changed([LowRank(a, one)]) == 32 * 70
    assert not image.damaged


def test_compiling_reads_the_base_whatever_is_in(tmp_path):
    shape = (32, 40)
    slot = Packed(tmp_path, shape)
    image, some = image_of(slot), forms(shape, np.float32)
    files = {
        n: adapter_file(tmp_path, {"w": [some[n]]}, {"w": shape}, name=n)
        for n in ("low rank", "sparse", "dense set")
    }
    for outer in files.values():
        image.swap(image.compile([(outer, 1.0)]))
        for name, file in files.items():
            image.swap(image.compile([(file, 1.0)]))
            assert same_bits(image.merged("w"), reference.apply(slot.weight, [(some[name], 1.0)]))
    image.poke("w", 3, 100.0)
    image.swap(image.compile([(files["low rank"], 1.0)]))
    assert same_bits(image.merged("w"), reference.apply(slot.weight, [(some["low rank"], 1.0)]))
    image.swap(None)
    assert image.differing_slots() == []


def test_lines_take_one_offset_for_sixteen_values(tmp_path):
    shape = (64, 100)
    slot = Packed(tmp_path, shape)
    image, found = image_of(slot), forms(shape, np.float32)
    size = {}
    for name in ("lines", "sparse"):
        file = adapter_file(tmp_path, {"w": [found[name]]}, {"w": shape})
        patch = image.compile([(file, 1.0)])
        size[name] = patch.nbytes / found[name].indices.size
    assert size["lines"] < 0.7 * size["sparse"]


def test_save_and_load(tmp_path):
    shape, path = (32, 70), str(tmp_path / "patch")
    slot = Packed(tmp_path, shape, ("panels", "io"))
    image = image_of(slot)
    some = forms(shape, ml_dtypes.bfloat16)
    all_added = [f for n, f in some.items() if "set" not in n]
    for these in ([some["low rank"]], [some["lines"]], [some["dense set"]], all_added):
        patch = image.compile([(adapter_file(tmp_path, {"w": these}, {"w": shape}), 1.0)])
        patch.save(path)
        again = image.load_patch(path)
        assert (again.changed, again.slots) == (patch.changed, ["w"])
        image.swap(again)
        assert same_bits(image.merged("w"), reference.apply(slot.weight, [(f, 1.0) for f in these]))
        with pytest.raises(UnsupportedError, match="before the swap"):
            again.save(path)
        image.swap(None)
    assert sorted(p.name for p in tmp_path.iterdir() if "part" in p.name) == []
    other = image_of(Packed(tmp_path, shape, ("panels",), name="v"))
    with pytest.raises(NativeError, match="another image"):
        other.load_patch(path)
    with pytest.raises(NativeError, match="another image"):
        other.swap(patch)


def test_damaged_patch_files(tmp_path):
    shape, path = (16, 20), tmp_path / "patch"
    image = image_of(Packed(tmp_path, shape))
    some = forms(shape, np.float32)
    these = [some["low rank"], some["rows"]]
    image.compile([(adapter_file(tmp_path, {"w": these}, {"w": shape}), 1.0)]).save(str(path))
    blob = path.read_bytes()
    damaged = [blob[:cut] for cut in (0, 1, 63, 64, 65, len(blob) // 2, len(blob) - 1)]
    damaged += [
        blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :] for at in range(0, len(blob), 97)
    ]
    for bad in [*damaged, blob + b"\0"]:
        path.write_bytes(bad)
        with pytest.raises(NativeError, match="damaged"):
            image.load_patch(str(path))


def test_refusals_list_everything_and_change_nothing(tmp_path):
    shape = (16, 20)
    slot = Packed(tmp_path, shape)
    image = image_of(slot)
    sha = image.sha256()
    some = forms(shape, np.float32)

    def file(form, slot_name="w", at=shape, alpha=1.0):
        return adapter_file(tmp_path, {slot_name: [form]}, {slot_name: at}, alpha)

    with pytest.raises(AdapterMismatchError, match="v: no such slot"):
        image.compile([(file(some["dense"], "v"), 1.0)])
    with pytest.raises(AdapterMismatchError, match="w: made for another shape"):
        image.compile([(file(forms((20, 16), np.float32)["dense"], at=(20, 16)), 1.0)])
    for weight, alpha in ((0.5, 1.0), (1.0, 2.0)):
        with pytest.raises(UnsupportedError, match="w: a form with mode 'set'"):
            image.compile([(file(some["dense set"], alpha=alpha), weight)])
    setting, adding = file(some["sparse set"]), file(some["low rank"])
    with pytest.raises(UnsupportedError, match=r"w: .*composed"):
        image.compile([(setting, 1.0), (adding, 1.0)])
    huge = np.full(shape, 3e38, np.float32)
    for form in (Dense(huge), LowRank(huge[:1], np.full((1, 16), 3e38, np.float32))):
        with pytest.raises(NativeError, match="w: base \\+ delta is not finite"):
            image.compile([(file(form), 2.0)])
    with pytest.raises(NativeError, match="not finite"):
        image.compile([(adding, float("nan"))])
    assert image.sha256() == sha
    assert image.active is None


def test_aliases_and_identity(tmp_path):
    slot = Packed(tmp_path, (16, 20))
    image = image_of(slot)
    image.add_alias("w", "tied")
    form = forms((16, 20), np.float32)["sparse"]
    patch = image.compile([(adapter_file(tmp_path, {"tied": [form]}, {"tied": (16, 20)}), 1.0)])
    assert patch.slots == ["w"]
    stats = image.swap(patch)
    assert image.active is patch
    assert stats.bytes == form.indices.size * 4
    assert image.swap(patch).bytes == 0  # it is in already
    del patch
    image.swap(None)
    assert image.active is None
    image.close()
    with pytest.raises(NativeError, match="closed"):
        image.swap(None)


def test_low_rank_for_an_unfused_run(tmp_path):
    shape = (24, 10)
    one, two = (forms(shape, dt, s)["low rank"] for dt, s in ((np.float16, 1), (np.float32, 2)))
    file = adapter_file(tmp_path, {"w": [one, two]}, {"w": shape}, alpha=0.5)
    a, b = file.low_rank("w")
    assert (a.shape, b.shape) == ((10, 6), (6, 24))
    wanted = sum(
        reference.delta_of(form, np.zeros(shape, np.float32), 0.5).astype(np.float64)
        for form in (one, two)
    )
    np.testing.assert_allclose((a.astype(np.float64) @ b).T, wanted, rtol=0, atol=1e-6)
    with pytest.raises(AdapterMismatchError, match="v"):
        file.low_rank("v")


def test_wrong_blocks_and_weights_are_refused(tmp_path):
    slot = Packed(tmp_path, (16, 20))
    layout, _, block = slot.places[0]
    image = native.Image(1)
    with pytest.raises(NativeError, match="no slot 'w'"):
        image.add_place("w", layout, block.ctypes.data, block.nbytes)
    image.add_slot("w", 20, 16, str(slot.path), 12, "io")
    block[7] += 1
    assert not image.add_place("w", layout, block.ctypes.data, block.nbytes)
    with pytest.raises(NativeError, match="cannot hold"):
        image.add_place("w", layout, block.ctypes.data, block.nbytes - 4)
    with pytest.raises(NativeError, match="different shapes"):
        image.add_place("w", native.Layout.plain(16, 20, "oi"), block.ctypes.data, block.nbytes)
    with pytest.raises(NativeError, match="'oi' or 'io'"):
        native.Layout.plain(16, 20, "ii")
    with pytest.raises(NativeError, match="threads"):
        native.Image(0)
