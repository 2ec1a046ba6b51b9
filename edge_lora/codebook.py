"""Values of 1, 2, 4 or 8 bits: codes into a small book, with a mean and a spread for each group.

    v = book[code] * std + mean        (fp32, product and sum rounded one after the other)

Groups are runs of consecutive values, row-major: the whole tensor, one row, or any number of
values. Codes are packed low bits first; the unused bits of the last byte are zero.

Two books for a normal distribution, computed on first use:

| book | levels | best for |
|---|---|---|
| ``gauss_l1`` | medians of their cells | the absolute error; what Bi-LoRA trains with |
| ``lloyd_max`` | means of their cells | the squared error |

Source: Jie, Wang, Deng 2023, "Revisiting the Parameter Efficiency of Adapters from the Perspective
of Precision Redundancy", arXiv:2307.16867; Lloyd 1982; Max 1960.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import exp, inf, pi, prod, sqrt
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    from statistics import NormalDist

Float32 = NDArray[np.float32]
Book = Literal["gauss_l1", "lloyd_max"]
Group = Literal["tensor", "row"] | int
"""What shares one mean and spread: everything, each row (last axis), or that many values."""
BITS = (1, 2, 4, 8)
SPREAD_FLOOR = 1e-5
"""Added to the spread before dividing by it, so that equal values can be coded."""
_MAX_SWEEPS = 500


@dataclass(frozen=True, eq=False)
class Coded:
    """An array of ``shape`` as codes.

    Attributes:
        codes: (ceil(size * bits / 8),) uint8.
        stats: (groups, 2) fp32, the mean and the spread of each group.
        book: (2 ** bits,) fp32, strictly ascending.
        shape: Of the decoded array.
        group: "tensor", "row" or the number of consecutive values that share one row of ``stats``.
    """

    codes: NDArray[np.uint8]
    stats: Float32
    book: Float32
    shape: tuple[int, ...]
    group: Group = "tensor"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return int(np.log2(self.book.size))

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and statistics; the book is shared by many."""
        return self.codes.nbytes + self.stats.nbytes

    def decode(self) -> Float32:
        """Return the values, fp32."""
        codes = unpack(self.codes, self.bits, self.size)
        per_value = np.repeat(self.stats, group_size(self.group, self.shape), axis=0)[: self.size]
        return (self.book[codes] * per_value[:, 1] + per_value[:, 0]).reshape(self.shape)


def group_size(group: Group, shape: tuple[int, ...]) -> int:
    """Return how many consecutive values of an array of ``shape`` share their statistics."""
    if group == "tensor":
        return max(prod(shape), 1)
    if group == "row":
        return max(shape[-1], 1) if shape else 1
    return int(group)


