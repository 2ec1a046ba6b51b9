"""An adapter of nested ranks in the compiled core, at each of them: what ``LowRank.at_rank`` is."""

import sys
from pathlib import Path

import numpy as np
import pytest

from edge_lora import LowRank, Sparse, native, reference
from edge_lora.codebook import encode
from edge_lora.errors import UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
from native_images import Packed, adapter_file, image_of

SHAPE = (48, 70)
RANKS, SCALES = (1, 3, 8), (0.9, 0.5, 0.25)


def nested(ranks=RANKS, scales=SCALES, rank=8, bits=None, group="tensor", seed=0):
    rng = np.random.default_rng(seed)
    a, bt = (rng.standard_normal((rank, n)).astype(np.float32) for n in SHAPE[::-1])
    if bits is not None:
        a, bt = encode(a, bits, group), encode(bt, bits, group)
    return LowRank(a, bt, 0.7, ranks, scales)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


VALUES = [None, (1, "tensor"), (1, "row"), (2, 9), (4, 100), (8, "row")]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("values", VALUES, ids=str)
def test_a_view_is_the_adapter_cut_to_that_rank(rank, values, tmp_path):
    bits, group = values or (None, "tensor")
    form = nested(bits=bits, group=group)
    cut = form.at_rank(rank)
    slot = Packed(tmp_path, SHAPE)
    image = image_of(slot)
    whole = adapter_file(tmp_path, {"w": [form]}, {"w": SHAPE}, alpha=0.6)
    view = whole.at_rank(rank)
    image.swap(image.compile([(view, 1.5)]))
    assert same_bits(image.merged("w"), reference.apply(slot.weight, [(cut, 1.5 * 0.6)]))
    wanted = adapter_file(tmp_path, {"w": [cut]}, {"w": SHAPE}, alpha=0.6, name="cut")
    for got, want in zip(view.low_rank("w"), wanted.low_rank("w"), strict=True):
        assert same_bits(got, want)
    image.swap(image.compile([(whole, 1.0)]))
    assert same_bits(image.merged("w"), reference.apply(slot.weight, [(form, 0.6)]))


def test_a_patch_of_a_view_is_as_small_as_the_view_and_can_be_saved(tmp_path):
    slot, form, path = Packed(tmp_path, SHAPE), nested(bits=1, group="row"), str(tmp_path / "patch")
    image = image_of(slot)
    whole = adapter_file(tmp_path, {"w": [form]}, {"w": SHAPE})
    small = image.compile([(whole.at_rank(1), 1.0)])
    assert small.nbytes < image.compile([(whole, 1.0)]).nbytes
    small.save(path)
    image.swap(image.load_patch(path))
    assert same_bits(image.merged("w"), reference.apply(slot.weight, [(form.at_rank(1), 1.0)]))


def test_a_view_outlives_its_adapter_and_leaves_other_forms_alone(tmp_path):
    form = nested()
    few = Sparse(np.array([5, 9], np.uint32), np.ones(2, np.float32))
    slot = Packed(tmp_path, SHAPE)
    image = image_of(slot)
    view = adapter_file(tmp_path, {"w": [few, form]}, {"w": SHAPE}).at_rank(3).at_rank(3)
    image.swap(image.compile([(view, 1.0)]))
    terms = [(few, 1.0), (form.at_rank(3), 1.0)]
    assert same_bits(image.merged("w"), reference.apply(slot.weight, terms))


@pytest.mark.parametrize("rank", [0, 2, 4, 9, 2**32 - 1])
def test_other_ranks_are_refused_with_the_known_ones(rank, tmp_path):
    file = adapter_file(tmp_path, {"w": [nested()]}, {"w": SHAPE})
    with pytest.raises(UnsupportedError, match=f"rank {rank} is not among .*: 1, 3, 8"):
        file.at_rank(rank)
    with pytest.raises(UnsupportedError, match=r"is not among .*: 1, 3, 8"):
        nested().at_rank(rank)


def test_known_ranks_are_those_of_every_form(tmp_path):
    def ranks_of(*forms):
        file = adapter_file(tmp_path, {"w": list(forms)}, {"w": SHAPE})
        with pytest.raises(UnsupportedError) as caught:
            file.at_rank(77)
        return str(caught.value).split(": ")[-1]

    plain = nested((), ())
    assert ranks_of(plain) == "8"
    assert ranks_of(nested(), plain) == "8"
    assert ranks_of(nested(), nested((1, 2, 3, 4), (1, 1, 1, 1), rank=4)) == "1, 3"
    assert "none in common" in ranks_of(plain, nested((), (), rank=4))
    few = Sparse(np.array([5], np.uint32), np.ones(1, np.float32))
    assert "none in common" in ranks_of(few)


def test_a_rank_is_a_whole_number(tmp_path):
    file = adapter_file(tmp_path, {"w": [nested()]}, {"w": SHAPE})
    assert isinstance(file.at_rank(8), native.AdapterFile)
    for odd in (-1, 1.5, "1", 2**32):
        with pytest.raises(TypeError):
            file.at_rank(odd)
