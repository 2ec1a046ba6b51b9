"""What each form means, in NumPy: the oracle of every engine, kernel and codec.

The arithmetic is normative (one definition, to the bit, on every device):

* everything is computed in fp32, multiply and add rounded separately (no fused multiply-add);
* a low-rank delta sums over the rank in ascending order, starting from zero;
* ``w' = w + factor * delta`` with ``factor = fp32(weight * alpha * scale)`` computed in fp64 and
  rounded once;
* a RowScale form rounds ``values * factor`` first, then its product with the base's weight;
* several forms add their ``factor * delta`` terms in order, then the sum is added to ``w`` once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_lora.forms import (
    Block,
    Dense,
    LowRank,
    RowScale,
    Sparse,
    WeightForm,
    is_replacing,
    matrix_shape,
    to_fp32,
)

Float32 = NDArray[np.float32]


def delta_of(form: WeightForm, weight: Float32, factor: float = 1.0) -> Float32:
    """Return ``fp32(factor * form.scale) * delta``, shaped (out_features, in_features), fp32.

    Args:
        form: Any form that changes a weight. Positions that a Sparse or Block form does not name
            are zero.
        weight: The base's weight, fp32, of the slot's shape; only RowScale looks at its values.
        factor: The adapter's weight times its alpha.
    """
    out_features, in_features = matrix_shape(weight.shape)
    scale = np.float32(factor * form.scale)
    delta = np.zeros((out_features, in_features), np.float32)
    match form:
        case LowRank(a=a, bt=bt):
            for a_row, b_column in zip(to_fp32(a), to_fp32(bt), strict=True):
                delta += b_column[:, None] * a_row[None, :]
            delta *= scale
        case Sparse(indices=indices, values=values):
            delta.reshape(-1)[indices] = to_fp32(values) * scale
        case Block(axis="row", indices=indices, values=values):
            delta[indices] = to_fp32(values) * scale
        case Block(indices=indices, values=values):
            delta[:, indices] = to_fp32(values).T * scale
        case Dense(values=values):
            delta[:] = to_fp32(values).reshape(delta.shape) * scale
        case RowScale(axis="row", values=values):
            delta[:] = weight.reshape(delta.shape) * (to_fp32(values) * scale)[:, None]
        case RowScale(values=values):
            delta[:] = weight.reshape(delta.shape) * (to_fp32(values) * scale)
    return delta


def apply(weight: Float32, terms: Sequence[tuple[WeightForm, float]]) -> Float32:
    """Return a new weight with every term applied; ``weight`` is fp32 and is not modified.

    Args:
        weight: Base weight, fp32, of the slot's shape.
        terms: (form, factor) pairs that add up, where factor is the adapter's weight times its
            alpha. A form with mode "set" must stand alone.

    >>> one = Sparse(np.array([3], np.uint32), np.ones(1, np.float32), scale=2.0)
    >>> apply(np.zeros((2, 2), np.float32), [(one, 1.0)])
    array([[0., 0.],
           [0., 2.]], dtype=float32)
    """
    if len(terms) == 1 and is_replacing(terms[0][0]):
        return _replace(weight, terms[0][0])
    total = np.zeros(matrix_shape(weight.shape), np.float32)
    for form, factor in terms:
        total = total + delta_of(form, weight, factor)
    return weight + total.reshape(weight.shape)


def _replace(weight: Float32, form: WeightForm) -> Float32:
    result = weight.copy()
    matrix = result.reshape(matrix_shape(weight.shape))
    match form:
        case Sparse(indices=indices, values=values):
            matrix.reshape(-1)[indices] = to_fp32(values)
        case Block(axis="row", indices=indices, values=values):
            matrix[indices] = to_fp32(values)
        case Block(indices=indices, values=values):
            matrix[:, indices] = to_fp32(values).T
        case Dense(values=values):
            matrix[:] = to_fp32(values).reshape(matrix.shape)
        case _:
            raise AssertionError(f"{type(form).__name__} has no mode 'set'")
    return result
