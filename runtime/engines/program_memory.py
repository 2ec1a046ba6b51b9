"""A live ExecuTorch program whose file and packed weights lie in memory of our own.

The file is mapped privately: kernels read raw weights straight from it, and what is written there
never reaches the disk. XNNPACK packs its weights into a memory file that is mapped a second time,
here. The layout of a packed weight is the kernel's own business and differs between processors; it
is learned while the program is loaded, once per shape, and cached.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import edge_lora_executorch
import numpy as np
from numpy.typing import NDArray

from edge_lora import native
from edge_lora.bundle_program import ProgramSlot
from edge_lora.errors import BundleError, EdgeLoraError
from edge_lora.forms import matrix_shape
from edge_lora.native import Layout
from edge_lora.runtime.cache import cache_folder, cache_key, store_bytes
from edge_lora.runtime.engines.private_memory import (
    block_at,
    mappings_of,
    move_to_private_memory,
)

Bytes = NDArray[np.uint8]
Shape = tuple[int, int]
"""(out, in)"""


class ProgramMemory:
    """One program, loaded; nobody else sees or changes its memory.

    Attributes:
        program: The native program.
        file: The private mapping of its file.
        layouts: Shape -> layout of the packed weights asked for.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        *,
        is_packed: bool,
        probed: Mapping[Shape, ProgramSlot] | None = None,
        edits: Mapping[int, NDArray[np.generic]] | None = None,
    ) -> None:
        """Load the program.

        Args:
            path: The program file.
            threads: Of the engine.
            is_packed: Whether XNNPACK's packed weights are wanted within reach.
            probed: A packed fp32 slot of each shape whose layout is wanted.
            edits: Bytes from the start of the file -> what to load instead of what is there.

        Raises:
            BundleError: If the program is damaged.
            UnsupportedError: If it cannot run here, or a layout cannot be read.
        """
        try:
            self.file: Bytes = np.memmap(path, np.uint8, "c")
        except (OSError, ValueError) as error:  # gone, not readable, empty
            raise BundleError(f"the file cannot be mapped: {error}") from error
        for offset, values in (edits or {}).items():
            raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self.file[offset : offset + raw.size] = raw
        self.layouts: dict[Shape, Layout] = {}
        self._packed: dict[str, Bytes] = {}
        if not is_packed:
            self.program = edge_lora_executorch.Program(self.file, -1, threads)
            return
        handle = os.memfd_create("edge-lora-packed", os.MFD_CLOEXEC)
        try:
            self._load(handle, threads, probed or {})
            self._packed = self._find_packed(handle)
        finally:
            os.close(handle)

    def packed(self, key: str) -> list[Bytes]:
        """Return what XNNPACK packed of the raw weight named ``key``, shared with it.

        There is one block for each bias that it is packed with.
        """
        found = self._packed.items() if key else ()
        return [block for name, block in found if name.startswith(key[:64])]

    def forget_layouts(self) -> None:
        """Let the next program learn its layouts anew: these fit nothing."""
        for shape in self.layouts:
            _cache_path(shape).unlink(missing_ok=True)

    def close(self) -> None:
        """Free the program, then the memory that it reads."""
        self._packed = {}
        self.program.close()
        self.file = np.empty(0, np.uint8)

    def _find_packed(self, handle: int) -> dict[str, Bytes]:
        """Return XNNPACK's packed weights by name, where it has mapped them itself."""
        mapped = mappings_of(handle)
        places = self.program.entries()
        move_to_private_memory(handle, mapped)
        return {name: block_at(mapped, *place) for name, place in places.items()}

    def _load(self, handle: int, threads: int, probed: Mapping[Shape, ProgramSlot]) -> None:
        """Load with the memory file ``handle``, learning the layouts that are not cached."""
        self.layouts = {shape: layout for shape in probed if (layout := _cached(shape)) is not None}
        unknown = {shape: slot for shape, slot in probed.items() if shape not in self.layouts}
        if not unknown:
            self.program = edge_lora_executorch.Program(self.file, handle, threads)
            return
        wanted = [
            (slot.key[:64], slot.offsets[-1], in_features, out_features)
            for (out_features, in_features), slot in unknown.items()
        ]
        self.program = edge_lora_executorch.Program.open_probed(self.file, wanted, handle, threads)
        for shape, data in zip(unknown, self.program.layouts, strict=True):
            self.layouts[shape] = Layout.from_bytes(data)
            store_bytes(_cache_path(shape), data)


def shapes_of(
    slots: Iterable[tuple[tuple[int, ...], ProgramSlot]],
) -> dict[Shape, ProgramSlot]:
    """Return one packed fp32 slot for each shape; the smallest number that shows every layout."""
    packed = [(s, slot) for s, slot in slots if slot.key and slot.dtype == "F32"]
    return {matrix_shape(shape): slot for shape, slot in packed}


def _cached(shape: Shape) -> Layout | None:
    """Return the layout of packed fp32 weights of one shape, if it was learned here before."""
    try:
        layout = Layout.from_bytes(_cache_path(shape).read_bytes())
    except (OSError, EdgeLoraError):  # not there, or damaged: learned again
        return None
    return layout if layout.elements >= shape[0] * shape[1] else None


def _cache_path(shape: Shape) -> Path:
    version, features = edge_lora_executorch.version, native.cpu_features()
    return cache_folder("layouts") / cache_key("executorch", version, features, "f32", *shape)
