"""Rank reduction, against the exact SVD of dense deltas."""

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
from edge_lora.errors import UnsupportedError
from edge_lora.quantise import quantise
from edge_lora.reference import apply
from edge_lora.squeeze import leading_svd, squeeze

OUT, IN = 60, 44
RNG = np.random.default_rng(2)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def some(count, limit):
    return np.sort(RNG.choice(limit, count, replace=False)).astype(np.uint32)


def decaying(rank, ratio=0.6, out_features=OUT, in_features=IN):
    """Return a matrix whose singular values fall by ``ratio``."""
    u = np.linalg.qr(normal(out_features, rank))[0]
    v = np.linalg.qr(normal(in_features, rank))[0]
    return (u * ratio ** np.arange(rank) @ v.T).astype(np.float32)


FORMS = {
    "low_rank": (LowRank(normal(16, IN), normal(16, OUT), 0.25),),
    "two": (LowRank(normal(6, IN), normal(6, OUT), 2.0), LowRank(normal(4, IN), normal(4, OUT))),
    "wide": (LowRank(normal(IN + 9, IN), normal(IN + 9, OUT)),),
    "sparse": (Sparse(some(300, OUT * IN), normal(300), 0.5),),
    "rows": (Block("row", some(9, OUT), normal(9, IN)),),
    "dense": (Dense(decaying(IN, 0.9)),),
    "mixed": (LowRank(normal(2, IN), normal(2, OUT)), Block("col", some(7, IN), normal(7, OUT))),
}


def adapter_of(*forms, shape=(OUT, IN)):
    return Adapter("a", "test", BaseIdentity("0" * 64), {"w": Delta(shape, "F32", forms)})


def dense_of(adapter):
    (delta,) = adapter.deltas.values()
    zeros = np.zeros(delta.shape, np.float32)
    return apply(zeros, [(form, 1.0) for form in delta.forms]).astype(np.float64)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_the_energy_of_the_singular_values_left_out(kind, rank):
    before = adapter_of(*FORMS[kind])
    after, (report,) = squeeze(before, rank)
    (form,) = after.deltas["w"].forms
    values = np.linalg.svd(dense_of(before), compute_uv=False)
    left_out, energy = np.sum(values[rank:] ** 2), np.sum(values**2)
    assert (form.rank, form.scale, report.rank) == (rank, 1.0, rank)
    found = np.sum((dense_of(after) - dense_of(before)) ** 2)
    assert found == pytest.approx(left_out, rel=1e-4, abs=1e-9 * energy)
    assert report.discarded == pytest.approx(left_out / energy, rel=1e-4, abs=1e-9)


def test_a_true_low_rank_is_found_exactly():
    low = LowRank(normal(3, IN), normal(3, OUT))
    doubled = adapter_of(low, LowRank(low.a, low.bt, -0.5))
    after, (report,) = squeeze(doubled, 6)
    assert (report.rank_before, report.rank) == (6, 3)
    assert report.discarded < 1e-15
    np.testing.assert_allclose(dense_of(after), dense_of(doubled), atol=1e-5)


def test_the_low_rank_path_never_forms_the_delta(monkeypatch):
    import tracemalloc

    monkeypatch.setattr("edge_lora.squeeze.delta_of", None)
    wide = adapter_of(LowRank(normal(8, 3000), normal(8, 3000)), shape=(3000, 3000))
    tracemalloc.start()
    squeeze(wide, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 3000 * 4 / 10


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["low_rank", "dense", "sparse"])
def test_an_energy_takes_the_least_rank_that_keeps_it(kind, energy):
    before = adapter_of(*FORMS[kind])
    _, (report,) = squeeze(before, energy=energy)
    values = np.linalg.svd(dense_of(before), compute_uv=False) ** 2
    kept = np.cumsum(values) / values.sum()
    expected = int(np.flatnonzero(kept >= energy - 1e-7)[0]) + 1
    assert report.rank == expected
    assert report.discarded <= 1 - energy + 1e-7


def test_the_randomised_svd_is_as_good_as_the_exact_one():
    matrix = decaying(100, 0.9, 300, 200).astype(np.float64)
    found = leading_svd(matrix, 8, np.random.default_rng(0))
    exact = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(found.s, exact[:8], rtol=1e-6)
    rebuilt = (found.u * found.s) @ found.vt
    assert np.sum((rebuilt - matrix) ** 2) == pytest.approx(np.sum(exact[8:] ** 2), rel=1e-6)
    assert found.discarded(8) == pytest.approx(np.sum(exact[8:] ** 2) / np.sum(exact**2), rel=1e-6)


