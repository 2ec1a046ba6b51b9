"""Unfused adapters: low-rank factors fed to the graph's slots for one call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import Manifest
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.runtime.adapters import LoadedAdapter
from edge_lora.runtime.engines import Engine


@dataclass(frozen=True)
class SlotInputs:
    """Graph inputs that carry one adapter.

    Attributes:
        arrays: Input name -> array; kept because the engine's tensors look into them.
        values: Input name -> the engine's tensor.
    """

    arrays: dict[str, NDArray[np.float32]]
    values: dict[str, object]


def slot_inputs(adapter: LoadedAdapter, manifest: Manifest, engine: Engine) -> SlotInputs:
    """Return the inputs that make one call run with ``adapter``.

    Raises:
        UnsupportedError: If the bundle has no slots as inputs, or the adapter is more than
            low-rank.
    """
    if not any(place.lora_inputs for place in manifest.stored.values()):
        raise UnsupportedError(
            "this bundle has no slots as inputs, so an adapter cannot run unfused. "
            "Export it with: edge-lora export … --slots inputs, or use set_adapter()"
        )
    file = adapter.open()
    arrays: dict[str, NDArray[np.float32]] = {}
    problems = []
    for name, delta in adapter.deltas.items():
        factors = file.low_rank(name)
        inputs = manifest.stored[manifest.slots[name].name].lora_inputs
        if factors is None:
            problems.append(f"{name}: form {'+'.join(delta.forms)} is not low-rank")
        elif inputs is None:
            problems.append(f"{name}: the bundle has no inputs for this slot")
        else:
            arrays.update(zip(inputs, factors, strict=True))
    if problems:
        title = f"adapter {adapter.name!r} cannot run unfused; use set_adapter()"
        raise UnsupportedError(list_all(title, problems))
    return SlotInputs(arrays, {name: engine.value(array) for name, array in arrays.items()})
