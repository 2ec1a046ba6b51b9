"""The forms: everything that a device knows how to add to a slot.

Training methods come and go; each one lowers what it trained into these few dataclasses of arrays.
A form says nothing about how it was trained. What each form *means* is in ``reference.py``.

Shapes use (out_features, in_features) of the slot's weight, as ``torch.nn.Linear`` stores it. A
slot with more than two axes (a convolution) is read as (out_channels, the rest flattened).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edge_lora import codebook
from edge_lora.codebook import Coded
from edge_lora.errors import ShapeError, UnsupportedError

Values = NDArray[np.floating] | Coded
"""fp32, fp16 or bf16 (``ml_dtypes.bfloat16``), or codes of 1 to 8 bits."""
Indices = NDArray[np.uint32]
Mode = Literal["add", "set"]
Axis = Literal["row", "col"]
Placement = Literal["parallel", "sequential"]
Activation = Literal["none", "relu", "gelu", "gelu_tanh"]

MAX_RANK = 1 << 16
"""Above it, factors are no smaller than what they stand for."""

VALUE_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""safetensors' dtype names of the value encodings."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """Delta ``scale * (bt.T @ a)``, the form of LoRA and its family.

    Attributes:
        a: (rank, in_features).
        bt: (rank, out_features), LoRA's B transposed: the first rows of both are a smaller adapter.
        scale: Already alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        ranks: Smaller ranks at which it was trained to work too, ascending; the last is ``rank``.
            Empty: only the whole.
        rank_scale: The scale at each of ``ranks``, in place of ``scale``.
    """

    a: Values
    bt: Values
    scale: float = 1.0
    ranks: tuple[int, ...] = ()
    rank_scale: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        """Number of rows of ``a``."""
        return self.a.shape[0]

    def at_rank(self, rank: int) -> "LowRank":
        """Return the smaller adapter that the first ``rank`` rows are.

        Raises:
            UnsupportedError: If it was not trained to work at that rank; lists those that it was.
        """
        if rank == self.rank and not self.ranks:
            return self
        if rank not in self.ranks:
            known = ", ".join(map(str, self.ranks or (self.rank,)))
            raise UnsupportedError(f"rank {rank} is not among the ranks of this adapter: {known}")
        scale = self.rank_scale[self.ranks.index(rank)]
        return LowRank(to_array(self.a)[:rank], to_array(self.bt)[:rank], scale)


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

    axis: Axis
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


@dataclass(frozen=True, eq=False)
class RowScale:
    """Delta ``scale * diag(values) @ W`` (rows) or ``scale * W @ diag(values)`` (columns).

    The only form whose delta depends on the weight: that of DoRA's magnitude (``values`` is the
    gain minus one, and the low-rank form beside it has the gain in ``bt``) and of IA3.

    Attributes:
        values: (out_features,) for rows, (in_features,) for columns.
        scale: Multiplies ``values``.
        axis: "row" or "col".
    """

    values: Values
    scale: float = 1.0
    axis: Axis = "row"


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """A small network beside a site, not a change of any weight; runs unfused.

    ``y + scale * (act(z @ down.T + down_bias) @ up.T + up_bias)``, where z is the site's input
    ("parallel") or its output y ("sequential").

    Attributes:
        down: (rank, d_in), where d_in is the width of z.
        up: (d_out, rank).
        scale: Multiplies the branch.
        act: Activation; "gelu" is exact, "gelu_tanh" its approximation.
        placement: What z is.
        down_bias: (rank,) or None.
        up_bias: (d_out,) or None.
    """

    down: Values
    up: Values
    scale: float = 1.0
    act: Activation = "relu"
    placement: Placement = "parallel"
    down_bias: Values | None = None
    up_bias: Values | None = None

    @property
    def rank(self) -> int:
        """Width of the middle."""
        return self.down.shape[0]


WeightForm = LowRank | Sparse | Block | Dense | RowScale
"""What changes a weight."""
Form = WeightForm | Bottleneck
FORM_NAMES: dict[type, str] = {
    LowRank: "low_rank",
    Sparse: "sparse",
    Block: "block",
    Dense: "dense",
    RowScale: "row_scale",
    Bottleneck: "bottleneck",
}
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "axis": get_args(Axis),
    "act": get_args(Activation),
    "placement": get_args(Placement),
}
"""What the fields of a form that are words may be."""
VALUE_FIELDS: dict[type, tuple[str, ...]] = {
    LowRank: ("a", "bt"),
    Sparse: ("values",),
    Block: ("values",),
    Dense: ("values",),
    RowScale: ("values",),
    Bottleneck: ("down", "up", "down_bias", "up_bias"),
}
"""The fields of a form that hold ``Values``."""


def to_array(values: Values) -> NDArray[np.floating]:
    """Return values as an array: as they are, or decoded to fp32."""
    return values.decode() if isinstance(values, Coded) else values


def to_fp32(values: Values) -> NDArray[np.float32]:
    """Return values as fp32, exactly."""
    return to_array(values).astype(np.float32, copy=False)


def values_of(form: Form) -> dict[str, Values]:
    """Return the value fields of a form that it has, by name."""
    found = {name: getattr(form, name) for name in VALUE_FIELDS[type(form)]}
    return {name: values for name, values in found.items() if values is not None}


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
    return sum(v.nbytes for v in vars(form).values() if isinstance(v, np.ndarray | Coded))


def is_replacing(form: Form) -> bool:
    """Whether the form replaces the weight (mode "set") instead of adding to it."""
    return getattr(form, "mode", "add") == "set"


def problems_of(form: Form, shape: tuple[int, ...]) -> list[str]:
    """Return every reason why ``form`` cannot be a delta of a slot of ``shape``; empty if none.

    The shape of a site is (d_out, d_in).
    """
    out_features, in_features = matrix_shape(shape)
    problems = [
        f"{key} is {value!r}, known: {', '.join(map(repr, known))}"
        for key, known in CHOICES.items()
        if (value := getattr(form, key, known[0])) not in known
    ]
    if not np.isfinite(form.scale):
        problems.append(f"scale is {form.scale!r}, must be finite")
    if is_replacing(form) and form.scale != 1.0:
        problems.append(f"scale is {form.scale!r}, must be 1.0 for mode 'set'")
    match form:
        case LowRank():
            problems += _low_rank_problems(form, out_features, in_features)
        case Sparse(indices=indices, values=values):
            problems += _index_problems(indices, out_features * in_features)
            if values.shape != indices.shape:
                problems.append(f"{values.shape} values for {indices.shape} indices")
        case Block(axis=axis, indices=indices, values=values):
            count, width = (
                (out_features, in_features) if axis == "row" else (in_features, out_features)
            )
            problems += _index_problems(indices, count)
            if values.shape != (indices.size, width):
                problems.append(f"values are {values.shape}, want ({indices.size}, {width})")
        case Dense(values=values):
            if values.shape != tuple(shape):
                problems.append(f"values are {values.shape}, slot is {tuple(shape)}")
        case RowScale(values=values, axis=axis):
            length = out_features if axis == "row" else in_features
            if values.shape != (length,):
                problems.append(f"values are {values.shape}, slot wants ({length},)")
        case Bottleneck():
            problems += _bottleneck_problems(form, out_features, in_features)
    for name, values in values_of(form).items():
        problems += _value_problems(name, values)
    return problems


def _low_rank_problems(form: LowRank, out_features: int, in_features: int) -> list[str]:
    a, bt = form.a, form.bt
    problems = []
    if a.ndim != 2 or a.shape[1] != in_features or a.shape[0] == 0:
        problems.append(f"a is {a.shape}, slot wants (rank, {in_features})")
    if bt.ndim != 2 or bt.shape[1] != out_features or bt.shape[0] == 0:
        problems.append(f"bt is {bt.shape}, slot wants (rank, {out_features})")
    if not problems and a.shape[0] != bt.shape[0]:
        problems.append(f"a has rank {a.shape[0]}, bt has rank {bt.shape[0]}")
    if not problems and form.rank > MAX_RANK:
        problems.append(f"rank is {form.rank}, at most {MAX_RANK} is read")
    ranks = form.ranks
    ascending = all(x < y for x, y in pairwise((0, *ranks)))
    if ranks and not problems and not (ascending and ranks[-1] == form.rank):
        problems.append(f"ranks are {ranks}, must ascend from 1 to {form.rank}")
    if len(form.rank_scale) != len(ranks) or not np.isfinite(form.rank_scale).all():
        problems.append(f"rank_scale is {form.rank_scale}, must be finite, one for each rank")
    return problems


def _bottleneck_problems(form: Bottleneck, d_out: int, d_in: int) -> list[str]:
    width = d_in if form.placement == "parallel" else d_out
    rank = form.down.shape[0] if form.down.ndim else 0
    wanted = {"down": (rank, width), "up": (d_out, rank), "down_bias": (rank,), "up_bias": (d_out,)}
    problems = [
        f"{name} is {values.shape}, site wants {wanted[name]}"
        for name, values in values_of(form).items()
        if values.shape != wanted[name]
    ]
    return problems if rank else ["rank is 0"]


def _value_problems(name: str, values: Values) -> list[str]:
    if isinstance(values, Coded):
        return codebook.problems_of(values, name)
    if values.dtype not in VALUE_DTYPES.values():
        return [f"{name} is {values.dtype}, must be fp32, fp16 or bf16"]
    if not np.isfinite(values.astype(np.float32, copy=False)).all():
        return [f"{name} holds NaN or infinity"]
    return []


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
