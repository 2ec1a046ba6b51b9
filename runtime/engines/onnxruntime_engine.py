"""ONNX Runtime on the CPU.

Route ``packed``: the compiled core is the engine's allocator, so that every packed weight is born
in memory that we know and may patch (``edge_lora.runtime.engines.packed_blocks`` finds them).
Weights that the engine uses as they are (embeddings, convolutions) are handed over in memory of our
own.
Route ``unpacked``: all slot weights are handed over, and the engine is told not to pack.
Route ``reload``: an ordinary session, built anew with other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_lora.bundle import Manifest, StoredSlot, TensorSpec
from edge_lora.errors import BundleError, UnsupportedError, list_all
from edge_lora.forms import matrix_shape
from edge_lora.native import Image, Layout
from edge_lora.runtime.engines import Arrays, Route
from edge_lora.runtime.engines.packed_blocks import (
    bind_packed_blocks,
    changing_blocks,
    is_packed,
    make_session,
    opt_in,
    require_allocator,
)

ort.set_default_logger_severity(3)  # rank-0 slots make ONNX Runtime warn once per tensor
_NUMPY = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
# Fusions that would fold a weight of ours into another constant, out of a patch's reach.
_FOLDING = {
    "Conv": ["NchwcTransformer", "ConvBNFusion", "ConvMulFusion", "ConvAddFusion"],
    "Gather": [],
    "MatMul": [],
    "Gemm": [],
}


class OnnxRuntimeEngine:
    """One ONNX Runtime session over a bundle."""

    def __init__(self, folder: Path, manifest: Manifest, route: Route, threads: int) -> None:
        """Build the session; see ``open_engine``."""
        self.route: Route = route
        self.version: str = ort.__version__
        self._folder, self._manifest, self._threads = folder, manifest, threads
        self._ours: dict[str, NDArray[np.float32]] = {}  # slot -> weight in memory of our own
        if route == "packed":
            require_allocator()
            slots = manifest.weights.items()
            handed = [n for n, slot in slots if not is_packed(slot, manifest.stored[n])]
            self._ours = {slot: self._read(slot) for slot in handed}
        elif route == "unpacked":
            self._ours = {slot: self._map(slot) for slot in manifest.stored}
        self._session, self._values = self._build(self._ours)
        self.inputs = {i.name: _spec(i) for i in self._session.get_inputs()}
        self.outputs = {o.name: _spec(o) for o in self._session.get_outputs()}
        self._names = list(self.outputs)

    def run(self, feeds: Arrays) -> dict[str, NDArray[np.generic]]:
        """Run once; outputs are owned by the caller."""
        return self._named(self._session.run, feeds)

    def run_values(self, feeds: Mapping[str, object]) -> dict[str, object]:
        """Run once on OrtValues, without copies."""
        return self._named(self._session.run_with_ort_values, feeds)

    def _named(self, run: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        try:
            return dict(zip(self._names, run(self._names, dict(feeds)), strict=True))
        except Exception as error:  # ONNX Runtime raises a dozen types without a common base
            raise UnsupportedError(f"ONNX Runtime refused this run: {error}") from error

    def value(self, array: NDArray[np.generic]) -> object:
        """Return an OrtValue over ``array``, which must be contiguous and stay alive."""
        return ort.OrtValue.ortvalue_from_numpy(array)

    def numpy(self, value: object) -> NDArray[np.generic]:
        """Return the OrtValue's content."""
        result: NDArray[np.generic] = value.numpy()  # type: ignore[attr-defined]
        return result

    def bind(self, image: Image) -> None:
        """Tell ``image`` where each slot's weight lies."""
        missing = []
        for slot, array in self._ours.items():
            out_features, in_features = matrix_shape(self._manifest.slots[slot].shape)
            layout = Layout.plain(in_features, out_features, self._manifest.stored[slot].layout)
            if not image.add_place(slot, layout, array.ctypes.data, array.nbytes):
                missing.append(f"{slot}: the file changed while it was read")
        if self.route == "packed":
            missing += bind_packed_blocks(image, self._manifest, self.version, self._blocks)
        if missing:
            raise UnsupportedError(
                list_all("packed weights not found in the engine's memory", missing)
            )

    def replace_weights(self, weights: Arrays) -> None:
        """Build a new session in which the slots of ``weights`` have other values."""
        handed = {}
        for slot, weight in weights.items():
            matrix = weight.reshape(matrix_shape(weight.shape))
            stored = matrix.T if self._manifest.stored[slot].layout == "io" else weight
            handed[slot] = np.ascontiguousarray(stored, np.float32)
        session, values = self._build(handed)
        self._session = session
        self._values, self._ours = values, handed

    def close(self) -> None:
        """Free the session, then the weights that it reads."""
        with changing_blocks:
            del self._session
        self._values.clear()
        self._ours.clear()

    def _build(self, handed: Mapping[str, NDArray[np.float32]]) -> tuple[Any, dict[str, object]]:
        """Return a session and the tensors that it reads, which must outlive it."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        operators = {op for slot in handed for op in self._manifest.stored[slot].operators}
        disabled = sorted({name for op in operators for name in _FOLDING.get(op, [])})
        if self.route == "packed":
            opt_in(options)
        else:  # what is handed over must not be folded away, as behind a tied head's Transpose
            disabled.append("ConstantFolding")
        if self.route == "unpacked":
            options.add_session_config_entry("session.disable_prepacking", "1")
        values = {slot: self.value(array) for slot, array in handed.items()}
        for slot, value in values.items():
            options.add_initializer(self._manifest.stored[slot].initializer, value)
        model = self._folder / "onnx" / "model.onnx"
        try:
            session, self._blocks = make_session(
                lambda: ort.InferenceSession(
                    str(model),
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=disabled,
                )
            )
        except Exception as error:  # ONNX Runtime raises a dozen types without a common base
            kind = BundleError if self.route == "reload" else UnsupportedError  # others may work
            raise kind(f"ONNX Runtime cannot open '{model}': {error}") from error
        return session, values

    def _read(self, slot: str) -> NDArray[np.float32]:
        place, shape = self._place(slot)
        count = int(np.prod(shape))
        path = self._folder / place.file
        return np.fromfile(path, np.float32, count, offset=place.offset).reshape(shape)

    def _map(self, slot: str) -> NDArray[np.float32]:
        place, shape = self._place(slot)
        path = self._folder / place.file
        return np.memmap(
            path, np.float32, "c", place.offset, shape
        )  # copy on write: the file stays

    def _place(self, slot: str) -> tuple[StoredSlot, tuple[int, ...]]:
        place, shape = self._manifest.stored[slot], self._manifest.slots[slot].shape
        return place, matrix_shape(shape)[::-1] if place.layout == "io" else shape


def open_engine(folder: Path, manifest: Manifest, route: Route, threads: int) -> OnnxRuntimeEngine:
    """Open a bundle's graph in ONNX Runtime.

    Raises:
        UnsupportedError: If the route is not possible here.
        BundleError: If the engine may fold a slot away, whatever the route.
    """
    others = sorted({s.dtype for s in manifest.weights.values()} - {"F32"})
    if others and route != "reload":
        raise UnsupportedError(f"slots of dtype {others} cannot be patched in place yet, only F32")
    fp32 = {n: slot for n, slot in manifest.weights.items() if slot.dtype == "F32"}
    small = [name for name, slot in fp32.items() if slot.kind == "other"]
    if foldable := [name for name in small if not manifest.stored[name].is_input]:
        title = "slots that ONNX Runtime may fold away, from an older export"
        raise BundleError(f"{list_all(title, foldable)}\nExport the bundle again")
    return OnnxRuntimeEngine(folder, manifest, route, threads)


def _spec(node: ort.NodeArg) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d) for d in node.shape)
    return TensorSpec(node.name, _NUMPY.get(node.type, node.type), shape)
