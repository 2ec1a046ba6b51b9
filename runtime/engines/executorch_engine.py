"""ExecuTorch on the CPU, through its XNNPACK delegate.

Route ``packed``: XNNPACK keeps its packed weights in a memory file that is patched through a
mapping of our own; weights that a kernel reads where they lie (embeddings) are patched in a private
mapping of the program file.
Route ``unpacked``: the same, of a program whose slots are all read where they lie.
Route ``reload``: the program is loaded anew over a private mapping with other weights.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import edge_lora_executorch
import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import Manifest, TensorSpec
from edge_lora.bundle_program import ITEM_BYTES, ProgramSlot
from edge_lora.errors import BundleError, EdgeLoraError, UnsupportedError, list_all
from edge_lora.forms import matrix_shape
from edge_lora.native import Image, Layout
from edge_lora.runtime.engines import Arrays, Route
from edge_lora.runtime.engines.program_file import require_places
from edge_lora.runtime.engines.program_memory import Bytes, ProgramMemory, shapes_of

log = logging.getLogger(__name__)


class ExecuTorchEngine:
    """One live program of a bundle.

    Attributes:
        runs: How many runs there were. A program may keep keys and values inside, which every run
            changes: whoever relies on them sees here whether they are still his own.
    """

    def __init__(self, path: Path, manifest: Manifest, route: Route, threads: int) -> None:
        """Load the program; see ``open_engine``."""
        assert manifest.program is not None
        self.route: Route = route
        self.version: str = edge_lora_executorch.version
        self.runs = 0
        self._turn = threading.RLock()
        self._path, self._manifest, self._threads = path, manifest, threads
        self._program = manifest.program
        slots = self._program.slots.items()
        self._memory = ProgramMemory(
            path,
            threads,
            is_packed=route == "packed",
            probed=shapes_of((manifest.slots[name].shape, slot) for name, slot in slots),
        )
        found = self._memory.program
        self._order = self._program.input_order or _numbered("input", found.inputs)
        outputs = self._program.outputs or _specs("output", found.outputs)
        count = len(found.outputs)
        if len(outputs) != count:
            self._memory.close()
            raise BundleError(f"the manifest names {len(outputs)} outputs, the program has {count}")
        inputs = self._program.inputs or _specs("input", found.inputs)
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in inputs}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in outputs}
        self._idle = {name: array for s in slots for name, array in _zeros(manifest, *s).items()}

    def run(self, feeds: Arrays) -> dict[str, NDArray[np.generic]]:
        """Run once; outputs are owned by the caller."""
        arrays = {**self._idle, **feeds}
        try:
            with self._turn:
                self.runs += 1
                found = self._memory.program.run(
                    [np.asarray(arrays[name], order="C") for name in self._order]
                )
        except EdgeLoraError as error:
            given = ", ".join(f"{name} {arrays[name].shape}" for name in self.inputs)
            raise UnsupportedError(
                f"ExecuTorch refused this run of {given}: {self._named(str(error))}"
            ) from error
        return dict(zip(self.outputs, found, strict=True))

    def run_values(self, feeds: Mapping[str, object]) -> dict[str, object]:
        """Run once: the engine's own tensors are arrays."""
        return dict(self.run(feeds))  # type: ignore[arg-type]  # made by value()

    def value(self, array: NDArray[np.generic]) -> object:
        """Return ``array`` itself."""
        return array

    def numpy(self, value: object) -> NDArray[np.generic]:
        """Return ``value`` itself."""
        assert isinstance(value, np.ndarray)
        return value

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the runs of other threads out, between several of one's own."""
        with self._turn:
            yield

    def bind(self, image: Image) -> None:
        """Tell ``image`` where each slot's weight lies."""
        missing = []
        for name, slot in self._program.slots.items():
            shape = matrix_shape(self._manifest.slots[name].shape)
            places = self._places(slot, shape)
            try:
                if places and all(image.add_place(name, *place) for place in places):
                    continue
            except EdgeLoraError as error:  # a cached layout that is of no such weight
                log.debug("%s: %s", name, error)
            missing.append(f"{name}: no memory of the engine holds its weight")
        if missing:
            self._memory.forget_layouts()
            raise UnsupportedError(list_all("weights not found in the engine's memory", missing))

    def blocks(self) -> dict[str, list[Bytes]]:
        """Return the memory of every slot, writable."""
        return self._blocks(self._memory)

    @contextmanager
    def packed_with(self, weights: Arrays) -> Iterator[dict[str, list[Bytes]]]:
        """Return the memory that every slot would have with other raw values for some."""
        other = ProgramMemory(self._path, self._threads, is_packed=True, edits=self._edits(weights))
        try:
            yield self._blocks(other)
        finally:
            other.close()

    def require_same_unpacked(self, feeds: Arrays) -> None:
        """Refuse packed weights with which one run gives other outputs than weights on the heap.

        XNNPACK names the packed weights that it keeps in a file by their values. Codes that are
        equal, but have other scales, have one name, and one of the two layers the other's scales.

        Raises:
            UnsupportedError: If outputs differ.
        """
        other = ExecuTorchEngine(self._path, self._manifest, "reload", self._threads)
        try:
            expected = other.run(feeds)
        finally:
            other.close()
        found = self.run(feeds)
        if not all(np.allclose(found[k], expected[k], 1e-4, 1e-6, equal_nan=True) for k in found):
            raise UnsupportedError(
                "the program computes something else once its packed weights are kept in a file: "
                "XNNPACK takes some of its layers for the same. Export the base again"
            )

    def replace_weights(self, weights: Arrays) -> None:
        """Load the program anew with other values for the slots of ``weights``."""
        memory = ProgramMemory(
            self._path,
            self._threads,
            is_packed=False,
            edits=self._edits(weights),
        )
        with self._turn:
            self.runs += 1
            old, self._memory = self._memory, memory
        old.close()

    def close(self) -> None:
        """Free the program."""
        self._memory.close()

    def _named(self, message: str) -> str:
        """Return ``message`` with the names of the inputs that it numbers."""
        names = dict(enumerate(self._order))
        return re.sub(
            r"\binput (\d+)\b", lambda m: f"input {names.get(int(m[1]), m[1])!r}", message
        )

    def _edits(self, weights: Arrays) -> dict[int, NDArray[np.generic]]:
        slots = self._program.slots
        return {at: weight for name, weight in weights.items() for at in slots[name].offsets}

    def _blocks(self, memory: ProgramMemory) -> dict[str, list[Bytes]]:
        """Return the memory of every slot in one load of the program."""
        blocks = {}
        for name, slot in self._program.slots.items():
            size = math.prod(self._manifest.slots[name].shape) * ITEM_BYTES[slot.dtype]
            found = memory.packed(slot.key)
            if slot.is_read_in_place:
                found.append(memory.file[slot.offset : slot.offset + size])
            blocks[name] = found
        return blocks

    def _places(self, slot: ProgramSlot, shape: tuple[int, int]) -> list[tuple[Layout, int, int]]:
        """Return layout, address and bytes of everything that the engine computes from."""
        out_features, in_features = shape
        places = []
        if slot.key and self.route == "packed":
            layout, blocks = self._memory.layouts[shape], self._memory.packed(slot.key)
            places += [(layout, block.ctypes.data, block.size) for block in blocks]
        if slot.is_read_in_place:
            layout = Layout.plain(in_features, out_features, "oi")
            address = self._memory.file.ctypes.data + slot.offset
            places.append((layout, address, 4 * in_features * out_features))
        return places


