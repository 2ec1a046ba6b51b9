"""Bottlenecks without an activation, beside a linear layer, as a low-rank delta of its weight.

    y = W x + b + scale * up @ (down @ x)  =  (W + scale * up @ down) x + b

So such an adapter needs no site and can be fused into any bundle that has the weight as a slot.
"""

from __future__ import annotations

from dataclasses import replace

from edge_lora import codebook
from edge_lora.adapter import Adapter, Delta
from edge_lora.codebook import Coded
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import Bottleneck, Form, LowRank, Values, to_array
from edge_lora.slots import Slot, SlotTable


def fold_linear(adapter: Adapter, slots: SlotTable) -> Adapter:
    """Return the adapter with every bottleneck as a low-rank delta, exactly.

    Args:
        adapter: Its bottlenecks have no activation and no biases, are parallel, and stand at sites
            that are linear layers themselves (``layers.0.q_proj``). Other forms stay as they are.
        slots: Of the base. ``<site>.weight`` is where the bottlenecks of a site go.

    Raises:
        UnsupportedError: If a bottleneck cannot be folded; lists every one with the reason.
    """
    problems: list[str] = []
    forms: dict[str, tuple[Form, ...]] = {}
    for name, delta in adapter.deltas.items():
        branches = [form for form in delta.forms if isinstance(form, Bottleneck)]
        if not branches:
            forms[name] = (*forms.get(name, ()), *delta.forms)
            continue
        slot = slots.get(f"{name}.weight")
        reasons = [_reason(branch, delta, slot) for branch in branches]
        problems += [f"{name}: {reason}" for reason in reasons if reason]
        if slot is not None and not any(reasons):
            folded = [LowRank(b.down, _transposed(b.up), b.scale) for b in branches]
            forms[slot.name] = (*forms.get(slot.name, ()), *folded)
    if problems:
        title = f"adapter {adapter.name!r} cannot be folded into weights"
        raise UnsupportedError(list_all(title, problems))
    deltas = {
        name: adapter.deltas[name]
        if name in adapter.deltas and adapter.deltas[name].forms == these
        else Delta(slots[name].shape, slots[name].dtype, these, slots[name].slot_hash)
        for name, these in forms.items()
    }
    return replace(adapter, deltas=deltas)


def _reason(branch: Bottleneck, delta: Delta, slot: Slot | None) -> str:
    """Return why a bottleneck is no delta of the weight of ``slot``; "" if it is one."""
    if branch.act != "none":
        return f"its activation is {branch.act!r}"
    if branch.placement != "parallel":
        return "it reads the layer's output, so its delta depends on the weight and the bias"
    if branch.down_bias is not None or branch.up_bias is not None:
        return "it has biases"
    if slot is None or slot.kind != "linear" or slot.shape != delta.shape:
        return f"the base has no linear weight of shape {delta.shape} there"
    return ""


def _transposed(values: Values) -> Values:
    """Return (d_out, rank) values as (rank, d_out); codes of one group stay codes."""
    if not isinstance(values, Coded) or values.group != "tensor":
        return to_array(values).T
    codes = codebook.unpack(values.codes, values.bits, values.size).reshape(values.shape)
    packed = codebook.pack(codes.T.reshape(-1), values.bits)
    return replace(values, codes=packed, shape=values.shape[::-1])
