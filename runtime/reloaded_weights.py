"""Fused adapters by building the engine's graph anew (route ``reload``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import Manifest
from edge_lora.bundle_check import stored_weight
from edge_lora.runtime.adapters import LoadedAdapter, Parts
from edge_lora.runtime.cache import cache_key
from edge_lora.runtime.engines import Engine
from edge_lora.runtime.merging import merge


class ReloadedWeights:
    """A new engine session for every switch."""

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
        return merge(parts, self._manifest, self._base)

    def _base(self, slot: str) -> NDArray[np.float32]:
        return np.array(stored_weight(self._folder, self._manifest, slot), np.float32, order="C")
