"""Fused adapters: weights that hold an adapter, either patched in place or reloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_lora import native, reference
from edge_lora.bundle import Manifest
from edge_lora.bundle_check import stored_weight
from edge_lora.errors import EdgeLoraError, UnsupportedError, list_all
from edge_lora.forms import Bottleneck, WeightForm, is_replacing, matrix_shape
from edge_lora.native import Image
from edge_lora.runtime.adapters import LoadedAdapter, PatchPool
from edge_lora.runtime.cache import cache_key
from edge_lora.runtime.engines import Arrays, Engine
from edge_lora.runtime.selftest import self_test

Parts = Sequence[tuple[LoadedAdapter, float]]
"""Adapters and their weights; empty is the base."""


class FusedWeights(Protocol):
    """Where a session's fused adapters live."""

    def prepare(self, parts: Parts) -> int:
        """Check and compile, so that ``swap`` cannot fail.

        Returns:
            How many values differ from the base.
        """

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


class PatchedWeights:
    """The engine's own weights, patched in place (routes ``packed`` and ``unpacked``)."""

    def __init__(
        self, folder: Path, manifest: Manifest, engine: Engine, threads: int, budget: int | None
    ) -> None:
        """Map every slot of ``manifest`` to the memory in which ``engine`` reads it."""
        self.image = Image(threads)
        for name, slot in manifest.weights.items():
            place = manifest.stored[name]
            out_features, in_features = matrix_shape(slot.shape)
            path = str(folder / place.file)
            self.image.add_slot(name, in_features, out_features, path, place.offset, place.layout)
            for alias in slot.aliases:
                self.image.add_alias(name, alias)
        engine.bind(self.image)
        key = cache_key(
            manifest.fingerprint,
            [[n, p.offset, manifest.files[p.file].sha256] for n, p in manifest.stored.items()],
            engine.version,
            engine.route,
            native.cpu_features(),
            native.abi_version(),
        )
        self._pool = PatchPool(self.image, key, budget)

    def prepare(self, parts: Parts) -> int:
        """Compile the patch; see ``FusedWeights``."""
        return self._pool.get(parts).changed

    def swap(self, parts: Parts) -> int:
        """Exchange patches in place; see ``FusedWeights``."""
        return self.image.swap(self._pool.get(parts) if parts else None).bytes

    def keep(self, parts: Parts) -> None:
        """Pin the compiled patch."""
        self._pool.pin(parts)

    def forget(self, adapter: LoadedAdapter) -> None:
        """Drop its compiled patches from memory."""
        self._pool.drop(adapter)

    @property
    def nbytes(self) -> int:
        """Bytes of the compiled patches."""
        return self._pool.nbytes

    @property
    def damaged(self) -> bool:
        """Whether a switch failed and could not be taken back."""
        return self.image.damaged

    def differing_slots(self) -> list[str]:
        """Compare every value in use with the bundle's file."""
        return self.image.differing_slots()

    def sha256(self) -> str:
        """Digest of the engine's memory, as packed."""
        return self.image.sha256()

    def close(self) -> None:
        """Let go of the engine's memory."""
        self.image.close()


class ReloadedWeights:
    """A new engine session for every switch (route ``reload``)."""

    def __init__(self, folder: Path, manifest: Manifest, engine: Engine) -> None:
        """Keep what is needed to build ``engine``'s session again."""
        self._folder, self._manifest, self._engine = folder, manifest, engine
        self._active: dict[str, NDArray[np.float32]] = {}
        self._kept: tuple[Parts, dict[str, NDArray[np.float32]]] = ([], {})

    def prepare(self, parts: Parts) -> int:
        """Merge once to see that it can be done; see ``FusedWeights``."""
        merged = self._merged(parts)
        return sum(int((w != self._base(slot)).sum()) for slot, w in merged.items())

    def swap(self, parts: Parts) -> int:
        """Merge and reload; see ``FusedWeights``."""
        merged = self._kept[1] if parts == self._kept[0] else self._merged(parts)
        self._engine.replace_weights(merged)
        self._active = merged
        return sum(weight.nbytes for weight in merged.values())

    def keep(self, parts: Parts) -> None:
        """Hold the merged weights that are in use."""
        self._kept = (parts, self._active)

    def forget(self, adapter: LoadedAdapter) -> None:
        """Nothing else is kept."""

    @property
    def nbytes(self) -> int:
        """Bytes of the merged weights of the active adapters."""
        return sum(weight.nbytes for weight in self._active.values())

    @property
    def damaged(self) -> bool:
        """Never: the old session stays until the new one stands."""
        return False

    def differing_slots(self) -> list[str]:
        """Slots that the session was last built with other values for."""
        return [s for s, w in self._active.items() if not np.array_equal(w, self._base(s))]

    def sha256(self) -> str:
        """Digest of the replaced weights."""
        return cache_key([(s, w.tobytes().hex()) for s, w in sorted(self._active.items())])

    def close(self) -> None:
        """Nothing is held."""

    def _merged(self, parts: Parts) -> dict[str, NDArray[np.float32]]:
        terms: dict[str, list[tuple[WeightForm, float]]] = {}
        for loaded, weight in parts:
            adapter = loaded.read()
            for name, delta in adapter.deltas.items():
                slot = self._manifest.slots[name].name
                for form in delta.forms:
                    if not isinstance(form, Bottleneck):  # those are fed, see ActiveSites
                        terms.setdefault(slot, []).append((form, weight * adapter.alpha))
        problems = [p for slot, these in terms.items() for p in _set_problems(slot, these)]
        if problems:
            raise UnsupportedError(list_all("the adapter cannot be fused", problems))
        return {slot: reference.apply(self._base(slot), these) for slot, these in terms.items()}

    def _base(self, slot: str) -> NDArray[np.float32]:
        return np.array(stored_weight(self._folder, self._manifest, slot), np.float32, order="C")


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
    if engine.route == "reload":
        return ReloadedWeights(folder, manifest, engine)
    weights = PatchedWeights(folder, manifest, engine, threads, budget)
    try:
        self_test(engine, weights.image, manifest, canary)
    except EdgeLoraError:
        weights.close()
        raise
    return weights


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
