"""A torch model as the base that an importer asks for names, shapes, hashes and values."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edge_lora.methods.base_slots import (
    SlotWeight,
    find_others,
    find_weights,
    slot_of,
    slot_table,
)
from edge_lora.slots import SlotTable


class ModelBase:
    """All parameters of an unadapted torch model: its slots, and its norms and biases as "other".

    The fingerprint is that of ``slot_table``: norms and biases do not count.
    """

    def __init__(self, model: nn.Module, base_id: str = "") -> None:
        """Hold ``model``; nothing is read before it is asked for."""
        self._model = model
        self._base_id = base_id

    @cached_property
    def slots(self) -> SlotTable:
        """The slots of the model, then every other parameter that has an axis: norms, biases."""
        table = slot_table(self._model, self._base_id)
        others = [slot_of(weight) for weight in find_others(self._model).values()]
        return SlotTable([*table.values(), *others], table.base_id, table.fingerprint)

    @cached_property
    def names(self) -> set[str]:
        """Names of all parameters, those that share a tensor too; reads no values."""
        return {name for name, _ in self._model.named_parameters(remove_duplicate=False)}

    @cached_property
    def _weights(self) -> dict[str, SlotWeight]:
        weights = find_weights(self._model).values()
        return {name: weight for weight in weights for name in (weight.name, *weight.aliases)}

    def weight(self, name: str) -> NDArray[np.float32]:
        """Return a parameter, fp32, in the shape of its slot."""
        found = self._weights.get(name)
        tensor = found.tensor if found else self._model.get_parameter(name).detach()
        values: NDArray[np.float32] = tensor.float().cpu().numpy()
        return values

    def stores_transposed(self, name: str) -> bool:
        """Whether the module stores (in, out) where the slot is (out, in)."""
        found = self._weights.get(name)
        return found is not None and found.is_transposed