def test_the_report_is_true_where_the_spectrum_is_flat():
    """There the randomised SVD is not the best one; the error reported is its own."""
    matrix = normal(400, 300)
    before = adapter_of(Dense(matrix), shape=(400, 300))
    after, (report,) = squeeze(before, 16)
    error = np.sum((dense_of(after) - matrix) ** 2) / np.sum(matrix.astype(np.float64) ** 2)
    assert report.discarded == pytest.approx(error, rel=1e-5)
    best = np.sum(np.linalg.svd(matrix, compute_uv=False)[16:] ** 2) / np.sum(matrix**2)
    assert best < report.discarded < best * 1.02


def test_it_is_seeded():
    before = adapter_of(Dense(normal(200, 150)), shape=(200, 150))
    one, two = (squeeze(before, 4, seed=3)[0].content_hash for _ in range(2))
    assert one == two


def test_what_is_small_enough_stays_to_the_bit():
    form = LowRank(normal(4, IN), normal(4, OUT), 0.5, (2, 4), (1.0, 0.5))
    for arguments in ({"rank": 4}, {"rank": 9}, {"energy": 1.0}):
        after, (report,) = squeeze(adapter_of(form), **arguments)
        assert after.deltas["w"].forms == (form,)
        assert (report.rank_before, report.rank, report.discarded) == (4, 4, 0)


def test_values_keep_their_precision():
    half = LowRank(normal(8, IN, dtype=np.float16), normal(8, OUT, dtype=np.float16))
    (form,) = squeeze(adapter_of(half), 2)[0].deltas["w"].forms
    assert (form.a.dtype, form.bt.dtype) == (np.float16, np.float16)
    coded = quantise(adapter_of(half), 4)
    (form,) = squeeze(coded, 2)[0].deltas["w"].forms
    assert form.a.dtype == np.float32


def test_a_zero_delta():
    zero = adapter_of(LowRank(normal(4, IN), np.zeros((4, OUT), np.float32)))
    after, (report,) = squeeze(zero, 2)
    assert (report.rank, report.discarded) == (1, 0)
    assert not dense_of(after).any()


def test_conv_slots_are_squeezed_as_matrices():
    values = normal(8, 3, 3, 3)
    after, (report,) = squeeze(adapter_of(Dense(values), shape=values.shape), 8)
    assert report.rank == 8
    np.testing.assert_allclose(dense_of(after), values, atol=1e-5)


def test_row_scales_stay_and_others_are_left_whole():
    scale, bottleneck = RowScale(normal(OUT)), Bottleneck(normal(4, IN), normal(OUT, 4))
    replacing = Sparse(some(9, OUT * IN), normal(9), mode="set")
    forms = {
        "dora": (*FORMS["low_rank"], scale),
        "ia3": (scale,),
        "site": (bottleneck,),
        "set": (replacing,),
    }
    deltas = {slot: Delta((OUT, IN), "F32", f) for slot, f in forms.items()}
    deltas["norm"] = Delta((9,), "F32", (Dense(normal(9)),))
    before = Adapter("a", "test", BaseIdentity("0" * 64), deltas)
    after, report = squeeze(before, 2)
    assert after.deltas["dora"].forms[0].rank == 2
    assert after.deltas["dora"].forms[1] is scale
    for slot, (form, *_) in forms.items():
        if slot != "dora":
            assert after.deltas[slot].forms == (form,)
    assert [r.rank for r in report] == [2, 0, 0, 0, 0]
    assert "sparse with mode 'set' adds no matrix" in report[3].note
    del deltas["dora"]
    with pytest.raises(UnsupportedError, match="no slot of 'a' can be squeezed"):
        squeeze(Adapter("a", "test", BaseIdentity("0" * 64), deltas), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a rank or an energy"),
        ({"rank": 2, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "rank is 0, must be at least 1"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.1}, "energy is 1.1"),
        ({"energy": float("nan")}, "energy is nan"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(UnsupportedError, match=message):
        squeeze(adapter_of(*FORMS["low_rank"]), **arguments)
