from dataclasses import replace

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, Dense, LowRank, Sparse
from edge_lora.errors import ShapeError

BASE = BaseIdentity("f" * 64, "tiny")


def adapter(**deltas):
    slots = deltas or {"q.weight": dense(1.0)}
    return Adapter("test", "shira", BASE, slots)


def dense(value, **options):
    return Delta((2, 3), "F32", (Dense(np.full((2, 3), value, np.float32), **options),))


def test_everything_wrong_is_listed():
    broken = Delta((2, 3), "F32", (Dense(np.full((3, 2), np.nan, np.float32)),))
    with pytest.raises(ShapeError) as caught:
        adapter(a=broken, b=Delta((2, 3), "F32", ()), c=dense(1.0))
    message = str(caught.value)
    assert "a: form 0: values are (3, 2), slot is (2, 3)" in message
    assert "a: form 0: values holds NaN" in message
    assert "b: no forms" in message
    assert "c:" not in message


def test_no_slots_is_an_error():
    with pytest.raises(ShapeError, match="no slots"):
        Adapter("test", "lora", BASE, {})


def test_a_set_form_stands_alone():
    both = Delta((2, 3), "F32", dense(1.0).forms + dense(2.0, mode="set").forms)
    with pytest.raises(ShapeError, match="must stand alone"):
        adapter(a=both)


def test_infinite_alpha_is_refused():
    with pytest.raises(ShapeError, match="alpha"):
        replace(adapter(), alpha=float("inf"))


def test_scaled_multiplies_alpha_and_shares_the_arrays():
    one = adapter()
    assert one.scaled(0.5).scaled(0.5).alpha == 0.25
    assert one.scaled(0.5).deltas is one.deltas


def test_nbytes():
    sparse = Sparse(np.array([1], np.uint32), np.ones(1, np.float16))
    assert adapter(a=dense(1.0), b=Delta((2, 3), "F32", (sparse,))).nbytes == 24 + 6


def test_content_hash_is_about_what_the_adapter_does():
    one = adapter(a=dense(1.0), b=dense(2.0))
    assert replace(one, name="other", provenance={"seed": 1}).content_hash == one.content_hash
    assert adapter(b=dense(2.0), a=dense(1.0)).content_hash == one.content_hash


@pytest.mark.parametrize(
    "other",
    [
        adapter(a=dense(1.5)),
        adapter(b=dense(1.0)),
        adapter(a=dense(1.0, scale=2.0)),
        adapter(a=dense(1.0, mode="set")),
        adapter(a=dense(1.0)).scaled(2.0),
        replace(adapter(a=dense(1.0)), base=BaseIdentity("0" * 64)),
        adapter(a=Delta((2, 3), "F32", (LowRank(np.ones((1, 3), "f4"), np.ones((1, 2), "f4")),))),
    ],
)
def test_content_hash_changes_with_what_it_does(other):
    assert other.content_hash != adapter(a=dense(1.0)).content_hash
