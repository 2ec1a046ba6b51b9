"""Patches of bytes, written and read back."""

import numpy as np
import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.byte_patch import BytePatch, Piece

PATCH = BytePatch(
    (
        Piece("a.weight", 0, np.array([1, 5, 9], np.uint32), np.array([7, 8, 255], np.uint8)),
        Piece("a.weight", 1, None, np.array([3, 4], np.uint8)),
    ),
    changed=4,
    rounding_error=0.125,
)


def test_a_patch_reads_back_as_it_was_written(tmp_path):
    path = str(tmp_path / "patch")
    PATCH.save(path)
    found = BytePatch.load(path)
    assert (found.changed, found.rounding_error) == (4, 0.125)
    for piece, expected in zip(found.pieces, PATCH.pieces, strict=True):
        assert (piece.slot, piece.block) == (expected.slot, expected.block)
        np.testing.assert_equal(piece.offsets, expected.offsets)
        np.testing.assert_array_equal(piece.new, expected.new)
    assert found.nbytes == PATCH.nbytes == 3 * 5 + 2


@pytest.mark.parametrize(("changed", "nbytes"), [(0, 0), (19, 19 * 5), (21, 100), (100, 100)])
def test_a_piece_takes_no_more_than_its_block(changed, nbytes):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, 100, np.uint8)
    packed = base.copy()
    packed[rng.choice(100, changed, replace=False)] += 1
    piece = Piece.between("a.weight", 0, base, packed)
    assert BytePatch((piece,), changed, 0.0).nbytes == nbytes
    found = base.copy()
    found[piece.where] = piece.new
    np.testing.assert_array_equal(found, packed)
    assert piece.fits(base)
    assert not changed or not piece.fits(base[:1])


def test_an_empty_patch_reads_back(tmp_path):
    path = str(tmp_path / "patch")
    BytePatch((), 0, 0.0).save(path)
    assert BytePatch.load(path).pieces == ()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "patch"
    PATCH.save(str(path))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-1], "flip": data, "empty": b""}[damage])
    with pytest.raises(UnsupportedError, match="is damaged"):
        BytePatch.load(str(path))
