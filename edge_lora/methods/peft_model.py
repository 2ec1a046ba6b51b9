"""Any adapter in a live PEFT model as one of ours: what PEFT merges, minus the base.

For the types that ``from_peft`` does not read from their files. PEFT does the work, so every type
that it can merge is covered; the deltas are dense (``edge_lora.squeeze`` makes them low-rank).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import Dense
from edge_lora.interop.peft import TYPES
from edge_lora.interop.peft_config import MERGED_TYPES, parse_config
from edge_lora.interop.peft_source import tied_problem
from edge_lora.methods.model_base import ModelBase

if TYPE_CHECKING:
    from peft import PeftModel


def from_peft_model(model: PeftModel, name: str = "") -> Adapter:
    """Return the active adapter of a PEFT model as dense deltas of its base.

    Args:
        model: As ``get_peft_model`` or ``PeftModel.from_pretrained`` return it, unmerged. It is
            copied, not changed.
        name: Of the adapter; by default the type's.

    Returns:
        An adapter bound to the base inside ``model``.

    Raises:
        UnsupportedError: If what it does is no change of weights, if it changed the base before
            training, or if PEFT cannot merge it; with the reason.
        UnknownNameError: If its type is not known here.

    Cost:
        Two copies of the model, one of them in fp32.
    """
    raw: dict[str, Any] = model.active_peft_config.to_dict()
    kind = str(getattr(raw["peft_type"], "value", raw["peft_type"]))
    parse_config({**raw, "peft_type": kind}, (*TYPES, *MERGED_TYPES))
    try:
        base = ModelBase(copy.deepcopy(model).unload())
        merged = copy.deepcopy(model).float().merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        raise UnsupportedError(f"PEFT cannot merge this {kind} adapter: {error}") from error
    deltas = _differences(base, merged, kind)
    return Adapter(
        name=name or kind.lower(),
        method=kind.lower(),
        base=BaseIdentity(base.slots.fingerprint, base.slots.base_id),
        deltas=deltas,
        provenance={"imported_from": "PEFT, merged", "peft_type": kind},
    )


def _differences(base: ModelBase, merged: nn.Module, kind: str) -> dict[str, Delta]:
    after = ModelBase(merged)
    deltas: dict[str, Delta] = {}
    problems = [f"{name}: the base has no such slot" for name in after.names - base.names]
    for slot in base.slots.values():
        if slot.name not in after.names:
            problems.append(f"{slot.name}: gone from the merged model")
            continue
        values = after.weight(slot.name) - base.weight(slot.name)
        if not np.any(values):
            continue
        if slot.aliases:
            problems.append(tied_problem(slot.name, slot))
        deltas[slot.name] = Delta(slot.shape, slot.dtype, (Dense(values),), slot.slot_hash)
    if not deltas:
        problems.append("it changes no weight")
    if problems:
        raise UnsupportedError(list_all(f"this {kind} adapter cannot be imported", problems))
    return deltas
