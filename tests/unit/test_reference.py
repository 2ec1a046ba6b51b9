"""The oracle against torch, and against sums written out by hand."""

import numpy as np
import pytest

from edge_lora import reference
from edge_lora.forms import Block, Dense, LowRank, Sparse

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
SHAPE = (6, 5)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def u32(*values):
    return np.array(values, np.uint32)


def dense_by_torch(form):
    """The delta as torch computes it, in fp64."""
    delta = torch.zeros(SHAPE, dtype=torch.float64)
    values = None if isinstance(form, LowRank) else torch.from_numpy(form.values).double()
    match form:
        case LowRank(a=a, bt=bt):
            delta += torch.from_numpy(bt).double().T @ torch.from_numpy(a).double()
        case Sparse(indices=indices):
            delta.view(-1).index_add_(0, torch.from_numpy(indices.astype(np.int64)), values)
        case Block(axis=axis, indices=indices):
            where = torch.from_numpy(indices.astype(np.int64))
            if axis == "row":
                delta.index_add_(0, where, values)
            else:
                delta.index_add_(1, where, values.T)
        case Dense():
            delta += values
    return delta * form.scale


FORMS = {
    "low_rank": LowRank(normal(3, 5), normal(3, 6), 0.5),
    "sparse": Sparse(u32(0, 7, 29), normal(3), 2.0),
    "rows": Block("row", u32(1, 4), normal(2, 5), -1.0),
    "columns": Block("col", u32(0, 3), normal(2, 6), 0.25),
    "dense": Dense(normal(6, 5), 3.0),
}


@pytest.mark.parametrize("name", FORMS)
def test_delta_equals_torch(name):
    form = FORMS[name]
    np.testing.assert_allclose(
        reference.delta_of(form, np.zeros(SHAPE, np.float32), 0.7),
        dense_by_torch(form).numpy() * 0.7,
        rtol=1e-6,
        atol=1e-6,
    )


def test_terms_add_up_before_the_one_addition_to_the_weight():
    weight = normal(*SHAPE)
    result = reference.apply(weight, [(FORMS["low_rank"], 1.0), (FORMS["sparse"], 0.5)])
    total = reference.delta_of(FORMS["low_rank"], weight) + reference.delta_of(
        FORMS["sparse"], weight, 0.5
    )
    np.testing.assert_array_equal(result, weight + total)


def test_the_weight_is_not_modified():
    weight = normal(*SHAPE)
    before = weight.copy()
    reference.apply(weight, [(FORMS["dense"], 1.0)])
    np.testing.assert_array_equal(weight, before)


def test_no_terms_is_the_base_to_the_bit():
    weight = normal(*SHAPE)
    np.testing.assert_array_equal(reference.apply(weight, []), weight)


def test_a_low_rank_sum_starts_at_rank_zero():
    """Sum in ascending order of rank: (1e8 - 1e8) + 1 is 1, and 1e8 + (1 - 1e8) would be 0."""
    a = np.array([[1e8], [-1e8], [1.0]], np.float32)
    form = LowRank(a, np.ones((3, 1), np.float32))
    assert reference.delta_of(form, np.zeros((1, 1), np.float32)) == 1.0


@pytest.mark.parametrize(
    ("form", "changed"),
    [
        (Sparse(u32(3, 8), normal(2), mode="set"), 2),
        (Block("row", u32(2), normal(1, 5), mode="set"), 5),
        (Block("col", u32(2), normal(1, 6), mode="set"), 6),
        (Dense(normal(6, 5), mode="set"), 30),
    ],
)
def test_mode_set_replaces_and_leaves_the_rest(form, changed):
    weight = np.zeros(SHAPE, np.float32)
    result = reference.apply(weight, [(form, 1.0)])
    assert np.count_nonzero(result) == changed
    assert set(result[result != 0].tolist()) == set(form.values.reshape(-1).tolist())
