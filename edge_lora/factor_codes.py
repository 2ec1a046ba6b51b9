"""Codes for two factors together, so that their product is close to what it was.

Coded one by one, the errors of both factors add up. Here each factor in turn is fitted anew to the
codes of the other by least squares, then coded row by row; what rounding a row costs is made good
by the rows that are not coded yet. No data is needed, and the result is never worse than two
factors coded one by one, in the Frobenius norm of the product.

Source: the row by row correction is Frantar et al. 2022, "GPTQ", arXiv:2210.17323, with the coded
factor in place of the inputs; fitting the factors in turn is ours.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_lora import codebook
from edge_lora.codebook import SPREAD_FLOOR, Book, Coded, Group

Matrix = NDArray[np.float64]
SWEEPS = 8
ENOUGH = 0.01  # a sweep that gains less, relative to the error, is the last
DAMPING = 1e-6  # of the mean diagonal, for rows that are nearly dependent


def encode_pair(
    a: NDArray[np.floating], bt: NDArray[np.floating], bits: int, group: Group, book: Book
) -> tuple[Coded, Coded]:
    """Return codes of both factors of ``bt.T @ a``.

    Args:
        a: (rank, in_features), finite.
        bt: (rank, out_features), finite.
        bits: 1, 2, 4 or 8.
        group: What shares one mean and spread; see ``codebook.encode``.
        book: Which levels.

    Cost:
        A few times rank² (in_features + out_features) products for each of at most 8 sweeps.
    """
    exact_a, exact_bt = a.astype(np.float64), bt.astype(np.float64)

    def distance(pair: tuple[Coded, Coded]) -> float:
        coded_a, coded_bt = (coded.decode().astype(np.float64) for coded in pair)
        return _product_norm(
            np.concatenate([exact_a, coded_a]), np.concatenate([exact_bt, -coded_bt])
        )

    best = codebook.encode(a, bits, group, book), codebook.encode(bt, bits, group, book)
    least = distance(best)
    pair = best
    for _ in range(SWEEPS):
        before = least
        coded_a = pair[0].decode().astype(np.float64)
        fitted_bt = _encode_against(coded_a, (coded_a @ exact_a.T) @ exact_bt, bits, group, book)
        coded_bt = fitted_bt.decode().astype(np.float64)
        fitted_a = _encode_against(coded_bt, (coded_bt @ exact_bt.T) @ exact_a, bits, group, book)
        for candidate in ((pair[0], fitted_bt), (fitted_a, fitted_bt)):
            if (found := distance(candidate)) < least:
                best, least = candidate, found
        pair = fitted_a, fitted_bt
        if least > (1 - ENOUGH) * before:
            break
    return best


def _encode_against(fixed: Matrix, target: Matrix, bits: int, group: Group, book: Book) -> Coded:
    """Code x (rank, n) so that ``fixed.T @ x`` is close to a matrix D (m, n).

    Args:
        fixed: (rank, m), the other factor.
        target: (rank, n), ``fixed @ D``.
        bits: Of a code.
        group: What shares its statistics: those of the exact solution, before any correction.
        book: Which levels.
    """
    gram = fixed @ fixed.T
    mean_square = float(np.trace(gram)) / len(gram)
    damping = DAMPING * max(mean_square, float(np.finfo(np.float32).tiny))
    inverse = np.linalg.inv(gram + damping * np.eye(len(gram)))
    x = inverse @ target
    start = codebook.encode(x.astype(np.float32), bits, group, book)
    stats = np.repeat(start.stats, codebook.group_size(group, x.shape), axis=0)[: x.size]
    mean, spread = (column.reshape(x.shape) for column in stats.T)
    spill = np.linalg.cholesky(inverse).T  # (rank, rank), upper: how rows make good for a row
    codes = np.empty(x.shape, np.uint8)
    for i, row in enumerate(x):
        normal = (row - mean[i]) / (spread[i] + SPREAD_FLOOR)
        codes[i] = codebook.nearest(normal.astype(np.float32), start.book)
        error = (row - (start.book[codes[i]] * spread[i] + mean[i])) / spill[i, i]
        x[i + 1 :] -= np.outer(spill[i, i + 1 :], error)
    return replace(start, codes=codebook.pack(codes.ravel(), bits))


def _product_norm(a: Matrix, bt: Matrix) -> float:
    """Return the Frobenius norm of ``bt.T @ a`` without forming it."""
    r_left, r_right = (np.linalg.qr(factor.T)[1] for factor in (bt, a))
    return float(np.linalg.norm(r_left @ r_right.T))
