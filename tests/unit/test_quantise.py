"""Any adapter in few bits."""

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Bottleneck, Delta, Dense, LowRank, RowScale, Sparse
from edge_lora.codebook import BITS, Coded, encode
from edge_lora.errors import UnknownNameError, UnsupportedError
from edge_lora.factor_codes import encode_pair
from edge_lora.quantise import quantise
from edge_lora.slot_errors import slot_errors

RNG = np.random.default_rng(1)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


@pytest.fixture
def adapter():
    index = np.sort(RNG.choice(64 * 48, 200, replace=False)).astype(np.uint32)
    deltas = {
        "low": Delta((64, 48), "F32", (
            LowRank(normal(8, 48), normal(8, 64), 0.5, (4, 8), (1.0, 0.5)),
            RowScale(normal(64)),
        ), "0123456789abcdef"),
        "sparse": Delta((64, 48), "F32", (Sparse(index, normal(200, dtype=np.float16)),)),
        "dense": Delta((8, 3, 3, 3), "F32", (Dense(normal(8, 3, 3, 3)),)),
        "site": Delta((64, 48), "F32", (
            Bottleneck(
                normal(4, 48), normal(64, 4), 1.0, "relu", "parallel", normal(4), normal(64)
            ),
        )),
    }  # fmt: skip
    return Adapter("mine", "test", BaseIdentity("0" * 64, "tiny"), deltas, 0.5, {"seed": 3})


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", ["tensor", "row", 32])
def test_every_value_field_is_coded_by_the_codebook(adapter, bits, group):
    low, scale = quantise(adapter, bits, group).deltas["low"].forms
    source, same = adapter.deltas["low"].forms
    for name in ("a", "bt"):
        expected = encode(getattr(source, name), bits, group)
        np.testing.assert_array_equal(getattr(low, name).codes, expected.codes)
        np.testing.assert_array_equal(getattr(low, name).decode(), expected.decode())
    assert (low.scale, low.ranks, low.rank_scale) == (0.5, (4, 8), (1.0, 0.5))
    assert scale is same


def test_indices_biases_and_metadata_stay(adapter):
    after = quantise(adapter, 2)
    (sparse,), (source,) = after.deltas["sparse"].forms, adapter.deltas["sparse"].forms
    assert sparse.indices is source.indices
    assert sparse.values.bits == 2
    (site,), (was,) = after.deltas["site"].forms, adapter.deltas["site"].forms
    assert isinstance(site.down, Coded)
    assert isinstance(site.up, Coded)
    assert site.down_bias is was.down_bias
    assert site.up_bias is was.up_bias
    assert after.deltas["low"].slot_hash == "0123456789abcdef"
    assert (after.name, after.base, after.alpha) == (adapter.name, adapter.base, 0.5)
    assert after.provenance["seed"] == 3
    assert after.provenance["quantised"] == {"bits": 2, "group": "tensor", "book": "gauss_l1"}


def test_the_file_round_trip_keeps_the_codes(adapter, tmp_path):
    after = quantise(adapter, 1, "row")
    assert Adapter.load(after.save(tmp_path / "q")).content_hash == after.content_hash


def test_more_bits_cost_less_error(adapter):
    totals = [sum(e.relative for e in slot_errors(adapter, quantise(adapter, b))) for b in BITS]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.1


def test_lloyd_max_has_the_smaller_squared_error():
    dense = Delta((200, 200), "F32", (Dense(normal(200, 200)),))
    before = Adapter("a", "test", BaseIdentity("0" * 64), {"w": dense})
    (l1,), (squared,) = (
        slot_errors(before, quantise(before, 2, book=book)) for book in ("gauss_l1", "lloyd_max")
    )
    assert squared.relative < l1.relative
    assert squared.relative**2 == pytest.approx(0.1177, abs=3e-3)  # of a normal distribution


def test_a_zero_b_stays_zero():
    form = LowRank(normal(4, 48), np.zeros((4, 64), np.float32))
    before = Adapter("a", "test", BaseIdentity("0" * 64), {"w": Delta((64, 48), "F32", (form,))})
    (after,) = quantise(before, 1).deltas["w"].forms
    assert not after.bt.decode().any()
    assert slot_errors(before, quantise(before, 1))[0].relative == 0


def test_coded_values_are_never_coded_again_into_as_many_bits(adapter):
    once = quantise(adapter, 4)
    assert quantise(once, 4).content_hash == once.content_hash
    assert quantise(once, 8).content_hash == once.content_hash
    assert quantise(once, 2).deltas["low"].forms[0].a.bits == 2


def test_what_would_not_become_smaller_stays():
    index = np.array([3, 9], np.uint32)
    delta = Delta((4, 4), "F32", (Sparse(index, normal(2, dtype=np.float16)),))
    before = Adapter("a", "test", BaseIdentity("0" * 64), {"w": delta})
    assert quantise(before, 1).deltas["w"].forms[0].values.dtype == np.float16


def test_bad_requests_are_refused(adapter):
    with pytest.raises(UnsupportedError, match="bits is 3; known: 1, 2, 4, 8"):
        quantise(adapter, 3)
    with pytest.raises(UnsupportedError, match="group 0, must be"):
        quantise(adapter, 4, 0)
    with pytest.raises(UnknownNameError, match="known: gauss_l1, lloyd_max"):
        quantise(adapter, 4, book="nf4")


@pytest.mark.parametrize("group", ["tensor", "row", 32])
@pytest.mark.parametrize("bits", BITS)
def test_factors_coded_together_give_a_closer_product(bits, group):
    a, bt = normal(6, 48) * np.geomspace(1, 20, 6, dtype=np.float32)[:, None], normal(6, 64)
    product = bt.T.astype(np.float64) @ a
    form = LowRank(a, bt, 0.5)
    before = Adapter("a", "test", BaseIdentity("0" * 64), {"w": Delta((64, 48), "F32", (form,))})
    (after,) = quantise(before, bits, group).deltas["w"].forms
    apart = encode(bt, bits, group).decode().T @ encode(a, bits, group).decode()
    together = after.bt.decode().T @ after.a.decode()
    assert np.linalg.norm(together - product) < 0.96 * np.linalg.norm(apart - product)
    assert after.scale == 0.5


def test_factors_coded_together_are_never_worse():
    """Rows that repeat, rows of zeros, a rank of one: nothing to gain, nothing lost."""
    for a, bt in (
        (np.ones((3, 40), np.float32), normal(3, 50)),
        (np.zeros((2, 40), np.float32), normal(2, 50)),
        (normal(1, 40), normal(1, 50)),
        (normal(2, 40) * np.float32(1e-20), normal(2, 50) * np.float32(1e15)),
    ):
        coded_a, coded_bt = encode_pair(a, bt, 2, "tensor", "lloyd_max")
        product = bt.T.astype(np.float64) @ a
        apart = encode(bt, 2, "tensor", "lloyd_max").decode().T.astype(np.float64)
        apart = apart @ encode(a, 2, "tensor", "lloyd_max").decode()
        together = coded_bt.decode().T.astype(np.float64) @ coded_a.decode()
        worst = np.linalg.norm(apart - product)
        assert np.linalg.norm(together - product) <= worst * (1 + 1e-9)
