"""Fused adapters by building the engine's graph anew (route ``reload``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_lora.runtime.adapters import LoadedAdapter, Parts
from edge_lora.runtime.cache import cache_key
from edge_lora.runtime.engines import Engine
from edge_lora.runtime.merging import merge
from edge_lora.runtime.raw_weights import Merged, RawWeights, rounded
from edge_lora.runtime.switching import Prepared


class ReloadedWeights:
    """A new engine session for every switch."""

    def __init__(self, raw: RawWeights, engine: Engine) -> None:
        """Keep what is needed to build ``engine``'s session again."""
        self._raw, self._engine = raw, engine
        self._active: dict[str, NDArray[np.generic]] = {}
        self._kept: tuple[Parts, dict[str, NDArray[np.generic]]] = ([], {})

    def prepare(self, parts: Parts) -> Prepared:
        """Merge once to see that it can be done; see ``FusedWeights``."""
        merged = self._merged(parts)
        return Prepared(merged.changed, merged.rounding_error)

    def swap(self, parts: Parts) -> int:
        """Merge and reload; see ``FusedWeights``."""
        merged = self._kept[1] if parts == self._kept[0] else self._merged(parts).raw
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
        raw, active = self._raw, self._active.items()
        return [s for s, w in active if not np.array_equal(w, raw.encode(s, raw.base(s)))]

    def sha256(self) -> str:
        """Digest of the replaced weights."""
        return cache_key([(s, w.tobytes().hex()) for s, w in sorted(self._active.items())])

    def close(self) -> None:
        """Nothing is held."""

    def _merged(self, parts: Parts) -> Merged:
        adapters = [(loaded.read(), weight) for loaded, weight in parts]
        return rounded(self._raw, merge(adapters, self._raw.manifest, self._raw.base))
