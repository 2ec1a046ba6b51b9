import re

import numpy as np
import pytest

from edge_lora import codebook
from edge_lora.codebook import Coded, encode, levels_of, pack, problems_of, unpack
from edge_lora.errors import UnknownNameError, UnsupportedError

PUBLISHED = {  # upper half of the symmetric book, to six digits
    1: [0.67449],
    2: [0.377754, 1.265720],
    4: [0.105550, 0.319036, 0.540072, 0.775192, 1.034006, 1.333107, 1.707738, 2.265491],
}
ERRORS = {  # bits -> (mean absolute error, mean squared error) of N(0, 1); book by book
    "gauss_l1": {1: (0.4732, 0.3786), 2: (0.2659, 0.1292), 4: (0.0745, 0.0118)},
    "lloyd_max": {1: (0.4826, 0.3635), 2: (0.2756, 0.1177), 4: (0.0785, 0.0095)},
}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_levels_are_the_published_ones(bits):
    levels = levels_of("gauss_l1", bits)
    np.testing.assert_allclose(levels[2 ** (bits - 1) :], PUBLISHED[bits], atol=1e-6)
    np.testing.assert_array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("book", ERRORS)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_errors_on_a_normal_distribution(book, bits):
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    error = encode(values, bits, book=book).decode() - values
    absolute, squared = ERRORS[book][bits]
    assert np.abs(error).mean() == pytest.approx(absolute, abs=2e-3)
    assert (error**2).mean() == pytest.approx(squared, abs=2e-3)


def test_eight_bits_reach_the_asymptotic_optimum():
    """Panter and Dite 1951: the least squared error of many levels is sqrt(3) pi / 2 / levels^2."""
    values = np.random.default_rng(1).standard_normal(1_000_000).astype(np.float32)
    error = encode(values, 8, book="lloyd_max").decode() - values
    assert (error.astype(np.float64) ** 2).mean() == pytest.approx(2.7207 / 256**2, rel=0.05)


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 3, 3)])
@pytest.mark.parametrize("group", ["tensor", "row", 4])
def test_decoding_is_the_level_times_spread_plus_mean_of_the_nearest_code(bits, shape, group):
    values = (np.random.default_rng(bits).standard_normal(shape) * 3 + 1).astype(np.float32)
    coded = encode(values, bits, group)
    assert problems_of(coded, "val") == []
    assert (coded.bits, coded.shape, coded.decode().shape) == (bits, shape, shape)
    size = codebook.group_size(group, shape)
    for i, (value, got) in enumerate(zip(values.flat, coded.decode().flat, strict=True)):
        mean, spread = coded.stats[i // size]
        candidates = coded.book * spread + mean
        assert got in candidates
        assert abs(got - value) <= np.abs(candidates - value).min() + 1e-4


def test_codes_lie_low_bits_first_and_the_last_byte_is_padded_with_zeros():
    codes = np.array([1, 0, 1, 1, 0, 0, 0, 1, 1], np.uint8)
    assert pack(codes, 1).tolist() == [0b10001101, 0b1]
    for bits in codebook.BITS:
        codes = np.random.default_rng(0).integers(0, 2**bits, 13).astype(np.uint8)
        np.testing.assert_array_equal(unpack(pack(codes, bits), bits, 13), codes)


def test_equal_values_come_back_exactly():
    assert (encode(np.full((3, 3), 0.25, np.float32), 1).decode() == 0.25).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 3}, UnsupportedError, "bits is 3"),
        ({"bits": 1, "group": 0}, UnsupportedError, "group 0, must be"),
        ({"bits": 1, "group": True}, UnsupportedError, "group True, must be"),
        ({"bits": 1, "group": "column"}, UnsupportedError, "group 'column', must be"),
        ({"bits": 1, "book": "nf4"}, UnknownNameError, "'nf4'; known: gauss_l1, lloyd_max"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        encode(np.ones(4, np.float32), **arguments)


GOOD = encode(np.arange(6, dtype=np.float32).reshape(2, 3), 1)
BOOK = GOOD.book
BAD = {
    "codes are 2 bytes": ({"codes": np.zeros(2, np.uint8)}, "2 bytes of codes, must be 1"),
    "padding": ({"codes": np.array([0b01000000], np.uint8)}, "padding bits"),
    "no such width": ({"book": np.arange(3, dtype=np.float32)}, "3 levels, must be 2, 4, 16"),
    "descending": ({"book": BOOK[::-1]}, "not finite and ascending"),
    "book of NaN": ({"book": np.array([0, np.nan], np.float32)}, "not finite and ascending"),
    "NaN mean": ({"stats": np.array([[np.nan, 1]], np.float32)}, "NaN, infinite or negative"),
    "negative spread": ({"stats": np.array([[0, -1]], np.float32)}, "NaN, infinite or negative"),
    "too few groups": ({"group": "row"}, r"\(1, 2\) statistics, must be \(2, 2\)"),
    "group 0": ({"group": 0}, "group 0, must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_decoded_is_named(name):
    changes, message = BAD[name]
    fields = {**vars(GOOD), **changes}
    (problem,) = problems_of(Coded(**fields), "val")
    assert re.search(message, problem)