def open_engine(folder: Path, manifest: Manifest, route: Route, threads: int) -> ExecuTorchEngine:
    """Open a bundle's program in ExecuTorch; ``folder`` may be the program file itself.

    Raises:
        BundleError: If a slot does not lie where the program has its data.
        UnsupportedError: If the route is not possible here.
    """
    assert manifest.program is not None
    slots = manifest.program.slots.values()
    packed = sum(bool(slot.key) for slot in slots)
    if route == "packed" and not packed:
        raise UnsupportedError("the program packs no weight of a slot")
    if route == "unpacked" and (packed or not slots):
        raise UnsupportedError(f"the program packs the weights of {packed} slots")
    path = folder / manifest.program.file if folder.is_dir() else folder
    if slots:
        rows = {name: manifest.slots[name].shape[0] for name in manifest.program.slots}
        require_places(path, manifest.program.slots, rows)
    try:
        return ExecuTorchEngine(path, manifest, route, threads)
    except BundleError as error:
        raise BundleError(f"'{path}' cannot be opened: {error}") from error


def _zeros(manifest: Manifest, name: str, slot: ProgramSlot) -> dict[str, NDArray[np.float32]]:
    """Return the inputs of a slot that no adapter uses: rank 1, and zero."""
    if slot.lora_inputs is None:
        return {}
    out_features, in_features = matrix_shape(manifest.slots[name].shape)
    a, b = slot.lora_inputs
    return {a: np.zeros((in_features, 1), np.float32), b: np.zeros((1, out_features), np.float32)}


Described = Sequence[tuple[str, tuple[int, ...]]]


def _numbered(what: str, found: Described) -> tuple[str, ...]:
    return tuple(f"{what}_{position}" for position in range(len(found)))


def _specs(what: str, found: Described) -> tuple[TensorSpec, ...]:
    """Name the inputs or outputs of a program that only says how large they may be."""
    names = _numbered(what, found)
    return tuple(
        TensorSpec(name, dtype, tuple(f"at most {size}" for size in shape))
        for name, (dtype, shape) in zip(names, found, strict=True)
    )
