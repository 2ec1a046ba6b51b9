"""What a program's file says of itself, compared with what a bundle's manifest says of it.

Source:
    ExecuTorch, docs/source/pte-file-format.md: the extended header.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_lora.bundle_program import ProgramSlot
from edge_lora.errors import BundleError, list_all

_HEADER = struct.Struct("<I4s4sIQQ")  # root, "ET12", "eh00", bytes, description bytes, data from


def require_places(path: Path, slots: Mapping[str, ProgramSlot], rows: Mapping[str, int]) -> None:
    """Refuse slots that are not where the program has its data.

    In its description, a patch would change what the program does. Scales of codes have no digest
    in the slot table, but the description names them by theirs.

    Args:
        path: The program.
        slots: By name.
        rows: Slot -> how many scales it has, if any.

    Raises:
        BundleError: If there are such slots; lists them. Or if the file has no such header.
    """
    data_from = _data_from(path)
    with path.open("rb") as file:
        description = file.read(data_from)
    problems = []
    for name, slot in slots.items():
        problems += [f"{name}: at {at}" for at in slot.offsets if at < data_from]
        if slot.scales_offset is None:
            continue
        scales = np.memmap(path, np.float32, "r", slot.scales_offset, (rows[name],))
        if hashlib.sha256(scales.data).hexdigest().encode() not in description:
            problems.append(f"{name}: no scales of the program are at {slot.scales_offset}")
    if problems:
        title = f"weights that are not where '{path}' has its data, from {data_from}"
        raise BundleError(list_all(title, problems))


def _data_from(path: Path) -> int:
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    _, kind, mark, _, _, data_from = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
    if kind[:2] != b"ET" or mark != b"eh00" or data_from > path.stat().st_size:
        raise BundleError(f"'{path}' is no program of ExecuTorch, or of an unknown kind")
    return int(data_from)
