import ml_dtypes
import numpy as np
import pytest

from edge_lora.errors import ShapeError
from edge_lora.forms import (
    MAX_RANK,
    Block,
    Bottleneck,
    Dense,
    LowRank,
    RowScale,
    Sparse,
    form_nbytes,
    matrix_shape,
    problems_of,
    require_fit,
)


def u32(*values):
    return np.array(values, np.uint32)


def f32(*shape):
    return np.ones(shape, np.float32)


SOUND = [
    LowRank(f32(2, 5), f32(2, 3)),
    Sparse(u32(0, 7, 14), f32(3)),
    Sparse(u32(), f32(0)),
    Block("row", u32(0, 2), f32(2, 5)),
    Block("col", u32(4), f32(1, 3)),
    Dense(f32(3, 5)),
    Dense(f32(3, 5), mode="set"),
    Dense(f32(3, 5).astype(np.float16)),
    Dense(f32(3, 5).astype(ml_dtypes.bfloat16)),
]
BROKEN = {
    "a has the wrong width": (LowRank(f32(2, 4), f32(2, 3)), "a is (2, 4), slot wants (rank, 5)"),
    "bt has the wrong width": (LowRank(f32(2, 5), f32(2, 4)), "bt is (2, 4), slot wants (rank, 3)"),
    "ranks differ": (LowRank(f32(2, 5), f32(1, 3)), "a has rank 2, bt has rank 1"),
    "rank zero": (LowRank(f32(0, 5), f32(0, 3)), "slot wants"),
    "index out of range": (Sparse(u32(15), f32(1)), "index 15 is out of range, slot has 15"),
    "unsorted": (Sparse(u32(2, 1), f32(2)), "not strictly ascending"),
    "duplicated": (Sparse(u32(1, 1), f32(2)), "not strictly ascending"),
    "signed indices": (Sparse(np.array([1]), f32(1)), "must be uint32"),
    "count differs": (Sparse(u32(1, 2), f32(3)), "(3,) values for (2,) indices"),
    "row out of range": (Block("row", u32(3), f32(1, 5)), "index 3 is out of range, slot has 3"),
    "column values too wide": (Block("col", u32(1), f32(1, 5)), "values are (1, 5), want (1, 3)"),
    "dense shape": (Dense(f32(5, 3)), "values are (5, 3), slot is (3, 5)"),
    "fp64": (Dense(np.ones((3, 5))), "must be fp32, fp16 or bf16"),
    "NaN": (Dense(f32(3, 5) * np.float32("nan")), "holds NaN or infinity"),
    "no such axis": (RowScale(f32(3), axis="diag"), "axis is 'diag', known: 'row', 'col'"),
    "no such mode": (Dense(f32(3, 5), mode="mul"), "mode is 'mul', known: 'add', 'set'"),
    "no such placement": (
        Bottleneck(f32(2, 5), f32(3, 2), placement="before"),
        "placement is 'before', known",
    ),
    "no such activation": (Bottleneck(f32(2, 5), f32(3, 2), act="silu"), "act is 'silu', known"),
    "rank over the limit": (
        LowRank(f32(MAX_RANK + 1, 5), f32(MAX_RANK + 1, 3)),
        "rank is 65537, at most 65536",
    ),
    "infinite scale": (Dense(f32(3, 5), scale=float("inf")), "must be finite"),
    "scaled set": (Sparse(u32(1), f32(1), 0.5, "set"), "must be 1.0 for mode 'set'"),
}


@pytest.mark.parametrize("form", SOUND, ids=lambda f: type(f).__name__)
def test_a_sound_form_has_no_problems(form):
    assert problems_of(form, (3, 5)) == []
    require_fit(form, (3, 5))


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_form_is_named_with_both_facts(case):
    form, fact = BROKEN[case]
    assert any(fact in problem for problem in problems_of(form, (3, 5)))
    with pytest.raises(ShapeError, match="form "):
        require_fit(form, (3, 5))


def test_all_problems_are_listed_at_once():
    form = Sparse(u32(99, 1), np.full(3, np.nan, np.float32), float("nan"))
    assert len(problems_of(form, (3, 5))) == 4


@pytest.mark.parametrize(
    ("shape", "matrix"), [((3, 5), (3, 5)), ((8, 3, 3, 3), (8, 27)), ((7,), (7, 1)), ((), (1, 1))]
)
def test_matrix_shape(shape, matrix):
    assert matrix_shape(shape) == matrix


def test_a_convolution_is_read_as_out_by_the_rest():
    assert problems_of(LowRank(f32(2, 27), f32(2, 8)), (8, 3, 3, 3)) == []


def test_form_nbytes_counts_all_arrays():
    assert form_nbytes(Sparse(u32(1, 2), np.ones(2, np.float16))) == 2 * 4 + 2 * 2
    assert form_nbytes(LowRank(f32(2, 5), f32(2, 3))) == 4 * (10 + 6)
