"""A bundle's slot weights as their file keeps them: fp32 values, or 8-bit codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import Manifest
from edge_lora.bundle_check import stored_weight

Float32 = NDArray[np.float32]
Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class RawWeights:
    """The weights of ``manifest`` in ``folder``, read when asked for.

    Scales are frozen: an adapter changes codes alone.
    """

    folder: Path
    manifest: Manifest

    @property
    def has_codes(self) -> bool:
        """Whether some slot is of 8-bit codes."""
        program = self.manifest.program
        return program is not None and any(s.dtype == "I8" for s in program.slots.values())

    def base(self, slot: str) -> Float32:
        """Return the weight that the engine computes with, fp32 in the slot's shape."""
        # The program's own values, also where they are codes.
        own = replace(self.manifest, stored={}) if self.manifest.program else self.manifest
        return np.array(stored_weight(self.folder, own, slot), np.float32, order="C")

    def encode(self, slot: str, weight: Float32) -> NDArray[np.generic]:
        """Return ``weight`` as the file would keep it; rounded, and clipped, to codes."""
        scales = self._scales(slot)
        if scales is None:
            return weight
        codes: NDArray[np.int8] = np.clip(np.rint(weight / scales), -128, 127).astype(np.int8)
        return codes

    def decode(self, slot: str, raw: NDArray[np.generic]) -> Float32:
        """Return the weight that ``raw`` stands for."""
        scales = self._scales(slot)
        values = raw.astype(np.float32)
        return values if scales is None else values * scales

    def _scales(self, slot: str) -> Float32 | None:
        """Return (out, 1) steps between codes; None if the slot is of fp32 values."""
        place = self.manifest.program and self.manifest.program.slots[slot]
        if not place or place.scales_offset is None:
            return None
        rows = self.manifest.slots[slot].shape[0]
        path = self.folder / self.manifest.stored[slot].file
        return np.fromfile(path, np.float32, rows, offset=place.scales_offset)[:, None]


@dataclass
class Merged:
    """Weights with adapters in them, ready for the engine.

    Attributes:
        raw: Slot -> values or codes.
        changed: How many of them differ from the base's.
        rounding_error: Root mean square of what rounding to codes took from the adapters' delta,
            as a share of that delta's; 0 for fp32 weights.
    """

    raw: dict[str, NDArray[np.generic]]
    changed: int
    rounding_error: float


def rounded(weights: RawWeights, merged: Mapping[str, Float32]) -> Merged:
    """Encode ``merged`` (slot -> fp32 weight), and say what that cost."""
    raw, changed = {}, 0
    lost = meant = 0.0
    for slot, weight in merged.items():
        base = weights.base(slot)
        raw[slot] = weights.encode(slot, weight)
        changed += int((raw[slot] != weights.encode(slot, base)).sum())
        lost += float(np.square(weights.decode(slot, raw[slot]) - weight, dtype=np.float64).sum())
        meant += float(np.square(weight - base, dtype=np.float64).sum())
    return Merged(raw, changed, (lost / meant) ** 0.5 if meant else 0.0)
