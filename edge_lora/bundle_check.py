"""Does a bundle hold the weights that its slot table says? Only NumPy is needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import Manifest
from edge_lora.errors import BundleError, list_all
from edge_lora.forms import VALUE_DTYPES
from edge_lora.slots import count_base_slots, fingerprint_of


def verify_slots(folder: str | Path, manifest: Manifest) -> None:
    """Read every slot's weight back through the manifest and compare its hash.

    Raises:
        BundleError: If one differs or cannot be read; lists every such slot.
    """
    problems = []
    for name, place in manifest.stored.items():
        try:
            found = stored_sha256(Path(folder), manifest, name)
        except (OSError, ValueError) as error:
            problems.append(f"{name}: cannot be read from {place.file}: {error}")
            continue
        expected = manifest.slots[name].sha256
        if found != expected:
            problems.append(
                f"{name}: the bytes in {place.file} have sha256 {found[:12]}…, "
                f"the slot table says {expected[:12]}…"
            )
    if problems:
        title = f"bundle '{folder}' does not hold the weights of base {manifest.base_id!r}"
        raise BundleError(list_all(title, problems))


def stored_sha256(folder: Path, manifest: Manifest, name: str) -> str:
    """Return the sha256 (hex) of a slot's weight in the slot's own shape, read from its file."""
    array = np.ascontiguousarray(stored_weight(folder, manifest, name))
    return hashlib.sha256(array.view(np.uint8).data).hexdigest()


def stored_weight(folder: Path, manifest: Manifest, name: str) -> NDArray[np.floating]:
    """Return a slot's weight in the slot's own shape, mapped read-only from its file."""
    slot, place = manifest.slots[name], manifest.stored[name]
    shape = slot.shape if place.layout == "oi" else slot.shape[::-1]
    weight = np.memmap(folder / place.file, VALUE_DTYPES[slot.dtype], "r", place.offset, shape)
    return weight if place.layout == "oi" else weight.T


def verify_fingerprint(manifest: Manifest) -> bool:
    """Compute the base fingerprint from the slot table and compare it.

    Returns:
        Whether it could be: False if the bundle leaves out slots that the fingerprint covers, or
        does not say how many there are.

    Raises:
        BundleError: If it differs.
    """
    if manifest.base_slots != count_base_slots(manifest.slots.values()):
        return False
    found = fingerprint_of(manifest.slots.values())
    if found != manifest.fingerprint:
        raise BundleError(
            f"the slot table of base {manifest.base_id!r} has fingerprint {found[:12]}…, "
            f"the manifest says {manifest.fingerprint[:12]}…"
        )
    return True
