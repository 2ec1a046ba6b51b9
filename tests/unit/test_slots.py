import hashlib
from dataclasses import replace

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Bottleneck, Delta, Dense, LowRank, Slot, SlotTable
from edge_lora.errors import AdapterMismatchError, UnknownNameError
from edge_lora.slots import fingerprint_of, match_names


def slot(name, shape=(2, 3), dtype="F32", aliases=()):
    return Slot(name, shape, dtype, hashlib.sha256(name.encode()).hexdigest(), aliases=aliases)


TABLE = SlotTable(
    [
        slot("a.q_proj.weight"),
        slot("a.k_proj.weight"),
        slot("embed.weight", aliases=("head.weight",)),
    ],
    base_id="tiny",
)


def adapter_for(*names, table=TABLE, shape=(2, 3), dtype="F32"):
    deltas = {
        name: Delta(shape, dtype, (Dense(np.ones(shape, np.float32)),), table[name].slot_hash)
        for name in names
    }
    return Adapter("test", "shira", BaseIdentity(table.fingerprint, "tiny"), deltas)


def test_a_fitting_adapter_passes():
    TABLE.check(adapter_for("a.q_proj.weight", "embed.weight"))


def test_an_alias_is_the_same_slot():
    assert TABLE["head.weight"] is TABLE["embed.weight"]
    TABLE.check(adapter_for("head.weight"))
    assert list(TABLE) == ["a.q_proj.weight", "a.k_proj.weight", "embed.weight"]


def test_one_tensor_under_two_names_is_refused():
    with pytest.raises(
        AdapterMismatchError, match=r"head.weight: is the same tensor as embed.weight"
    ):
        TABLE.check(adapter_for("embed.weight", "head.weight"))


def test_another_base_is_refused_by_name():
    adapter = replace(adapter_for("embed.weight"), base=BaseIdentity("0" * 64, "other"))
    with pytest.raises(AdapterMismatchError) as caught:
        TABLE.check(adapter)
    assert "Trained on base other (000000000000…), this is tiny" in str(caught.value)


def unbound(adapter):
    return replace(adapter, base=BaseIdentity(""))


def test_an_unbound_adapter_fits_by_names_and_shapes():
    TABLE.check(unbound(adapter_for("embed.weight", dtype="F16")))


def test_an_unbound_adapter_is_still_held_to_names_shapes_and_hashes():
    delta = adapter_for("a.q_proj.weight").deltas["a.q_proj.weight"]
    deltas = {
        "nowhere.weight": delta,
        "a.k_proj.weight": replace(delta, slot_hash="0" * 16),
        **adapter_for("embed.weight", shape=(2, 4)).deltas,
    }
    with pytest.raises(AdapterMismatchError) as caught:
        TABLE.check(unbound(replace(adapter_for("embed.weight"), deltas=deltas)))
    message = str(caught.value)
    assert "nowhere.weight: no such slot" in message
    assert "a.k_proj.weight: trained on weight 0000000000000000" in message
    assert "embed.weight: made for shape (2, 4)" in message
    assert "Trained on base" not in message


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_an_unbound_adapter_cannot_mean_one_of_two_tied_modules(name):
    adapter = unbound(adapter_for(name))
    unknown = replace(adapter, deltas={name: replace(adapter.deltas[name], slot_hash="")})
    other = ({"embed.weight", "head.weight"} - {name}).pop()
    with pytest.raises(AdapterMismatchError, match=f"{name}: shares its tensor with {other}"):
        TABLE.check(unknown)
    TABLE.check(replace(unknown, base=BaseIdentity(TABLE.fingerprint)))
    TABLE.check(adapter)  # with the slot's hash: it was made for this very tensor


def test_every_mismatch_is_in_one_message():
    good = adapter_for("a.q_proj.weight").deltas["a.q_proj.weight"]
    wrong_shape = adapter_for("a.k_proj.weight", shape=(2, 4)).deltas["a.k_proj.weight"]
    adapter = replace(
        adapter_for("embed.weight", dtype="F16"),
        deltas={
            "a.q_proj.weights": good,
            "a.k_proj.weight": wrong_shape,
            "embed.weight": replace(good, dtype="F16", slot_hash="0" * 16),
        },
    )
    problems = TABLE.problems(adapter)
    assert problems[0] == "a.q_proj.weights: no such slot (close: a.q_proj.weight)"
    assert problems[1] == "a.k_proj.weight: made for shape (2, 4), slot is (2, 3)"
    assert problems[2] == "embed.weight: made for dtype F16, slot is F32"
    assert problems[3].startswith("embed.weight: trained on weight 0000000000000000, slot is ")


def test_the_fingerprint_follows_its_definition():
    one = TABLE["a.q_proj.weight"]
    text = f"{one.name}\0F32\0[2, 3]\0{one.sha256}\n"
    assert fingerprint_of([one]) == hashlib.sha256(text.encode()).hexdigest()


def test_the_fingerprint_ignores_order_and_sees_content():
    a, b = slot("a"), slot("b")
    assert fingerprint_of([a, b]) == fingerprint_of([b, a])
    assert fingerprint_of([a, b]) != fingerprint_of([a, replace(b, sha256="0" * 64)])
    assert fingerprint_of([a, b]) != fingerprint_of([a])


NAMES = ["l.0.q_proj.weight", "l.0.k_proj.weight", "l.1.q_proj.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.q_proj"], [0, 2]),
        (["*.q_proj.weight"], [0, 2]),
        (["norm", "l.0.*"], [0, 1, 3]),
        (["*"], [0, 1, 2, 3]),
        (["l.0.q_proj", "*.q_proj"], [0, 2]),
    ],
)
def test_patterns(patterns, expected):
    assert match_names(patterns, NAMES) == [NAMES[i] for i in expected]


def test_a_pattern_without_a_match_suggests_close_names():
    with pytest.raises(UnknownNameError) as caught:
        match_names(["*.q_projj", "*.k_proj"], NAMES)
    message = str(caught.value)
    assert "pattern '*.q_projj' matches none of 4 slots" in message
    assert "'q_proj' (2)" in message


@pytest.mark.parametrize(("kind", "place"), [("linear", "a weight"), ("site", "a site")])
def test_a_form_in_the_wrong_place_does_not_fit(kind, place):
    values = np.ones((1, 2), np.float32)
    form = LowRank(values, values) if kind == "site" else Bottleneck(values, values.T)
    table = SlotTable([Slot("w", (2, 2), "F32", "", kind)])
    adapter = Adapter("x", "x", BaseIdentity(""), {"w": Delta((2, 2), "F32", (form,))})
    (problem,) = table.problems(adapter)
    assert problem.startswith(f"w: is {place}, which takes no")
