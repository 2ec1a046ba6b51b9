"""What each form means, in NumPy: the oracle of every engine, kernel and codec.

The arithmetic is normative (one definition, to the bit, on every device):

* everything is computed in fp32, multiply and add rounded separately (no fused multiply-add);
* a low-rank delta sums over the rank in ascending order, starting from zero;
* ``w' = w + factor * delta`` with ``factor = fp32(weight * alpha * scale)`` computed in fp64 and
  rounded once;
* several forms add their ``factor * delta`` terms in order, then the sum is added to ``w`` once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_lora.forms import Block, Dense, Form, LowRank, Sparse, matrix_shape

Float32 = NDArray[np.float32]


def delta_of(form: Form, shape: tuple[int, ...], factor: float = 1.0) -> Float32:
    """Return ``fp32(factor * form.scale) * delta``, shaped (out_features, in_features), fp32.

    Positions that a Sparse or Block form does not name are zero.
    """
    out_features, in_features = matrix_shape(shape)
    scale = np.float32(factor * form.scale)
    delta = np.zeros((out_features, in_features), np.float32)
    match form:
        case LowRank(a=a, b=b):
            for a_row, b_column in zip(a.astype(np.float32), b.T.astype(np.float32), strict=True):
                delta += b_column[:, None] * a_row[None, :]
            delta *= scale
        case Sparse(indices=indices, values=values):
            delta.reshape(-1)[indices] = values.astype(np.float32) * scale
        case Block(axis="row", indices=indices, values=values):
            delta[indices] = values.astype(np.float32) * scale
        case Block(indices=indices, values=values):
            delta[:, indices] = values.astype(np.float32).T * scale
        case Dense(values=values):
            delta[:] = values.astype(np.float32).reshape(delta.shape) * scale
    return delta


def apply(weight: Float32, terms: Sequence[tuple[Form, float]]) -> Float32:
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
    if len(terms) == 1 and getattr(terms[0][0], "mode", "add") == "set":
        return _replace(weight, terms[0][0])
    total = np.zeros(matrix_shape(weight.shape), np.float32)
    for form, factor in terms:
        total = total + delta_of(form, weight.shape, factor)
    return weight + total.reshape(weight.shape)


def _replace(weight: Float32, form: Form) -> Float32:
    result = weight.copy()
    matrix = result.reshape(matrix_shape(weight.shape))
    match form:
        case Sparse(indices=indices, values=values):
            matrix.reshape(-1)[indices] = values.astype(np.float32)
        case Block(axis="row", indices=indices, values=values):
            matrix[indices] = values.astype(np.float32)
        case Block(indices=indices, values=values):
            matrix[:, indices] = values.astype(np.float32).T
        case Dense(values=values):
            matrix[:] = values.astype(np.float32).reshape(matrix.shape)
        case LowRank():
            raise AssertionError("a low-rank form has no mode 'set'")
    return result
