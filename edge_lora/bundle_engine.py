"""Which engine opens a bundle, and the manifest as that engine sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edge_lora.bundle import Manifest, StoredSlot
from edge_lora.bundle_program import ProgramSlot
from edge_lora.errors import EngineUnavailableError, UnknownNameError, unknown_name
from edge_lora.slots import SlotKind, SlotTable

PARTS = {"onnxruntime": "ONNX graph", "executorch": "ExecuTorch program"}
"""Engine -> what a bundle has for it."""


def engines_of(manifest: Manifest) -> list[str]:
    """Return the engines that a bundle was exported for."""
    has = {
        "onnxruntime": "onnx/model.onnx" in manifest.files,
        "executorch": manifest.program is not None,
    }
    return [name for name in PARTS if has[name]]


def choose_engine(folder: Path, manifest: Manifest, asked: str) -> str:
    """Return the engine for a bundle: the one asked for, or for "auto" the first that it has.

    Raises:
        UnknownNameError: If there is no such engine.
        EngineUnavailableError: If the bundle has nothing for it.
    """
    if asked not in ("auto", *PARTS):
        raise UnknownNameError(unknown_name("engine", asked, ["auto", *PARTS]))
    has = engines_of(manifest)
    if asked == "auto" and has:
        return has[0]
    if asked not in has:
        wanted = list(PARTS) if asked == "auto" else [asked]
        parts = " and no ".join(PARTS[name] for name in wanted)
        raise EngineUnavailableError(
            f"bundle '{folder}' has no {parts}; export it with engines={(*wanted,)}"
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
        stored={s.name: _place(program.file, program.slots[s.name], s.kind) for s in slots},
        inputs=program.inputs,
        outputs=program.outputs,
        config={**manifest.config, "canary": program.canary},
        sites={},
    )


def _place(file: str, slot: ProgramSlot, kind: SlotKind) -> StoredSlot:
    operators = {kind} if slot.is_read_in_place else set()
    return StoredSlot(
        file=file,
        offset=slot.offset,
        layout="oi",
        initializer="",
        operators=tuple(sorted(operators | ({"linear"} if slot.key else set()))),
        lora_inputs=slot.lora_inputs,
    )
