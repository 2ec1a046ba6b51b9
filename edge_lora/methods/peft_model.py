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
from edge_lora.interop.binding import bound_to
from edge_lora.interop.peft import TYPES
from edge_lora.interop.peft_config import MERGED_TYPES, parse_config
from edge_lora.interop.peft_source import tied_problem
from edge_lora.methods.model_base import ModelBase

if TYPE_CHECKING:
    from peft import PeftModel


def from_peft_model(model: PeftModel, name: str = "", base: nn.Module | None = None) -> Adapter:
    """Return the active adapter of a PEFT model as dense deltas of its base.

    Args:
        model: As ``get_peft_model`` or ``PeftModel.from_pretrained`` return it, unmerged. It is
            copied, not changed.
        name: Of the adapter; by default the type's.
        base: The model as it was before PEFT wrapped it. By default the one inside ``model``,
            which does where the base itself was not trained: no ``bias``, no ``modules_to_save``.

    Returns:
        An adapter bound to the base.

    Raises:
        UnsupportedError: If what it does is no change of weights, if it changed the base before
            training, if the base is needed, or if PEFT cannot merge it; with the reason.
        UnknownNameError: If its type is not known here.

    Cost:
        Two copies of the model, one of them in fp32; with ``base`` only that one.
    """
    raw: dict[str, Any] = model.active_peft_config.to_dict()
    kind = str(getattr(raw["peft_type"], "value", raw["peft_type"]))
    parse_config({**raw, "peft_type": kind}, (*TYPES, *MERGED_TYPES))
    if base is None:
        _require_untrained_base(raw)
    try:
        before = ModelBase(copy.deepcopy(model).unload() if base is None else base)
        merged = copy.deepcopy(model).float().merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        raise UnsupportedError(f"PEFT cannot merge this {kind} adapter: {error}") from error
    adapter = Adapter(
        name=name or kind.lower(),
        method=kind.lower(),
        base=BaseIdentity(""),
        deltas=_differences(before, ModelBase(merged), kind),
        provenance={"imported_from": "PEFT, merged", "peft_type": kind},
    )
    return bound_to(adapter, before.slots)


def _require_untrained_base(config: dict[str, Any]) -> None:
    """Refuse settings under which PEFT trains parameters of the base itself, and keeps them."""
    trained = [
        f"{key}={config[key]!r:.60}"
        for key in ("bias", "modules_to_save")
        if config.get(key) not in (None, "none", [])
    ]
    if trained:
        raise UnsupportedError(
            f"{' and '.join(trained)} trained parameters of the base, and the model no longer has "
            "them as they were; give base=: the model before PEFT wrapped it"
        )


def _differences(base: ModelBase, after: ModelBase, kind: str) -> dict[str, Delta]:
    """Return what changed by slot; raise UnsupportedError if something else did, or nothing."""
    problems = [f"{name}: the base has no such slot" for name in sorted(after.names - base.names)]
    problems += [f"{name}: gone from the merged model" for name in sorted(base.names - after.names)]
    deltas: dict[str, Delta] = {}
    for name in sorted(base.names & after.names):
        before, merged = base.weight(name), after.weight(name)
        if before.shape != merged.shape:
            problems.append(f"{name}: {before.shape} in the base, {merged.shape} when merged")
        elif np.array_equal(before, merged):
            continue
        elif name not in base.slots:
            problems.append(f"{name}: changed, and no adapter can change it")
        elif base.slots[name].aliases:
            problems.append(tied_problem(name, base.slots[name]))
        else:
            deltas[name] = Delta(before.shape, "F32", (Dense(merged - before),))
    if not deltas:
        problems.append("it changes no weight")
    if problems:
        raise UnsupportedError(list_all(f"this {kind} adapter cannot be imported", problems))
    return deltas
