"""How far two adapters lie apart, slot by slot.

The distance is the Frobenius norm of the difference of their deltas. Low-rank deltas are compared
through QR factors of the stacked A and B, so no (out, in) matrix is formed for them; slots with
other forms are compared a few rows at a time.

What a form counts as: one that changes a weight, its delta; one with mode "set", the values that it
sets; a Bottleneck, ``scale * up @ down``, its map without the activation and the biases. RowScale
depends on the base's weight and is left out, so it must be the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_lora.adapter import Adapter, Delta
from edge_lora.errors import ShapeError, UnsupportedError
from edge_lora.forms import (
    Block,
    Bottleneck,
    Dense,
    Form,
    LowRank,
    RowScale,
    Sparse,
    matrix_shape,
    to_array,
    to_fp32,
)

Matrix = NDArray[np.float64]
Term = tuple[Form, float]
"""A form and what multiplies it beside its own scale."""
_BLOCK_VALUES = 1 << 20  # of a delta at a time: 8 MiB


class SlotError(NamedTuple):
    """The distance of one slot's deltas.

    Attributes:
        slot: Its name.
        relative: ``norm(after - before) / norm(before)``; 0 if both are zero.
        norm: ``norm(before)``.
    """

    slot: str
    relative: float
    norm: float


def slot_errors(before: Adapter, after: Adapter) -> list[SlotError]:
    """Return the relative error of every slot, in the order of ``before``.

    Raises:
        ShapeError: If the two do not change the same slots.
        UnsupportedError: If a RowScale form differs.
    """
    if before.deltas.keys() != after.deltas.keys():
        differing = sorted(before.deltas.keys() ^ after.deltas.keys())
        raise ShapeError(f"the two adapters do not change the same slots: {', '.join(differing)}")
    errors = []
    for slot, delta in before.deltas.items():
        _require_same_row_scales(slot, delta, after.deltas[slot])
        old = [(form, before.alpha) for form in delta.forms]
        new = [(form, -after.alpha) for form in after.deltas[slot].forms]
        norm, distance = norm_of(old, delta.shape), norm_of([*old, *new], delta.shape)
        relative = distance / norm if norm else (np.inf if distance else 0.0)
        errors.append(SlotError(slot, float(relative), norm))
    return errors


def total_error(errors: Sequence[SlotError]) -> float:
    """Return the relative error over all slots together."""
    if any(np.isinf(error.relative) for error in errors):
        return float("inf")
    norm = np.sqrt(sum(e.norm**2 for e in errors))
    distance = np.sqrt(sum((e.relative * e.norm) ** 2 for e in errors if e.norm))
    return float(distance / norm) if norm else 0.0


def norm_of(terms: Sequence[Term], shape: tuple[int, ...]) -> float:
    """Return the Frobenius norm of a sum of forms of one slot of ``shape``."""
    terms = [(form, factor) for form, factor in terms if not isinstance(form, RowScale)]
    if not terms:
        return 0.0
    if all(isinstance(form, LowRank | Bottleneck) for form, _ in terms):
        left, right = stacked_factors(terms)
        r_left, r_right = np.linalg.qr(left)[1], np.linalg.qr(right.T)[1]
        return float(np.linalg.norm(r_left @ r_right.T))
    return float(np.sqrt(sum(np.sum(rows**2) for rows in _row_blocks(terms, shape))))


def stacked_factors(terms: Sequence[Term]) -> tuple[Matrix, Matrix]:
    """Return (out, R) and (R, in), fp64, whose product is the sum of low-rank terms."""
    lefts, rights = [], []
    for form, factor in terms:
        match form:
            case LowRank(a=a, bt=bt):
                left, right = to_fp32(bt).T, to_fp32(a)
            case Bottleneck(down=down, up=up):
                left, right = to_fp32(up), to_fp32(down)
            case _:
                raise AssertionError(f"{type(form).__name__} has no factors")
        lefts.append(left.astype(np.float64) * (factor * form.scale))
        rights.append(right.astype(np.float64))
    return np.concatenate(lefts, axis=1), np.concatenate(rights)


def _row_blocks(terms: Sequence[Term], shape: tuple[int, ...]) -> Iterator[Matrix]:
    """Yield the sum of all terms, a few rows of it at a time, fp64."""
    out_features, in_features = matrix_shape(shape)
    height = max(1, _BLOCK_VALUES // in_features)
    decoded = [(_decoded(form), factor * form.scale) for form, factor in terms]
    for start in range(0, out_features, height):
        stop = min(start + height, out_features)
        block = np.zeros((stop - start, in_features))
        for form, factor in decoded:
            _add_rows(block, form, factor, start, stop)
        yield block


def _decoded(form: Form) -> Form:
    """Return ``form`` with its coded values decoded, so that this is done once."""
    match form:
        case LowRank(a=a, bt=bt):
            return LowRank(to_array(a), to_array(bt), form.scale)
        case Sparse(indices=indices, values=values):
            return Sparse(indices, to_array(values))
        case Block(axis=axis, indices=indices, values=values):
            return Block(axis, indices, to_array(values))
        case Dense(values=values):
            return Dense(to_array(values))
        case _:
            raise AssertionError(f"{type(form).__name__} stands at no weight")


def _add_rows(block: Matrix, form: Form, factor: float, start: int, stop: int) -> None:
    """Add rows ``start`` to ``stop`` of ``factor * form``, whatever the form's own scale is."""
    match form:
        case LowRank(a=a, bt=bt):
            columns = to_array(bt)[:, start:stop].astype(np.float64)
            block += factor * (columns.T @ to_array(a).astype(np.float64))
        case Sparse(indices=indices, values=values):
            width = block.shape[1]
            low, high = np.searchsorted(indices, [start * width, stop * width])
            place = indices[low:high].astype(np.int64) - start * width
            block.reshape(-1)[place] += factor * to_array(values)[low:high].astype(np.float64)
        case Block(axis="row", indices=indices, values=values):
            low, high = np.searchsorted(indices, [start, stop])
            place = indices[low:high].astype(np.int64) - start
            block[place] += factor * to_array(values)[low:high].astype(np.float64)
        case Block(indices=indices, values=values):
            block[:, indices] += factor * to_array(values)[:, start:stop].T.astype(np.float64)
        case Dense(values=values):
            rows = to_array(values).reshape(-1, block.shape[1])[start:stop]
            block += factor * rows.astype(np.float64)


def _require_same_row_scales(slot: str, before: Delta, after: Delta) -> None:
    def scales(delta: Delta) -> list[tuple[str, float, bytes]]:
        found = [form for form in delta.forms if isinstance(form, RowScale)]
        return [(form.axis, form.scale, to_fp32(form.values).tobytes()) for form in found]

    if scales(before) != scales(after):
        raise UnsupportedError(
            f"{slot}: the RowScale forms differ, and how much that matters depends on the weight"
        )
