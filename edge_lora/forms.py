"""The forms: everything that a device knows how to add to a slot.

Training methods come and go; each one lowers what it trained into these few dataclasses of arrays.
A form says nothing about how it was trained. What each form *means* is in ``reference.py``.

Shapes use (out_features, in_features) of the slot's weight, as ``torch.nn.Linear`` stores it. A
slot with more than two axes (a convolution) is read as (out_channels, the rest flattened).
"""

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import ShapeError

Values = NDArray[np.floating]
"""fp32, fp16 or bf16 (``ml_dtypes.bfloat16``)."""
Indices = NDArray[np.uint32]
Mode = Literal["add", "set"]

VALUE_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""safetensors' dtype names of the value encodings."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """Delta ``scale * (b @ a)``, the form of LoRA and its family.

    Attributes:
        a: (rank, in_features).
        b: (out_features, rank), same dtype as ``a``.
        scale: Already alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    a: Values
    b: Values
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of ``a``."""
        return len(self.a)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Delta with few non-zero entries, the form of SHiRA.

    Attributes:
        indices: (nnz,) uint32, flat row-major positions in (out_features, in_features), strictly
            ascending.
        values: (nnz,).
        scale: Multiplies ``values``; must be 1 for mode "set".
        mode: "add" adds to the weight, "set" replaces it.
    """

    indices: Indices
    values: Values
    scale: float = 1.0
    mode: Mode = "add"


@dataclass(frozen=True, eq=False)
class Block:
    """Delta of whole rows (outputs) or whole columns (inputs).

    Attributes:
        axis: "row" or "col".
        indices: (k,) uint32, strictly ascending.
        values: (k, in_features) for rows, (k, out_features) for columns.
        scale: Multiplies ``values``; must be 1 for mode "set".
        mode: "add" or "set".
    """

    axis: Literal["row", "col"]
    indices: Indices
    values: Values
    scale: float = 1.0
    mode: Mode = "add"


@dataclass(frozen=True, eq=False)
class Dense:
    """Delta (or, with mode "set", replacement) of the whole tensor.

    Attributes:
        values: Shape of the slot.
        scale: Multiplies ``values``; must be 1 for mode "set".
        mode: "add" or "set".
    """

    values: Values
    scale: float = 1.0
    mode: Mode = "add"


Form = LowRank | Sparse | Block | Dense
FORM_NAMES: dict[type, str] = {
    LowRank: "low_rank",
    Sparse: "sparse",
    Block: "block",
    Dense: "dense",
}


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the (out_features, in_features) view of a slot's shape; a vector is (n, 1).

    >>> matrix_shape((8, 3, 3, 3))
    (8, 27)
    """
    if not shape:
        return (1, 1)
    return shape[0], int(np.prod(shape[1:], dtype=np.int64))


def form_nbytes(form: Form) -> int:
    """Return the bytes of a form's arrays in memory (the file codes indices more tightly)."""
    return sum(v.nbytes for v in vars(form).values() if isinstance(v, np.ndarray))


def problems_of(form: Form, shape: tuple[int, ...]) -> list[str]:
    """Return every reason why ``form`` cannot be a delta of a slot of ``shape``; empty if none."""
    out_features, in_features = matrix_shape(shape)
    problems: list[str] = []
    if not np.isfinite(form.scale):
        problems.append(f"scale is {form.scale!r}, must be finite")
    if not isinstance(form, LowRank) and form.mode == "set" and form.scale != 1.0:
        problems.append(f"scale is {form.scale!r}, must be 1.0 for mode 'set'")
    match form:
        case LowRank(a=a, b=b):
            if a.ndim != 2 or a.shape[1] != in_features or a.shape[0] == 0:
                problems.append(f"a is {a.shape}, slot wants (rank, {in_features})")
            if b.ndim != 2 or b.shape[0] != out_features or b.shape[1] == 0:
                problems.append(f"b is {b.shape}, slot wants ({out_features}, rank)")
            if not problems and a.shape[0] != b.shape[1]:
                problems.append(f"a has rank {a.shape[0]}, b has rank {b.shape[1]}")
            arrays = {"a": a, "b": b}
        case Sparse(indices=indices, values=values):
            problems += _index_problems(indices, out_features * in_features)
            if values.shape != indices.shape:
                problems.append(f"{values.shape} values for {indices.shape} indices")
            arrays = {"values": values}
        case Block(axis=axis, indices=indices, values=values):
            count, width = (
                (out_features, in_features) if axis == "row" else (in_features, out_features)
            )
            problems += _index_problems(indices, count)
            if values.shape != (indices.size, width):
                problems.append(f"values are {values.shape}, want ({indices.size}, {width})")
            arrays = {"values": values}
        case Dense(values=values):
            if values.shape != tuple(shape):
                problems.append(f"values are {values.shape}, slot is {tuple(shape)}")
            arrays = {"values": values}
    for name, array in arrays.items():
        if array.dtype not in VALUE_DTYPES.values():
            problems.append(f"{name} is {array.dtype}, must be fp32, fp16 or bf16")
        elif not np.isfinite(array.astype(np.float32, copy=False)).all():
            problems.append(f"{name} holds NaN or infinity")
    return problems


def _index_problems(indices: Indices, limit: int) -> list[str]:
    if indices.ndim != 1 or indices.dtype != np.uint32:
        return [f"indices are {indices.dtype} {indices.shape}, must be uint32 (nnz,)"]
    if indices.size and int(indices.max()) >= limit:
        return [f"index {int(indices.max())} is out of range, slot has {limit} positions"]
    if indices.size > 1 and not (indices[1:] > indices[:-1]).all():
        return ["indices are not strictly ascending (unsorted or duplicated)"]
    return []


def require_fit(form: Form, shape: tuple[int, ...]) -> None:
    """Raise ShapeError with every problem if ``form`` does not fit a slot of ``shape``."""
    problems = problems_of(form, shape)
    if problems:
        raise ShapeError(f"form {FORM_NAMES[type(form)]!r}: {'; '.join(problems)}")
