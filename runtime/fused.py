"""Fused adapters: weights that hold an adapter, either patched in place or reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from edge_lora.bundle import Manifest
from edge_lora.errors import EdgeLoraError, UnsupportedError, list_all
from edge_lora.runtime.adapters import LoadedAdapter, Parts
from edge_lora.runtime.engines import Arrays, Engine
from edge_lora.runtime.patched_weights import PatchedWeights
from edge_lora.runtime.raw_weights import RawWeights
from edge_lora.runtime.reloaded_weights import ReloadedWeights
from edge_lora.runtime.selftest import self_test
from edge_lora.runtime.switching import Prepared

if TYPE_CHECKING:
    from edge_lora.runtime.quantised_weights import PackingEngine, QuantisedWeights


class FusedWeights(Protocol):
    """Where a session's fused adapters live."""

    def prepare(self, parts: Parts) -> Prepared:
        """Check and compile, so that ``swap`` cannot fail."""

    def swap(self, parts: Parts) -> int:
        """Replace what is active by ``parts``, as one step; returns bytes of weights written."""

    def keep(self, parts: Parts) -> None:
        """Hold what a ``swap`` back to ``parts`` needs, so that it cannot fail."""

    def forget(self, adapter: LoadedAdapter) -> None:
        """Free what ``prepare`` keeps of an adapter."""

    @property
    def nbytes(self) -> int:
        """Memory kept beside the base."""

    @property
    def damaged(self) -> bool:
        """Whether a failed switch left weights that are neither the old nor the new ones."""

    def differing_slots(self) -> list[str]:
        """Slots whose weights in use are not the base's; empty: the base, to the bit."""

    def sha256(self) -> str:
        """Digest (hex) of the weights in use."""

    def close(self) -> None:
        """Let go of the engine's memory."""


def low_precision_weights(loaded: LoadedAdapter, manifest: Manifest) -> list[str]:
    """Return the weights of ``loaded`` that no adapter can be fused into, with their dtypes.

    Engines keep weights of less than fp32 out of reach, also of a reload: ONNX Runtime overlooks
    what it is handed for them.
    """
    slots = {name: manifest.slots[name] for name in loaded.weights}
    return [f"{name} is {slot.dtype}" for name, slot in slots.items() if slot.dtype != "F32"]


def fusible(parts: Parts, manifest: Manifest) -> Parts:
    """Return those of ``parts`` that change weights.

    Raises:
        UnsupportedError: If a weight is not fp32; lists every such weight.
    """
    changing = [(loaded, weight) for loaded, weight in parts if loaded.weights]
    problems = [p for loaded, _ in changing for p in low_precision_weights(loaded, manifest)]
    if problems:
        names = ", ".join(repr(loaded.name) for loaded, _ in changing)
        title = f"adapter {names} cannot be fused: only fp32 weights can be changed"
        advice = "Run it unfused: session.run(inputs, adapter=NAME), or export an fp32 base"
        raise UnsupportedError(f"{list_all(title, problems)}\n{advice}")
    return changing


def open_weights(
    folder: Path,
    manifest: Manifest,
    engine: Engine,
    canary: Arrays,
    threads: int,
    budget: int | None,
) -> FusedWeights:
    """Return the weights of a fresh engine, after its self-test if they are patched in place.

    Raises:
        UnsupportedError: If the engine's route does not prove itself here.
    """
    raw = RawWeights(folder, manifest)
    if engine.route == "reload":
        return ReloadedWeights(raw, engine)
    weights: PatchedWeights | QuantisedWeights
    if manifest.program is not None and manifest.program.weights != "fp32":
        cast("PackingEngine", engine).require_same_unpacked(canary)
    if raw.has_codes:
        from edge_lora.runtime.quantised_weights import QuantisedWeights

        weights = QuantisedWeights(raw, cast("PackingEngine", engine), budget)
    else:
        weights = PatchedWeights(folder, manifest, engine, threads, budget)
    try:
        self_test(engine, weights, manifest, canary)
    except EdgeLoraError:
        weights.close()
        raise
    return weights
