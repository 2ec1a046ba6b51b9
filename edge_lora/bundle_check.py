"""Does a bundle hold the weights that its slot table says? Only NumPy is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import Manifest
from edge_lora.bundle_program import Program, ProgramSlot
from edge_lora.errors import BundleError, list_all
from edge_lora.forms import VALUE_DTYPES
from edge_lora.slots import Slot, count_base_slots, fingerprint_of


def verify_slots(folder: str | Path, manifest: Manifest) -> None:
    """Read every slot's weight back through the manifest and compare its hash.

    Raises:
        BundleError: If one differs or cannot be read; lists every such slot.
    """
    problems = []
    for name, file, read, expected in _readings(Path(folder), manifest):
        try:
            found = _sha256(read())
        except (OSError, ValueError) as error:
            problems.append(f"{name}: cannot be read from {file}: {error}")
            continue
        if found != expected:
            problems.append(
                f"{name}: the bytes in {file} have sha256 {found[:12]}…, "
                f"the slot table says {expected[:12]}…"
            )
    if problems:
        title = f"bundle '{folder}' does not hold the weights of base {manifest.base_id!r}"
        raise BundleError(list_all(title, problems))


def _readings(
    folder: Path, manifest: Manifest
) -> Iterator[tuple[str, str, Callable[[], NDArray[np.generic]], str]]:
    """Yield slot, file, how to read its values there, and the sha256 that they must have."""
    for name, place in manifest.stored.items():
        read = partial(_graph_weight, folder, manifest, name)
        yield name, place.file, read, manifest.slots[name].sha256
    if (program := manifest.program) is None:
        return
    for name, kept in program.slots.items():
        slot = manifest.slots[name]
        expected = slot.sha256 if kept.dtype == "F32" else kept.key[:64]
        for offset in kept.offsets:
            read = partial(_program_values, folder, program, replace(kept, offset=offset), slot)
            yield name, program.file, read, expected


def _sha256(values: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()


def stored_weight(folder: Path, manifest: Manifest, name: str) -> NDArray[np.floating]:
    """Return a slot's weight in the slot's own shape, mapped read-only from its file.

    Of a bundle without an ONNX graph it is the ExecuTorch program's, computed from codes and scales
    if that is 8-bit.
    """
    if name in manifest.stored:
        return _graph_weight(folder, manifest, name)
    assert manifest.program is not None  # the manifest was read: every slot lies somewhere
    slot, place = manifest.slots[name], manifest.program.slots[name]
    values = _program_values(folder, manifest.program, place, slot)
    if place.scales_offset is None:
        return values
    path, rows = folder / manifest.program.file, (slot.shape[0],)
    scales = np.memmap(path, np.float32, "r", place.scales_offset, rows)
    weight: NDArray[np.floating] = values * scales[:, None]
    return weight


def _graph_weight(folder: Path, manifest: Manifest, name: str) -> NDArray[np.floating]:
    slot, place = manifest.slots[name], manifest.stored[name]
    shape = slot.shape if place.layout == "oi" else slot.shape[::-1]
    weight = np.memmap(folder / place.file, VALUE_DTYPES[slot.dtype], "r", place.offset, shape)
    return weight if place.layout == "oi" else weight.T


def _program_values(folder: Path, program: Program, place: ProgramSlot, slot: Slot) -> NDArray[Any]:
    """Return a slot's raw values, F32 or codes, mapped read-only from the program's file."""
    dtype = np.float32 if place.dtype == "F32" else np.int8
    return np.memmap(folder / program.file, dtype, "r", place.offset, slot.shape)


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
