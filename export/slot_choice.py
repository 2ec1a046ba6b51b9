"""Which weights of a model become slots of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from edge_lora.errors import UnknownNameError
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.slots import match_names, matches


def choose_slots(
    weights: Mapping[str, SlotWeight],
    others: Mapping[str, SlotWeight],
    patterns: Sequence[str] | None,
) -> list[str]:
    """Return the slots for the bundle: those asked for, or all that a linear layer reads.

    A pattern that matches no weight may name biases and norms.
    """
    if patterns is not None:
        beside = [p for p in patterns if not matches(p, weights) and matches(p, others)]
        among = [p for p in patterns if p not in beside]
        return [
            *(match_names(among, list(weights)) if among else []),
            *(match_names(beside, list(others)) if beside else []),
        ]
    chosen = [
        name
        for name, weight in weights.items()
        if weight.is_transposed or any(isinstance(m, torch.nn.Linear) for m in weight.modules)
    ]
    if not chosen:
        raise UnknownNameError(
            f"no slots found: the model has no linear layer, but {len(weights)} other weights. "
            "Name some with slot_names"
        )
    return chosen
