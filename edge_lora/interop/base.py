"""The base that a stranger's adapter is meant for: names, shapes, hashes and, if need be, values.

Most files say neither which base they were trained on nor the shapes of its weights. An importer
that is given a base checks the adapter against it and binds it to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import read_manifest
from edge_lora.bundle_check import stored_weight
from edge_lora.errors import UnsupportedError
from edge_lora.slots import SlotTable


@runtime_checkable
class BaseWeights(Protocol):
    """What an importer may ask of a base."""

    @property
    def slots(self) -> SlotTable:
        """All slots, with the hashes of their weights."""
        ...

    def weight(self, name: str) -> NDArray[np.float32]:
        """Return the weight of a slot, fp32, in the slot's own shape."""
        ...

    def stores_transposed(self, name: str) -> bool | None:
        """Whether the module stores (in, out) where the slot is (out, in); None if unknown."""
        ...


class BundleBase:
    """The weights of an exported bundle, read from its files when they are asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Read the manifest of ``folder``; raises BundleError if it is damaged."""
        self._folder = Path(folder)
        self._manifest = read_manifest(self._folder)

    @property
    def slots(self) -> SlotTable:
        """The slots that the bundle offers."""
        return self._manifest.slots

    def weight(self, name: str) -> NDArray[np.float32]:
        """Return the weight of a slot, fp32, in the slot's own shape."""
        slot = self.slots[name]
        stored = stored_weight(self._folder, self._manifest, slot.name)
        return np.ascontiguousarray(stored, np.float32)

    def stores_transposed(self, name: str) -> bool | None:
        """Only of a linear layer is it unknown: the graph's layout is not the module's."""
        return None if self.slots[name].kind == "linear" else False


def as_base(base: BaseWeights | str | Path | None) -> BaseWeights | None:
    """Return ``base`` as an object that can be asked; a path is a bundle's folder.

    Raises:
        BundleError: If the folder holds no sound bundle.
        UnsupportedError: If it is something else.
    """
    if base is None or isinstance(base, BaseWeights):
        return base
    if isinstance(base, str | Path):
        return BundleBase(base)
    raise UnsupportedError(
        f"base= is a {type(base).__name__}; give a bundle's folder or, for a torch model, "
        "edge_lora.methods.model_base.ModelBase(model)"
    )