def group_count(group: Group, shape: tuple[int, ...]) -> int:
    """Return the number of groups; the last one may be short."""
    return -(-prod(shape) // group_size(group, shape))


def encode(
    values: NDArray[np.floating], bits: int, group: Group = "tensor", book: Book = "gauss_l1"
) -> Coded:
    """Code every value by the nearest level of its group's book.

    Args:
        values: fp32, fp16 or bf16, finite.
        bits: 1, 2, 4 or 8.
        group: What shares one mean and (unbiased) standard deviation.
        book: Which levels.

    Raises:
        UnsupportedError: Other bits, or another group.
        UnknownNameError: Another book.
    """
    levels = levels_of(book, bits)
    if problems := book_problems(levels, group):
        raise UnsupportedError(f"cannot code with {problems[0]}")
    flat = np.asarray(values, np.float32).reshape(-1)
    size = group_size(group, values.shape)
    whole = flat.size // size * size
    parts = [flat[:whole].reshape(-1, size), flat[whole:].reshape(1, -1)]  # the last may be short
    coded = [_encode_rows(rows, levels) for rows in parts if rows.size]
    codes = np.concatenate([np.zeros(0, np.uint8), *(codes.ravel() for codes, _ in coded)])
    stats = np.concatenate([np.zeros((0, 2), np.float32), *(stats for _, stats in coded)])
    return Coded(pack(codes, bits), stats, levels, values.shape, group)


def _encode_rows(rows: Float32, levels: Float32) -> tuple[NDArray[np.uint8], Float32]:
    """Return the codes of each row, (groups, n), and its mean and spread, (groups, 2)."""
    mean = rows.mean(axis=1, keepdims=True, dtype=np.float64)
    one = rows.shape[1] == 1
    spread = rows.std(axis=1, keepdims=True, dtype=np.float64, ddof=0 if one else 1)
    stats = np.concatenate([mean, spread], axis=1).astype(np.float32)
    normal = (rows - stats[:, :1]) / (stats[:, 1:] + np.float32(SPREAD_FLOOR))
    return nearest(normal, levels), stats


def nearest(normal: Float32, levels: Float32) -> NDArray[np.uint8]:
    """Return the code of the level nearest to each value; halfway goes to the lower one."""
    thresholds = (levels[1:] + levels[:-1]) / np.float32(2)
    return np.searchsorted(thresholds, normal, side="left").astype(np.uint8)


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes, low bits first; the last byte is padded with zeros.

    >>> pack(np.array([1, 2, 3], np.uint8), 4)
    array([33,  3], dtype=uint8)
    """
    each = 8 // bits
    padded = np.zeros(-(-codes.size // each) * each, np.uint8)
    padded[: codes.size] = codes
    shifts = (np.arange(each) * bits).astype(np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded.reshape(-1, each) << shifts, axis=1)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Return the first ``count`` codes."""
    shifts = (np.arange(8 // bits) * bits).astype(np.uint8)
    codes = (packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(-1)[:count]


def levels_of(book: Book, bits: int) -> Float32:
    """Return the 2 ** bits levels of a book, ascending, fp32."""
    if bits not in BITS or isinstance(bits, bool):
        raise UnsupportedError(f"bits is {bits!r}; known: {', '.join(map(str, BITS))}")
    if book not in get_args(Book):
        raise UnknownNameError(f"unknown book {book!r}; known: {', '.join(get_args(Book))}")
    return _levels(book, bits).copy()


@cache
def _levels(book: Book, bits: int) -> Float32:
    """Solve for the fixed point: thresholds halfway between levels, levels centred in cells.

    The start has the density that is best for many levels, the density of the normal to the power
    1/2 or 1/3. The book is symmetric: only its lower half is solved, where tails are exact.
    """
    centre, power = {"gauss_l1": (_median, 2), "lloyd_max": (_mean, 3)}[book]
    count = 2 ** (bits - 1)
    levels = [sqrt(power) * _normal().inv_cdf((i + 0.5) / (2 * count)) for i in range(count)]
    for _ in range(_MAX_SWEEPS):
        bounds = [-inf, *((a + b) / 2 for a, b in pairwise(levels)), 0.0]
        fresh = [centre(a, b) for a, b in pairwise(bounds)]
        moved = max(abs(a - b) for a, b in zip(fresh, levels, strict=True))
        levels = fresh
        if moved < 1e-12:
            break
    return np.array(levels + [-x for x in reversed(levels)], np.float32)


def _median(low: float, high: float) -> float:
    """Return the median of N(0, 1) between two bounds."""
    return _normal().inv_cdf((_normal().cdf(low) + _normal().cdf(high)) / 2)


def _mean(low: float, high: float) -> float:
    """Return the mean of N(0, 1) between two bounds."""
    return (_density(low) - _density(high)) / (_normal().cdf(high) - _normal().cdf(low))


@cache
def _normal() -> NormalDist:
    """Return the normal distribution; its module is slow to import, and devices read books."""
    from statistics import NormalDist

    return NormalDist()


def _density(x: float) -> float:
    return 0.0 if x == -inf else exp(-x * x / 2) / sqrt(2 * pi)


def book_problems(book: Float32, group: Group) -> list[str]:
    """Return everything that is wrong with a book and what shares statistics."""
    problems = []
    if book.dtype != np.float32 or book.ndim != 1 or book.size not in {2**b for b in BITS}:
        problems.append(f"a book of {book.size} levels, must be 2, 4, 16 or 256")
    elif not np.isfinite(book).all() or not (book[1:] > book[:-1]).all():
        problems.append("a book that is not finite and ascending")
    if group not in ("tensor", "row") and not (type(group) is int and 1 <= group < 2**32):
        problems.append(f"group {group!r}, must be 'tensor', 'row' or 1 to 4294967295")
    return problems


def problems_of(coded: Coded, name: str) -> list[str]:
    """Return everything that is wrong with coded values; empty if they can be decoded."""
    book, stats = coded.book, coded.stats
    problems = [f"{name} has {problem}" for problem in book_problems(book, coded.group)]
    if problems:
        return problems
    groups = (group_count(coded.group, coded.shape), 2)
    if stats.dtype != np.float32 or stats.shape != groups:
        problems.append(f"{name} has {stats.shape} statistics, must be {groups}")
    elif not np.isfinite(stats).all() or (stats[:, 1] < 0).any():
        problems.append(f"{name} has a mean or spread that is NaN, infinite or negative")
    elif not _has_finite_levels(book, stats):
        problems.append(f"{name} has a spread at which a level is not finite")
    length = -(-coded.size * coded.bits // 8)
    if coded.codes.dtype != np.uint8 or coded.codes.shape != (length,):
        problems.append(f"{name} has {coded.codes.size} bytes of codes, must be {length}")
    elif (used := coded.size * coded.bits % 8) and coded.codes[-1] >> used:
        problems.append(f"{name} has padding bits that are set")
    return problems


def _has_finite_levels(book: Float32, stats: Float32) -> bool:
    with np.errstate(over="ignore"):  # levels ascend, so the ends tell
        ends = book[[0, -1]] * stats[:, 1:] + stats[:, :1]  # (groups, 2)
    return bool(np.isfinite(ends).all())


__all__ = [
    "BITS", "Book", "Coded", "Group", "book_problems", "encode", "group_count", "group_size",
    "levels_of", "nearest", "pack", "problems_of", "unpack",
]  # fmt: skip
