"""Layouts: probed, saved, and what is no layout."""

import sys
from pathlib import Path

import numpy as np
import pytest

from edge_lora import native
from edge_lora.errors import NativeError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent))
from native_images import PACKINGS, address_of


def probed(packing, in_features, out_features, stored="io"):
    offsets, elements = PACKINGS[packing](in_features, out_features)
    values = native.Layout.probe_values(in_features, out_features, stored)
    block = np.zeros(elements, np.float32)
    block[offsets] = values if stored == "io" else values.T
    return native.Layout.from_probe(address_of(block), block.nbytes, in_features, out_features)


@pytest.mark.parametrize("stored", ["io", "oi"])
@pytest.mark.parametrize(
    ("packing", "line"), [("panels", 16), ("shuffled", 8), ("oi", 1), ("io", 40)]
)
def test_probe(packing, line, stored):
    layout = probed(packing, 300, 40, stored)
    assert layout.line == line
    assert layout.elements == PACKINGS[packing](300, 40)[1]
    again = native.Layout.from_bytes(layout.to_bytes())
    assert again.to_bytes() == layout.to_bytes()
    if packing in ("oi", "io"):
        assert native.Layout.plain(300, 40, packing).to_bytes() == layout.to_bytes()


def test_probe_values_are_normal_and_distinct():
    values = native.Layout.probe_values(50, 30, "oi")
    assert values.shape == (30, 50)
    assert np.unique(values).size == 1500
    assert (values >= np.finfo(np.float32).tiny).all()
    assert np.isfinite(values).all()


def test_what_an_engine_changed_is_unsupported():
    values = native.Layout.probe_values(20, 10, "io")
    for block in (
        values * 1.5,
        values.astype(np.float16).astype(np.float32),
        np.zeros_like(values),
    ):
        with pytest.raises(UnsupportedError, match="packed layout"):
            native.Layout.from_probe(address_of(block), block.nbytes, 20, 10)
    rng = np.random.default_rng(0)
    scrambled = rng.permutation(native.Layout.probe_values(200, 100, "io").reshape(-1))
    with pytest.raises(UnsupportedError, match="irregular"):
        native.Layout.from_probe(address_of(scrambled), scrambled.nbytes, 200, 100)


def test_damaged_bytes():
    blob = probed("panels", 20, 24).to_bytes()
    for bad in (b"", blob[:-1], blob + b"\0", b"\0" + blob[1:]):
        with pytest.raises(NativeError, match="damaged"):
            native.Layout.from_bytes(bad)
    for at in range(len(blob)):
        try:
            native.Layout.from_bytes(blob[:at] + bytes([blob[at] ^ 4]) + blob[at + 1 :])
        except NativeError:
            continue  # or it is another sound layout
