"""What goes in comes out, and what was never written is refused or read consistently."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_lora.errors import AdapterFileError
from edge_lora.index_codec import expand_lines, lines_of, rice_decode, rice_encode

indices = st.sets(st.integers(0, 3999), max_size=300).map(
    lambda found: np.array(sorted(found), np.uint32)
)


@given(indices)
def test_round_trip(found):
    stream, k = rice_encode(found)
    np.testing.assert_array_equal(rice_decode(stream, found.size, k, 4000), found)


@given(indices, st.integers(0, 2**32 - 1))
def test_large_positions(found, offset):
    shifted = (found.astype(np.int64) + offset).clip(0, 2**32 - 1)
    shifted = np.unique(shifted).astype(np.uint32)
    stream, k = rice_encode(shifted)
    np.testing.assert_array_equal(rice_decode(stream, shifted.size, k, 2**32), shifted)


@given(st.sets(st.integers(0, 3 * 7 - 1), min_size=1))
def test_lines_round_trip(found):
    lines = np.array(sorted(found), np.uint32)
    expanded = expand_lines(lines, 7)
    assert (np.diff(expanded.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(lines_of(expanded, (48, 7)), lines)


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(-1, 40))
def test_any_bytes_are_refused_or_are_the_one_encoding_of_what_they_say(blob, count, k):
    stream = np.frombuffer(blob, np.uint8)
    try:
        found = rice_decode(stream, count, k, 5000)
    except AdapterFileError:
        return
    assert found.size == count
    assert (np.diff(found.astype(np.int64)) > 0).all()
    assert not found.size or found.max() < 5000
