"""Find ONNX Runtime's packed weights in the memory that it took from our allocator.

The layout of a packed weight is the kernel's own business and differs between processors. It is
read off a one-node session that packs a weight whose values name their positions, once per shape,
and cached. A block of the real session belongs to a slot if *every* value of it is the slot's
value in that layout; nothing is assumed that was not compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache

import onnxruntime as ort

from edge_lora import native
from edge_lora.bundle import Manifest, StoredSlot
from edge_lora.errors import EdgeLoraError, UnsupportedError
from edge_lora.forms import matrix_shape
from edge_lora.native import Image, Layout
from edge_lora.runtime.cache import cache_folder, cache_key, store_bytes
from edge_lora.runtime.engines.one_node import matmul_model
from edge_lora.slots import Slot

# Operators that pack a constant fp32 weight; the engine folds a Transpose away and packs behind it.
Blocks = dict[int, int]
"""Address -> bytes."""

_PACKING = {"MatMul", "Gemm", "Transpose"}
# Held while a session of ours is made or freed, so that the blocks that appear are its own: another
# session over the same base holds blocks with the same bytes.
changing_blocks = threading.RLock()


def is_packed(slot: Slot, place: StoredSlot) -> bool:
    """Whether the engine keeps its own packed copy and nothing else of this weight."""
    return may_pack(slot, place) and set(place.operators) <= _PACKING


def may_pack(slot: Slot, place: StoredSlot) -> bool:
    """Whether the engine may keep a packed copy of this weight at all."""
    return slot.kind != "other" and not place.is_input


def require_allocator() -> None:
    """Register the compiled core as ONNX Runtime's allocator, once per process.

    Raises:
        UnsupportedError: If the engine refuses; the message is the engine's.
    """
    if native.allocator_status() != "registered":
        ort.SessionOptions().register_custom_ops_library(native.library_path())
    if native.allocator_status() != "registered":
        raise UnsupportedError(f"ONNX Runtime refused our allocator: {native.allocator_status()}")


def opt_in(options: ort.SessionOptions) -> None:
    """Let this session take its memory from our allocator; other sessions are not touched."""
    options.add_session_config_entry("session.use_env_allocators", "1")


def make_session(make: Callable[[], ort.InferenceSession]) -> tuple[ort.InferenceSession, Blocks]:
    """Call ``make`` and return its session, with the long-lived blocks that the session took."""
    with changing_blocks:
        before = {address for address, _, _ in native.live_blocks()}
        session = make()
        live = native.live_blocks()
    return session, {a: size for a, size, reserved in live if reserved and a not in before}


def bind_packed_blocks(image: Image, manifest: Manifest, version: str, blocks: Blocks) -> list[str]:
    """Bind every slot that the engine packs to its block; return what is not found or ambiguous.

    Args:
        image: What to bind to.
        manifest: Of the bundle.
        version: Of the engine.
        blocks: Those of this session and no other.
    """
    problems, free = [], dict(blocks)
    for name, place in manifest.stored.items():
        slot = manifest.slots[name]
        if not may_pack(slot, place) or not set(place.operators) & _PACKING:
            continue
        out_features, in_features = matrix_shape(slot.shape)
        layout = packed_layout(in_features, out_features, version)
        found = _bind(image, name, layout, free)
        if not found:
            problems.append(f"{name}: no block holds its weight")
        if len(found) > 1:
            problems.append(
                f"{name}: {len(found)} blocks look alike, other weights have its values"
            )
        for address in found:
            del free[address]
    return problems


@lru_cache(maxsize=256)
def packed_layout(in_features: int, out_features: int, version: str) -> Layout:
    """Return where the engine puts each value of a packed fp32 (in, out) weight here."""
    key = cache_key("onnxruntime", version, native.cpu_features(), "f32", in_features, out_features)
    path = cache_folder("layouts") / key
    try:
        return _of_shape(Layout.from_bytes(path.read_bytes()), in_features, out_features)
    except (OSError, EdgeLoraError):  # not there, or damaged: made again
        layout = _probe(in_features, out_features)
        store_bytes(path, layout.to_bytes())
        return layout


def _of_shape(layout: Layout, in_features: int, out_features: int) -> Layout:
    if layout.elements < in_features * out_features:
        raise UnsupportedError("the cached layout is of another shape")
    return layout


def _probe(in_features: int, out_features: int) -> Layout:
    values = Layout.probe_values(in_features, out_features, "io")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    opt_in(options)
    model = matmul_model(values)
    with changing_blocks:
        session, blocks = make_session(
            lambda: ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        )
        problems = []
        try:
            for address, size in blocks.items():
                if size < values.nbytes:
                    continue
                try:
                    return Layout.from_probe(address, size, in_features, out_features)
                except UnsupportedError as error:
                    problems.append(str(error))
        finally:
            del session  # its block had to live until here
    raise UnsupportedError(
        f"ONNX Runtime's packing of a ({in_features}, {out_features}) weight is not readable here: "
        f"{'; '.join(problems) or 'no packed block appeared'}"
    )


def _bind(image: Image, name: str, layout: Layout, free: Blocks) -> list[int]:
    """Bind every free block that may hold the slot's weight; return where: one, or it has failed.

    Another layer's may look the same: it need not be a slot, nor of this shape if all values are 0.
    The engine may also share one block among equal weights; then the second slot finds none left.
    """
    least = layout.elements * 4
    return [
        address
        for address, size in free.items()
        if least <= size < least + 4096 and image.add_place(name, layout, address, size)
    ]
