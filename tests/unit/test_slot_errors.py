"""The distance of two adapters, against dense NumPy."""

import numpy as np
import pytest

from edge_lora import (
    Adapter,
    BaseIdentity,
    Block,
    Bottleneck,
    Delta,
    Dense,
    LowRank,
    RowScale,
    Sparse,
)
from edge_lora.errors import ShapeError, UnsupportedError
from edge_lora.forms import to_fp32
from edge_lora.quantise import quantise
from edge_lora.reference import apply
from edge_lora.slot_errors import slot_errors, total_error

OUT, IN = 24, 40
RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def some(count, limit):
    return np.sort(RNG.choice(limit, count, replace=False)).astype(np.uint32)


FORMS = {
    "low_rank": (LowRank(normal(4, IN), normal(4, OUT), 0.5),),
    "two_low_ranks": (
        LowRank(normal(4, IN), normal(4, OUT)), LowRank(normal(2, IN), normal(2, OUT)),
    ),
    "full_rank": (LowRank(normal(30, IN), normal(30, OUT)),),
    "sparse": (Sparse(some(90, OUT * IN), normal(90), 2.0),),
    "rows": (Block("row", some(5, OUT), normal(5, IN)),),
    "columns": (Block("col", some(5, IN), normal(5, OUT, dtype=np.float16), 3.0),),
    "dense": (Dense(normal(OUT, IN)),),
    "set": (Sparse(some(90, OUT * IN), normal(90), mode="set"),),
    "mixed": (
        LowRank(normal(4, IN), normal(4, OUT), 0.5),
        Sparse(some(90, OUT * IN), normal(90)),
        Block("col", some(5, IN), normal(5, OUT)),
    ),
}  # fmt: skip


def adapter_of(forms, shape=(OUT, IN), alpha=0.7, slot="w"):
    return Adapter("a", "test", BaseIdentity("0" * 64), {slot: Delta(shape, "F32", forms)}, alpha)


def dense_of(adapter):
    (delta,) = adapter.deltas.values()
    terms = [(form, adapter.alpha) for form in delta.forms]
    return apply(np.zeros(delta.shape, np.float32), terms).astype(np.float64)


@pytest.mark.parametrize("kind", FORMS)
def test_errors_are_those_of_the_dense_deltas(kind, monkeypatch):
    monkeypatch.setattr("edge_lora.slot_errors._BLOCK_VALUES", 7 * IN)  # blocks that do not divide
    before = adapter_of(FORMS[kind])
    after = quantise(before, 4)
    (error,) = slot_errors(before, after)
    old, new = dense_of(before), dense_of(after)
    factor = before.alpha if kind == "set" else 1.0  # what replaces has no strength
    assert error.norm == pytest.approx(np.linalg.norm(old) * factor, rel=1e-6)
    assert error.relative == pytest.approx(
        np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-5
    )
    assert 0.01 < error.relative < 0.3


def test_a_small_difference_of_low_ranks_is_exact():
    """Differences of Gram products would lose it in their rounding."""
    form = FORMS["low_rank"][0]
    near = LowRank(form.a.copy(), form.bt, form.scale)
    near.a[0, 0] = np.nextafter(near.a[0, 0], np.float32(9))
    (error,) = slot_errors(adapter_of((form,)), adapter_of((near,)))
    step = (near.a.astype(np.float64) - form.a)[0, 0]
    expected = abs(step) * np.linalg.norm(form.bt[0].astype(np.float64)) * 0.5 * 0.7
    assert error.relative * error.norm == pytest.approx(expected, rel=1e-4)


def test_the_strength_of_both_counts():
    before = adapter_of(FORMS["low_rank"])
    (error,) = slot_errors(before, before.scaled(0.5))
    assert error.relative == pytest.approx(0.5)


def test_a_conv_slot_and_a_vector():
    for shape in ((8, 3, 3, 3), (17,)):
        before = adapter_of((Dense(normal(*shape)),), shape)
        (error,) = slot_errors(before, quantise(before, 8))
        assert 0 < error.relative < 0.05


def test_a_bottleneck_counts_as_its_linear_map():
    before = adapter_of((Bottleneck(normal(4, IN), normal(OUT, 4), 2.0),))
    after = quantise(before, 2)
    (error,) = slot_errors(before, after)

    def map_of(adapter):
        (form,) = adapter.deltas["w"].forms
        return form.scale * to_fp32(form.up) @ to_fp32(form.down)

    difference = np.linalg.norm(map_of(after) - map_of(before))
    assert error.relative == pytest.approx(difference / np.linalg.norm(map_of(before)), rel=1e-5)


def test_zero_deltas():
    zero = adapter_of((LowRank(normal(4, IN), np.zeros((4, OUT), np.float32)),))
    assert slot_errors(zero, zero)[0].relative == 0
    assert slot_errors(zero, adapter_of(FORMS["low_rank"]))[0].relative == np.inf
    assert total_error(slot_errors(zero, zero)) == 0


def test_the_total_weighs_slots_by_their_norm():
    deltas = {
        "big": Delta((2, 2), "F32", (Dense(np.full((2, 2), 100, np.float32)),)),
        "small": Delta((2, 2), "F32", (Dense(np.full((2, 2), 1, np.float32)),)),
    }
    before = Adapter("a", "test", BaseIdentity("0" * 64), deltas)
    off = {**deltas, "small": Delta((2, 2), "F32", (Dense(np.zeros((2, 2), np.float32)),))}
    errors = slot_errors(before, Adapter("b", "test", BaseIdentity("0" * 64), off))
    assert [e.relative for e in errors] == [0, 1]
    assert total_error(errors) == pytest.approx(2 / np.hypot(200, 2))


def test_row_scales_are_left_out_and_must_be_the_same():
    scale = RowScale(normal(OUT))
    before = adapter_of((*FORMS["low_rank"], scale))
    assert slot_errors(before, before)[0].norm == slot_errors(
        adapter_of(FORMS["low_rank"]), adapter_of(FORMS["low_rank"])
    )[0].norm  # fmt: skip
    with pytest.raises(UnsupportedError, match="RowScale forms differ"):
        slot_errors(before, adapter_of((*FORMS["low_rank"], RowScale(normal(OUT)))))


def test_other_slots_are_refused():
    with pytest.raises(ShapeError, match="same slots: v, w"):
        slot_errors(adapter_of(FORMS["dense"]), adapter_of(FORMS["dense"], slot="v"))
