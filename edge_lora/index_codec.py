"""Ascending indices in about one byte each.

A random mask of density p has geometric gaps, for which Rice coding is close to the entropy: at 1 %
8.11 bits an index, where u8 gaps take 8.7 and ``uint16`` columns 16. (Rice 1979; Golomb 1966.)

``rice``
    ``m`` gaps ``g[0] = i[0]``, ``g[j] = i[j] - i[j-1] - 1``. With parameter ``k`` the stream is
    the ``m`` remainders ``g & (2**k - 1)`` of ``k`` bits each, padded to a byte, followed by the
    quotients ``g >> k`` in unary (that many zero bits, then a one), padded to a byte. Bits fill a
    byte from its low end. Padding bits are zero.
``line16``
    For masks made of lines of 16 outputs x 1 input: the ``rice`` stream of the line numbers on the
    (out_features / 16, in_features) grid, 1/16 of the indices.
"""

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import AdapterFileError
from edge_lora.forms import Indices

Bytes = NDArray[np.uint8]
LINE = 16
MAX_K = 31


def rice_encode(indices: Indices) -> tuple[Bytes, int]:
    """Return the stream of strictly ascending ``indices`` and the ``k`` that makes it shortest."""
    gaps = np.asarray(np.diff(indices.astype(np.int64), prepend=-1), np.int64) - 1  # (m,)
    if not gaps.size:
        return np.zeros(0, np.uint8), 0
    k = min(range(MAX_K + 1), key=lambda k: gaps.size * (k + 1) + int((gaps >> k).sum()))
    bits = ((gaps[:, None] >> np.arange(k)) & 1).astype(np.uint8)  # (m, k)
    ones = np.cumsum((gaps >> k) + 1) - 1  # where each unary code ends
    unary = np.zeros(int(ones[-1]) + 1, np.uint8)
    unary[ones] = 1
    parts = [np.packbits(b.reshape(-1), bitorder="little") for b in (bits, unary)]
    return np.concatenate(parts), k


def rice_decode(stream: Bytes, count: int, k: int, limit: int) -> Indices:
    """Return ``count`` indices below ``limit``; inverse of :func:`rice_encode`.

    Raises:
        AdapterFileError: If the stream is too short or too long, has padding bits set, or names an
            index that is out of range.
    """
    low_bytes = (count * k + 7) // 8
    if not 0 <= k <= MAX_K or count > limit or stream.size < low_bytes:
        raise AdapterFileError(f"index stream of {stream.size} bytes cannot hold {count} indices")
    low = np.unpackbits(stream[:low_bytes], bitorder="little")
    unary = np.unpackbits(stream[low_bytes:], bitorder="little")
    ones = np.flatnonzero(unary)
    if ones.size != count:
        raise AdapterFileError(f"index stream holds {ones.size} indices, header says {count}")
    used = int(ones[-1]) + 1 if count else 0
    if low[count * k :].any() or (used + 7) // 8 != stream.size - low_bytes:
        raise AdapterFileError("index stream has padding bits set or trailing bytes")
    quotients = np.diff(ones, prepend=-1) - 1
    if count and int(quotients.max()) > limit >> k:
        raise AdapterFileError(f"an index is out of range, slot has {limit}")
    remainders = low[: count * k].reshape(count, k).astype(np.int64) @ (1 << np.arange(k))
    gaps = (quotients << k) + remainders
    if gaps.size and int(gaps.max()) >= limit:
        raise AdapterFileError(f"index gap {int(gaps.max())} is out of range, slot has {limit}")
    indices = np.cumsum(gaps + 1) - 1
    if indices.size and int(indices[-1]) >= limit:
        raise AdapterFileError(f"index {int(indices[-1])} is out of range, slot has {limit}")
    return indices.astype(np.uint32)


def lines_of(indices: Indices, shape: tuple[int, int]) -> Indices | None:
    """Return the line numbers if ``indices`` are whole lines of 16 outputs x 1 input, else None."""
    out_features, in_features = shape
    if out_features % LINE or indices.size % LINE or not indices.size:
        return None
    row, column = np.divmod(indices.astype(np.int64), in_features)
    lines = np.unique((row // LINE) * in_features + column)
    if lines.size * LINE != indices.size:
        return None
    lines = lines.astype(np.uint32)
    return lines if np.array_equal(expand_lines(lines, in_features), indices) else None


def expand_lines(lines: Indices, in_features: int) -> Indices:
    """Return the flat ascending indices of all entries of ascending ``lines``."""
    group, column = np.divmod(lines.astype(np.int64), in_features)
    rows = group[:, None] * LINE + np.arange(LINE)  # (m, 16)
    return np.sort((rows * in_features + column[:, None]).reshape(-1)).astype(np.uint32)
