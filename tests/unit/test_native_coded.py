"""Values of few bits in the compiled core: the bits of ``Coded.decode`` in every form, and no more
memory than the codes take."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Block, Dense, LowRank, RowScale, Sparse, reference
from edge_lora.codebook import encode
from edge_lora.errors import NativeError
from edge_lora.forms import values_of

sys.path.insert(0, str(Path(__file__).parent))
from native_images import Packed, adapter_file, image_of

GROUPS = ["tensor", "row", 1, 3, 64, 1000]
SHAPE = (48, 70)


def plain_forms(shape, seed=1):
    rng = np.random.default_rng(seed)
    out_features, in_features = shape

    def normal(*size):
        return (rng.standard_normal(size) / 8).astype(np.float32)

    def some(limit):
        return np.sort(rng.choice(limit, max(1, limit // 5), replace=False)).astype(np.uint32)

    flat, rows, columns = some(out_features * in_features), some(out_features), some(in_features)
    return {
        "low rank": LowRank(normal(3, in_features), normal(3, out_features), 0.7),
        "sparse": Sparse(flat, normal(flat.size), -1.3),
        "rows": Block("row", rows, normal(rows.size, in_features), 0.1),
        "columns": Block("col", columns, normal(columns.size, out_features), 3.0),
        "dense": Dense(normal(*shape), 0.9),
        "dense set": Dense(normal(*shape), mode="set"),
        "row scale": RowScale(normal(out_features), 0.4),
        "column scale": RowScale(normal(in_features), -2.0, "col"),
    }


def coded(form, bits, group="tensor"):
    """Return the form with all its values in codes."""
    return replace(form, **{n: encode(v, bits, group) for n, v in values_of(form).items()})


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_form_decodes_to_the_bit(bits, group, tmp_path):
    slot = Packed(tmp_path, SHAPE, ("panels", "oi"))
    image = image_of(slot)
    for name, form in plain_forms(SHAPE).items():
        form = coded(form, bits, group)
        image.swap(image.compile([(adapter_file(tmp_path, {"w": [form]}, {"w": SHAPE}), 1.0)]))
        wanted = reference.apply(slot.weight, [(form, 1.0)])
        assert all(same_bits(w, wanted) for w in slot.weights()), name
    image.swap(None)
    assert image.differing_slots() == []


def test_coded_and_plain_forms_compose(tmp_path):
    slot = Packed(tmp_path, SHAPE)
    image, some = image_of(slot), plain_forms(SHAPE)
    first = [coded(some[n], 2) for n in ("low rank", "sparse", "row scale")]
    second = [coded(some["dense"], 4, 5), some["low rank"], coded(some["columns"], 1)]
    a = adapter_file(tmp_path, {"w": first}, {"w": SHAPE}, alpha=0.3, name="a")
    b = adapter_file(tmp_path, {"w": second}, {"w": SHAPE}, name="b")
    image.swap(image.compile([(a, 0.6), (b, -1.1)]))
    terms = [(form, 0.6 * 0.3) for form in first] + [(form, -1.1) for form in second]
    assert same_bits(image.merged("w"), reference.apply(slot.weight, terms))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_factors_for_an_unfused_run(bits, tmp_path):
    form = coded(plain_forms(SHAPE)["low rank"], bits, "row")
    a, b = adapter_file(tmp_path, {"w": [form]}, {"w": SHAPE}, alpha=0.5).low_rank("w")
    assert same_bits(np.ascontiguousarray(a.T), form.a.decode())
    assert same_bits(b, form.bt.decode() * np.float32(0.5 * 0.7))


def test_an_adapter_stays_as_small_as_its_codes(tmp_path):
    shape, rank = (512, 512), 16
    rng = np.random.default_rng(0)
    form = LowRank(*(rng.standard_normal((rank, 512)).astype(np.float32) for _ in range(2)))
    one_bit = adapter_file(tmp_path, {"w": [coded(form, 1)]}, {"w": shape})
    slot = Packed(tmp_path, shape)
    patch = image_of(slot).compile([(one_bit, 1.0)])
    codes = 2 * rank * 512 // 8
    assert patch.nbytes < codes + 1000
    assert one_bit.nbytes < codes + 4000


def test_codes_of_zero_change_nothing(tmp_path):
    slot = Packed(tmp_path, SHAPE)
    image, form = image_of(slot), plain_forms(SHAPE)["low rank"]
    zero = replace(form, a=encode(form.a, 1), bt=encode(np.zeros_like(form.bt), 1))
    patch = image.compile([(adapter_file(tmp_path, {"w": [zero]}, {"w": SHAPE}), 1.0)])
    assert patch.changed == 0


def all_coded():
    some = plain_forms(SHAPE)
    groups = iter(["tensor", "row", 7, "tensor", 64, 3, "row"])
    bits = iter([1, 2, 4, 8, 1, 2, 1])
    return [coded(f, next(bits), next(groups)) for n, f in some.items() if n != "dense set"]


def test_saved_patches_hold_codes(tmp_path):
    slot, path = Packed(tmp_path, SHAPE), tmp_path / "patch"
    image = image_of(slot)
    forms = all_coded()
    patch = image.compile([(adapter_file(tmp_path, {"w": forms}, {"w": SHAPE}), 1.0)])
    patch.save(str(path))
    again = image.load_patch(str(path))
    assert again.nbytes == patch.nbytes
    image.swap(again)
    assert same_bits(image.merged("w"), reference.apply(slot.weight, [(f, 1.0) for f in forms]))


def test_hostile_patch_files(tmp_path):
    """Whatever a few bytes say, with the digest mended: refused, or memory stays in bounds."""
    slot, path = Packed(tmp_path, SHAPE), tmp_path / "patch"
    image = image_of(slot)
    file = adapter_file(tmp_path, {"w": all_coded()}, {"w": SHAPE})
    image.compile([(file, 1.0)]).save(str(path))
    body, rng, refused = path.read_bytes()[:-64], np.random.default_rng(3), 0
    for _ in range(400):
        damaged = bytearray(body)
        at = int(rng.integers(0, len(body)))
        damaged[at : at + 8] = rng.choice([0, 1, 255, 2**31], 8).astype(np.uint8).tobytes()
        path.write_bytes(mended(bytes(damaged)))
        try:
            image.swap(image.load_patch(str(path)))
        except NativeError:
            refused += 1
        image.swap(None)
    assert 20 < refused < 400
    assert image.differing_slots() == []


def test_a_patch_file_with_a_factor_that_is_not_a_number_is_refused(tmp_path):
    slot, path = Packed(tmp_path, SHAPE), tmp_path / "patch"
    image = image_of(slot)
    a, bt = (np.full((1, n), 0.123, np.float32) for n in reversed(SHAPE))
    file = adapter_file(tmp_path, {"w": [LowRank(a, bt)]}, {"w": SHAPE})
    image.compile([(file, 1.0)]).save(str(path))
    body = path.read_bytes()[:-64]
    path.write_bytes(mended(body.replace(a[0, 0].tobytes(), np.float32("nan").tobytes(), 1)))
    with pytest.raises(NativeError):
        image.load_patch(str(path))


def mended(body):
    return body + hashlib.sha256(body).hexdigest().encode()
