"""What the sites are fed on every run while adapters with bottlenecks are active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.bundle import Manifest
from edge_lora.forms import Bottleneck
from edge_lora.runtime.adapters import LoadedAdapter, Parts
from edge_lora.runtime.engines import Engine
from edge_lora.runtime.slot_arrays import slot_arrays
from edge_lora.runtime.unfused import SlotInputs


@dataclass
class ActiveSites:
    """The bottlenecks of loaded adapters; those of several adapters at one site add up.

    They are read once: an adapter whose file is gone can still be made active again.
    """

    manifest: Manifest
    engine: Engine
    _branches: dict[str, Mapping[str, list[Bottleneck]]] = field(default_factory=dict)

    def inputs(self, parts: Parts) -> SlotInputs:
        """Return the inputs that make a run compute with all bottlenecks of ``parts``."""
        sites: dict[str, list[Bottleneck]] = {}
        for loaded, weight in parts:
            for site, branches in self._of(loaded).items():
                scaled = [replace(branch, scale=branch.scale * weight) for branch in branches]
                sites.setdefault(site, []).extend(scaled)
        if not sites:
            return SlotInputs({}, {})
        deltas = {name: self._delta(name, branches) for name, branches in sites.items()}
        arrays = slot_arrays(Adapter("active", "", BaseIdentity(""), deltas), self.manifest)
        return SlotInputs(arrays, {name: self.engine.value(a) for name, a in arrays.items()})

    def forget(self, loaded: LoadedAdapter) -> None:
        """Drop what is kept of an adapter."""
        self._branches.pop(loaded.file_hash, None)

    def _of(self, loaded: LoadedAdapter) -> Mapping[str, list[Bottleneck]]:
        """Return site -> branches, with the adapter's strength in their scales."""
        if not loaded.has_bottleneck:
            return {}
        key = loaded.file_hash
        if key not in self._branches:
            adapter = loaded.read()
            self._branches[key] = {
                name: [replace(f, scale=f.scale * adapter.alpha) for f in branches]
                for name, delta in adapter.deltas.items()
                if (branches := [form for form in delta.forms if isinstance(form, Bottleneck)])
            }
        return self._branches[key]

    def _delta(self, name: str, branches: list[Bottleneck]) -> Delta:
        slot = self.manifest.slots[name]
        return Delta(slot.shape, slot.dtype, tuple(branches))
