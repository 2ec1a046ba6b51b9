"""The bundle: a folder with the exported base and a manifest that says what is in it.

Layout::

    bundle.json            this module
    onnx/model.onnx        plain ONNX, runs in any ONNX Runtime
    onnx/weights.bin       its external data
    tokenizer/             where the base has one

The exporter writes a bundle, the runtime reads it; they share nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from edge_lora.errors import BundleError, list_all
from edge_lora.slots import Slot, SlotTable

FORMAT_VERSION = (1, 0)
MANIFEST = "bundle.json"
MAX_MANIFEST_BYTES = 64 << 20  # a slot takes about 400 bytes: room for 100,000 of them


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph.

    Attributes:
        name: As the graph calls it.
        dtype: NumPy's name, "float32".
        shape: Of each dimension the size, or the name if it is symbolic.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StoredSlot:
    """Where a slot's weight lies in the bundle.

    Attributes:
        file: Path inside the bundle.
        offset: Bytes from the start of the file.
        layout: "oi" if stored in the slot's own shape, "io" if stored transposed (in, out).
        initializer: Name of the graph's initializer (the torch name).
        operators: ONNX operator types that read it, sorted ("MatMul", "Gather", …).
        lora_inputs: Names of the optional graph inputs a (in, rank) and b (rank, out), if exported.
    """

    file: str
    offset: int
    layout: Literal["oi", "io"]
    initializer: str
    operators: tuple[str, ...] = ()
    lora_inputs: tuple[str, str] | None = None


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 (hex) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that ``bundle.json`` says.

    Attributes:
        base_id: Readable name of the base.
        fingerprint: Base fingerprint over *all* its slots, also those that this bundle leaves out.
        task: "causal-lm" or "generic".
        slots: The slots that adapters may change in this bundle.
        stored: Slot name -> where its weight lies.
        inputs: The graph's required inputs.
        outputs: The graph's outputs.
        files: Path -> size and hash of every file but the manifest.
        parity: Engine -> largest relative error against torch, as measured by the exporter.
        config: What ``generate`` needs: eos ids, layers, heads, head size, vocabulary size.
            "canary": input name -> {"values": flat list, "shape"}, a small run for self-tests;
            floating inputs that it leaves out may be drawn at random.
        producer: Versions of what made the bundle.
        extra: Unknown optional keys, kept.
    """

    base_id: str
    fingerprint: str
    task: Literal["causal-lm", "generic"]
    slots: SlotTable
    stored: Mapping[str, StoredSlot]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: Mapping[str, FileRecord]
    parity: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write ``bundle.json`` atomically and return its path."""
    fields = {
        "base": {"id": manifest.base_id, "fingerprint": manifest.fingerprint},
        "task": manifest.task,
        "slots": [
            {**asdict(slot), "stored": asdict(manifest.stored[slot.name])}
            for slot in manifest.slots.values()
        ],
        **{key: [asdict(spec) for spec in getattr(manifest, key)] for key in ("inputs", "outputs")},
        "files": {path: asdict(record) for path, record in manifest.files.items()},
        **{key: dict(getattr(manifest, key)) for key in ("parity", "config", "producer")},
        **manifest.extra,
    }
    path = folder / MANIFEST
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"edge_lora_bundle": list(FORMAT_VERSION), **fields}, indent=1))
    os.replace(part, path)
    return path


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``bundle.json``.

    Raises:
        BundleError: If it is missing, too large, not JSON, of an unknown version or incomplete, or
            if it names a file outside the folder.
    """
    path = Path(folder) / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"bundle '{folder}': {MANIFEST} is over {MAX_MANIFEST_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(
            f"'{folder}' is not a bundle: no {MANIFEST}. "
            "Make one with: edge-lora export --base MODEL -o DIR"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"bundle '{folder}': {MANIFEST} cannot be read: {error}") from error
    _require_known_version(Path(folder), raw)
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"bundle '{folder}': {MANIFEST} is damaged: {type(error).__name__}: {error}"
        ) from error
    _require_inside(Path(folder), manifest)
    return manifest


def _require_known_version(folder: Path, raw: object) -> None:
    version = raw.get("edge_lora_bundle") if isinstance(raw, dict) else None
    if not isinstance(version, list) or not version or version[0] != FORMAT_VERSION[0]:
        raise BundleError(
            f"bundle '{folder}': {MANIFEST} has format version {version!r}, this reader knows "
            f"{FORMAT_VERSION[0]}.x. Export again, or install a newer edge-lora"
        )


def _parse(raw: dict[str, Any]) -> Manifest:
    del raw["edge_lora_bundle"]
    base, records, stored, slots = raw.pop("base"), raw.pop("slots"), {}, []
    for record in records:
        place = record.pop("stored")
        pair = place.pop("lora_inputs", None)
        operators = tuple(place.pop("operators", ()))
        slot = Slot(
            **{**record, "shape": tuple(record["shape"]), "aliases": tuple(record["aliases"])}
        )
        slots.append(slot)
        stored[slot.name] = StoredSlot(
            **place, operators=operators, lora_inputs=(str(pair[0]), str(pair[1])) if pair else None
        )
    specs = {
        key: tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in raw.pop(key))
        for key in ("inputs", "outputs")
    }
    return Manifest(
        base_id=base["id"],
        fingerprint=base["fingerprint"],
        task=raw.pop("task"),
        slots=SlotTable(slots, base["id"], base["fingerprint"]),
        stored=stored,
        files={path: FileRecord(**record) for path, record in raw.pop("files").items()},
        parity=raw.pop("parity", {}),
        config=raw.pop("config", {}),
        producer=raw.pop("producer", {}),
        extra=raw,
        **specs,
    )


def _require_inside(folder: Path, manifest: Manifest) -> None:
    """Refuse paths that leave the folder, and slots outside their file."""
    problems = []
    for name in manifest.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\0" in name or "\\" in name:
            problems.append(f"file {name!r} lies outside the bundle")
    for slot, place in manifest.stored.items():
        record = manifest.files.get(place.file)
        if record is None:
            problems.append(f"slot {slot}: its file {place.file!r} is not listed")
        elif place.offset < 0 or place.offset > record.size:
            problems.append(f"slot {slot}: offset {place.offset} is outside {place.file!r}")
    if problems:
        raise BundleError(list_all(f"bundle '{folder}' is damaged", problems))


def hash_file(path: Path) -> FileRecord:
    """Return size and sha256 of a file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Raise BundleError that lists every file that is missing or differs from the manifest."""
    problems = []
    for name, expected in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file() or path.is_symlink():
            problems.append(f"{name} is missing or not a plain file")
            continue
        found = hash_file(path)
        if found.size != expected.size:
            problems.append(f"{name} has {found.size} bytes, manifest says {expected.size}")
        elif found.sha256 != expected.sha256:
            problems.append(
                f"{name} has sha256 {found.sha256[:12]}…, manifest says {expected.sha256[:12]}…; "
                "the file changed after export"
            )
    if problems:
        raise BundleError(list_all(f"bundle '{folder}' is damaged", problems))
