"""Unfused adapters: arrays fed to the graph's optional inputs, for one call."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from edge_lora.bundle import Manifest
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.adapters import LoadedAdapter
from edge_lora.runtime.engines import Arrays, Engine
from edge_lora.runtime.rank_choice import Rank, budget_of, choose, measure, step_feeds
from edge_lora.runtime.slot_arrays import slot_arrays


@dataclass(frozen=True)
class SlotInputs:
    """Graph inputs that carry one adapter.

    Attributes:
        arrays: Input name -> array; kept because the engine's tensors look into them.
        values: Input name -> the engine's tensor.
    """

    arrays: Arrays
    values: dict[str, object]


@dataclass
class UnfusedAdapters:
    """The inputs of every adapter and rank that was used so, and the ranks that were measured.

    Made for one engine; safe to use from several threads while the session holds it.
    """

    manifest: Manifest
    engine: Engine
    canary: Arrays
    _inputs: dict[tuple[str, int | None], SlotInputs] = field(default_factory=dict)
    _chosen: dict[tuple[str, str], int] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def inputs(self, adapter: LoadedAdapter) -> SlotInputs:
        """Return the inputs that make one call run with ``adapter``, at its rank.

        Raises:
            UnsupportedError: If the bundle lacks inputs for it, or it cannot run unfused.
        """
        key = (adapter.file_hash, adapter.rank)
        with self._lock:
            if key not in self._inputs:
                self._inputs[key] = self._prepare(adapter)
            return self._inputs[key]

    def at_rank(self, adapter: LoadedAdapter, rank: Rank) -> LoadedAdapter:
        """Return ``adapter`` at ``rank``; a latency budget is measured once and remembered.

        Raises:
            UnsupportedError: If it has no such rank, or none keeps the budget.
        """
        if not isinstance(rank, str):
            return adapter.at_rank(rank)
        budget_ms = budget_of(rank)
        if not adapter.ranks:
            raise UnsupportedError(
                f"adapter {adapter.name!r} is of one rank, so {rank!r} has nothing to choose from"
            )
        with self._lock:
            key = (adapter.file_hash, rank)
            if key not in self._chosen:
                feeds = step_feeds(self.engine, self.manifest, self.canary)
                prepared = {r: self._prepare(adapter.at_rank(r)) for r in adapter.ranks}
                variants = {r: inputs.values for r, inputs in prepared.items()}
                latencies = measure(self.engine, feeds, variants)
                self._chosen[key] = choose(adapter.name, latencies, budget_ms)
            return adapter.at_rank(self._chosen[key])

    def forget(self, adapter: LoadedAdapter) -> None:
        """Drop what is kept of an adapter, and of those that do the same."""
        gone = adapter.file_hash
        with self._lock:
            self._inputs = {k: v for k, v in self._inputs.items() if k[0] != gone}
            self._chosen = {k: v for k, v in self._chosen.items() if k[0] != gone}

    def clear(self) -> None:
        """Drop everything: the engine is about to close."""
        with self._lock:
            self._inputs.clear()

    def _prepare(self, adapter: LoadedAdapter) -> SlotInputs:
        places = self.manifest.stored.values()
        if not self.manifest.sites and not any(place.lora_inputs for place in places):
            raise UnsupportedError(
                "this bundle has no slots as inputs, so an adapter cannot run unfused. "
                "Export it with: edge-lora export … --slots inputs, or use set_adapter(), which "
                "needs an fp32 base"
            )
        arrays = slot_arrays(adapter.read(), self.manifest)
        return SlotInputs(arrays, {name: self.engine.value(a) for name, a in arrays.items()})
