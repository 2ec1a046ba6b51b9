"""Fused adapters as patches of the engine's own weights (routes ``packed`` and ``unpacked``)."""

from __future__ import annotations

from pathlib import Path

from edge_lora.bundle import Manifest
from edge_lora.forms import matrix_shape
from edge_lora.native import Image
from edge_lora.runtime.adapters import LoadedAdapter, Parts, PatchPool
from edge_lora.runtime.engines import Engine, image_key
from edge_lora.runtime.switching import Prepared


class PatchedWeights:
    """The engine's own weights, patched in place."""

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
        key = image_key(manifest, engine)
        self._pool = PatchPool(self.image, key, budget, LoadedAdapter.open)

    def prepare(self, parts: Parts) -> Prepared:
        """Compile the patch; see ``FusedWeights``."""
        return Prepared(self._pool.get(parts).changed)

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

    def poke(self, name: str, index: int, value: float) -> float:
        """Exchange one weight, for self-tests; returns the old one."""
        return self.image.poke(name, index, value)

    def differing_slots(self) -> list[str]:
        """Compare every value in use with the bundle's file."""
        return self.image.differing_slots()

    def sha256(self) -> str:
        """Digest of the engine's memory, as packed."""
        return self.image.sha256()

    def close(self) -> None:
        """Let go of the engine's memory."""
        self.image.close()
