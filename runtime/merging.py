"""Base weights and adapters as one array per slot, where no patch can be compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_lora import reference
from edge_lora.adapter import Adapter
from edge_lora.bundle import Manifest
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import Bottleneck, WeightForm, is_replacing


def merge(
    parts: Sequence[tuple[Adapter, float]],
    manifest: Manifest,
    base: Callable[[str], NDArray[np.float32]],
) -> dict[str, NDArray[np.float32]]:
    """Return slot -> base + weighted sum of ``parts``, fp32 in the slot's shape.

    Args:
        parts: Adapters and their weights; bottlenecks are left out, they are fed (``ActiveSites``).
        manifest: Of the bundle.
        base: Returns a slot's own weight, fp32.

    Raises:
        UnsupportedError: If forms that replace a weight are scaled or composed; lists them.
    """
    terms: dict[str, list[tuple[WeightForm, float]]] = {}
    for adapter, weight in parts:
        for name, delta in adapter.deltas.items():
            slot = manifest.slots[name].name
            for form in delta.forms:
                if not isinstance(form, Bottleneck):
                    terms.setdefault(slot, []).append((form, weight * adapter.alpha))
    problems = [p for slot, these in terms.items() for p in _set_problems(slot, these)]
    if problems:
        raise UnsupportedError(list_all("the adapter cannot be fused", problems))
    return {slot: reference.apply(base(slot), these) for slot, these in terms.items()}


def _set_problems(slot: str, terms: Sequence[tuple[WeightForm, float]]) -> list[str]:
    """Return why forms that replace a weight cannot be applied as asked."""
    factors = [factor for form, factor in terms if is_replacing(form)]
    problems = [
        f"{slot}: a form with mode 'set' has strength 1 only, not {factor:g}"
        for factor in factors
        if factor != 1
    ]
    if factors and len(terms) > 1:
        problems.append(f"{slot}: a form with mode 'set' must stand alone")
    return problems
