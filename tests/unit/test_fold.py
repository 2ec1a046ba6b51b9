"""Folded bottlenecks, against the branch as NumPy computes it."""

from dataclasses import replace

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Bottleneck, Delta, LowRank, Slot, SlotTable, reference
from edge_lora.codebook import Coded, encode
from edge_lora.errors import UnsupportedError
from edge_lora.fold import fold_linear
from edge_lora.forms import to_fp32

RNG = np.random.default_rng(4)
SLOTS = SlotTable(
    [Slot("q.weight", (7, 5), "F32", "ab" * 32), Slot("mlp", (7, 5), "F32", "", "site")]
)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def adapter(*forms, name="q"):
    return Adapter("a", "test", BaseIdentity("f"), {name: Delta((7, 5), "F32", forms)})


PLAIN = Bottleneck(normal(2, 5), normal(7, 2), 0.7, "none")


@pytest.mark.parametrize(
    "branch",
    [
        PLAIN,
        replace(PLAIN, down=encode(PLAIN.down, 1), up=encode(PLAIN.up, 2)),
        replace(PLAIN, up=encode(PLAIN.up, 4, "row")),
    ],
    ids=["fp32", "coded", "coded by rows"],
)
def test_the_weight_changes_as_the_branch_adds(branch):
    weight, x = normal(7, 5), normal(11, 5)
    (delta,) = fold_linear(adapter(branch, PLAIN), SLOTS).deltas.values()
    merged = reference.apply(weight, [(form, 1.0) for form in delta.forms])
    wanted = x @ weight.T
    for one in (branch, PLAIN):
        wanted = wanted + one.scale * (x @ to_fp32(one.down).T) @ to_fp32(one.up).T
    np.testing.assert_allclose(x @ merged.T, wanted, atol=1e-5)
    assert (delta.shape, delta.slot_hash) == ((7, 5), SLOTS["q.weight"].slot_hash)


def test_codes_of_one_group_stay_codes():
    coded = replace(PLAIN, down=encode(PLAIN.down, 1), up=encode(PLAIN.up, 1))
    ((form,),) = (d.forms for d in fold_linear(adapter(coded), SLOTS).deltas.values())
    assert isinstance(form.a, Coded)
    assert isinstance(form.bt, Coded)
    np.testing.assert_array_equal(form.bt.decode(), coded.up.decode().T)


def test_other_forms_stay_and_join():
    low_rank = LowRank(normal(1, 5), normal(1, 7))
    both = replace(
        adapter(PLAIN),
        deltas={**adapter(low_rank, name="q.weight").deltas, **adapter(PLAIN).deltas},
    )
    (delta,) = fold_linear(both, SLOTS).deltas.values()
    assert delta.forms[0] is low_rank
    assert len(delta.forms) == 2
    alone = adapter(low_rank, name="q.weight")
    assert fold_linear(alone, SLOTS).deltas == alone.deltas


@pytest.mark.parametrize(
    ("branch", "name", "reason"),
    [
        (replace(PLAIN, act="relu"), "q", "activation is 'relu'"),
        (Bottleneck(normal(2, 7), normal(7, 2), 1, "none", "sequential"), "q", "layer's output"),
        (replace(PLAIN, up_bias=normal(7)), "q", "has biases"),
        (PLAIN, "mlp", "no linear weight"),
        (PLAIN, "norm->q", "no linear weight"),
    ],
)
def test_what_is_no_delta_of_a_weight_is_refused(branch, name, reason):
    with pytest.raises(UnsupportedError, match=f"{name}: .*{reason}"):
        fold_linear(adapter(branch, name=name), SLOTS)
