"""Which engine opens a bundle, and the bundle as that engine sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edge_lora.bundle import Manifest, StoredSlot
from edge_lora.bundle_program import ProgramSlot
from edge_lora.errors import EngineUnavailableError, UnknownNameError, unknown_name
from edge_lora.runtime.engines import ENGINES
from edge_lora.slots import SlotTable

_NO_PART = {
    "onnxruntime": "has no ONNX graph",
    "executorch": "has no ExecuTorch program",
}


def choose_engine(folder: Path, manifest: Manifest, asked: str) -> str:
    """Return the engine for a bundle: the one asked for, or for "auto" the first that it has.

    Raises:
        UnknownNameError: If there is no such engine.
        EngineUnavailableError: If the bundle has nothing for it.
    """
    if asked not in ("auto", *ENGINES):
        raise UnknownNameError(unknown_name("engine", asked, ["auto", *ENGINES]))
    has = {
        "onnxruntime": "onnx/model.onnx" in manifest.files,
        "executorch": manifest.program is not None,
    }
    if asked == "auto":
        return next((name for name in ENGINES if has[name]), "onnxruntime")
    if not has[asked]:
        raise EngineUnavailableError(
            f"bundle '{folder}' {_NO_PART[asked]}; export it with engines=({asked!r},)"
        )
    return asked


def as_seen_by(engine: str, manifest: Manifest) -> Manifest:
    """Return the manifest with the inputs, outputs, places and canary of one engine.

    What is only for the other engine is left out: ``program`` is there for ExecuTorch alone.
    """
    if engine == "onnxruntime":
        return replace(manifest, program=None)
    program = manifest.program
    assert program is not None  # choose_engine saw it
    slots = [slot for slot in manifest.slots.values() if slot.name in program.slots]
    return replace(
        manifest,
        slots=SlotTable(slots, manifest.base_id, manifest.fingerprint),
        stored={name: _place(program.file, slot) for name, slot in program.slots.items()},
        inputs=program.inputs,
        outputs=program.outputs,
        config={**manifest.config, "canary": program.canary},
        sites={},
    )


def _place(file: str, slot: ProgramSlot) -> StoredSlot:
    operators = [("embedding", slot.is_read_in_place), ("linear", bool(slot.key))]
    return StoredSlot(
        file=file,
        offset=slot.offset,
        layout="oi",
        initializer="",
        operators=tuple(name for name, reads in operators if reads),
        lora_inputs=slot.lora_inputs,
    )
