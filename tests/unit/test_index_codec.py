import numpy as np
import pytest

from edge_lora.errors import AdapterFileError
from edge_lora.index_codec import expand_lines, lines_of, rice_decode, rice_encode


def decode_by_hand(stream, count, k):
    """The format of the module's docstring, one bit at a time."""
    bits = [(byte >> i) & 1 for byte in stream.tolist() for i in range(8)]
    remainders = [sum(bits[j * k + i] << i for i in range(k)) for j in range(count)]
    at, indices, last = (count * k + 7) // 8 * 8, [], -1
    for remainder in remainders:
        quotient = 0
        while not bits[at]:
            quotient, at = quotient + 1, at + 1
        at += 1
        last += (quotient << k) + remainder + 1
        indices.append(last)
    return indices


@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 1.0])
def test_the_stream_is_what_the_docstring_says(density):
    rng = np.random.default_rng(7)
    indices = np.flatnonzero(rng.random(5000) < density).astype(np.uint32)
    stream, k = rice_encode(indices)
    assert decode_by_hand(stream, indices.size, k) == indices.tolist()
    np.testing.assert_array_equal(rice_decode(stream, indices.size, k, 5000), indices)


def test_one_percent_takes_about_one_byte_an_index():
    indices = np.flatnonzero(np.random.default_rng(1).random(1 << 20) < 0.01).astype(np.uint32)
    assert rice_encode(indices)[0].size / indices.size < 1.03


def test_empty():
    stream, k = rice_encode(np.zeros(0, np.uint32))
    assert rice_decode(stream, 0, k, 10).size == 0


STREAM, K = rice_encode(np.array([3, 700, 701, 999], np.uint32))


@pytest.mark.parametrize(
    ("stream", "count", "k", "limit", "fact"),
    [
        (STREAM[:-1], 4, K, 1000, "index stream"),
        (np.append(STREAM, np.uint8(0)), 4, K, 1000, "trailing bytes"),
        (STREAM, 5, K, 1000, "index stream"),
        (STREAM, 3, K, 1000, "index stream"),
        (STREAM, 4, K, 999, "out of range"),
        (STREAM, 4, 99, 1000, "cannot hold"),
        (STREAM, 4, -1, 1000, "cannot hold"),
        (STREAM, 1 << 40, K, 1000, "cannot hold"),
    ],
)
def test_a_damaged_stream_is_refused(stream, count, k, limit, fact):
    with pytest.raises(AdapterFileError, match=fact):
        rice_decode(stream, count, k, limit)


def test_a_set_padding_bit_is_refused():
    stream, k = rice_encode(np.array([5], np.uint32))
    used = k % 8
    assert used
    damaged = stream.copy()
    damaged[0] |= 0x80
    with pytest.raises(AdapterFileError, match="padding"):
        rice_decode(damaged, 1, k, 100)


def test_whole_lines_are_found_and_expanded():
    lines = np.array([0, 4, 9], np.uint32)  # on the (2, 5) grid of a (32, 5) slot
    mask = np.zeros((32, 5), bool)
    mask[0:16, 0] = mask[0:16, 4] = mask[16:32, 4] = True
    indices = np.flatnonzero(mask).astype(np.uint32)
    np.testing.assert_array_equal(expand_lines(lines, 5), indices)
    np.testing.assert_array_equal(lines_of(indices, (32, 5)), lines)


def test_what_is_not_lines_is_not_taken_for_lines():
    whole = expand_lines(np.array([3], np.uint32), 5)
    moved = np.sort(np.append(whole[:-1], 1)).astype(np.uint32)
    assert lines_of(moved, (32, 5)) is None
    assert lines_of(whole[:-1], (32, 5)) is None
    assert lines_of(whole, (30, 5)) is None
