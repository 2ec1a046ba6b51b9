"""The bundle: a folder with the exported base and a manifest that says what is in it.

Layout::

    bundle.json            this module
    onnx/model.onnx        plain ONNX, runs in any ONNX Runtime
    onnx/weights.bin       its external data
    executorch/model.pte   plain ExecuTorch program; a bundle has one of the two, or both
    tokenizer/             where the base has one

The exporter writes a bundle, the runtime reads it; they share nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast, get_args

from edge_lora.atomic import replacing
from edge_lora.bundle_fields import (
    MAX_AXIS,
    canary,
    collect,
    digest,
    mapping,
    member,
    natural,
    require_keys,
    sequence,
    text,
)
from edge_lora.bundle_program import Program as Program
from edge_lora.bundle_program import program_record, read_program
from edge_lora.bundle_sites import BundleSite, read_site, site_record
from edge_lora.bundle_slots import FileRecord as FileRecord
from edge_lora.bundle_slots import StoredSlot as StoredSlot
from edge_lora.bundle_slots import read_place, read_slot
from edge_lora.bundle_tensors import TensorSpec as TensorSpec
from edge_lora.bundle_tensors import read_specs
from edge_lora.errors import BundleError, list_all
from edge_lora.slots import Slot, SlotTable

FORMAT_VERSION = (1, 2)  # 1.1: sites, gain inputs; 1.2: an ExecuTorch program
MANIFEST = "bundle.json"
MAX_MANIFEST_BYTES = 64 << 20  # a slot takes about 400 bytes: room for 100,000 of them
Task = Literal["causal-lm", "generic"]


@dataclass(frozen=True)
class Manifest:
    """Everything that ``bundle.json`` says.

    Attributes:
        base_id: Readable name of the base.
        fingerprint: Base fingerprint over *all* its slots, also those that this bundle leaves out.
        task: "causal-lm" or "generic".
        slots: The slots that adapters may change in this bundle, weights and sites.
        stored: Name of a slot with a weight -> where it lies for the ONNX graph; empty if there is
            none.
        inputs: The ONNX graph's required inputs.
        outputs: The ONNX graph's outputs.
        files: Path -> size and hash of every file but the manifest.
        parity: Engine -> largest relative error against torch, as measured by the exporter.
        config: What ``generate`` needs: eos ids, layers, heads, head size, vocabulary size.
            "canary": input name -> {"values": flat list, "shape"}, a small run for self-tests;
            floating inputs that it leaves out may be drawn at random.
        producer: Versions of what made the bundle.
        extra: Unknown optional keys, kept.
        base_slots: How many slots the fingerprint covers; 0 if the manifest does not say.
        sites: Name of a slot that is a site -> its graph inputs.
        program: The ExecuTorch program, if there is one.
    """

    base_id: str
    fingerprint: str
    task: Task
    slots: SlotTable
    stored: Mapping[str, StoredSlot]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: Mapping[str, FileRecord]
    parity: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    base_slots: int = 0
    sites: Mapping[str, BundleSite] = field(default_factory=dict)
    program: Program | None = None

    @property
    def weights(self) -> dict[str, Slot]:
        """The slots that have a weight, by name."""
        return {name: slot for name, slot in self.slots.items() if slot.kind != "site"}


_KNOWN = {f.name for f in fields(Manifest)} - {"program"} | {
    "edge_lora_bundle",
    "base",
    "executorch",
}


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write ``bundle.json`` atomically and return its path."""
    count = {"slots": manifest.base_slots} if manifest.base_slots else {}
    document = {
        "base": {"id": manifest.base_id, "fingerprint": manifest.fingerprint, **count},
        "task": manifest.task,
        "slots": [
            {**asdict(slot), **_stored_record(manifest, name)}
            for name, slot in manifest.weights.items()
        ],
        **({"executorch": program_record(manifest.program)} if manifest.program else {}),
        **({"sites": _site_records(manifest)} if manifest.sites else {}),
        **{key: [asdict(spec) for spec in getattr(manifest, key)] for key in ("inputs", "outputs")},
        "files": {path: asdict(record) for path, record in manifest.files.items()},
        **{key: dict(getattr(manifest, key)) for key in ("parity", "config", "producer")},
        **manifest.extra,
    }
    path = folder / MANIFEST
    with replacing(path) as part:
        part.write_text(
            json.dumps({"edge_lora_bundle": list(FORMAT_VERSION), **document}, indent=1)
        )
    return path


def _stored_record(manifest: Manifest, name: str) -> dict[str, Any]:
    """Return where the ONNX graph's weight lies; empty if there is no such graph."""
    return {"stored": asdict(manifest.stored[name])} if manifest.stored else {}


def _site_records(manifest: Manifest) -> list[dict[str, Any]]:
    return [site_record(manifest.slots[name], site) for name, site in manifest.sites.items()]


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``bundle.json``.

    Raises:
        BundleError: If it is missing, too large, not JSON, of an unknown version or if a field
            is missing or not what it must be; lists every one.
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
        return _parse(raw)
    except (BundleError, RecursionError) as error:
        raise BundleError(f"bundle '{folder}' is damaged: {MANIFEST}: {error}") from error


def _require_known_version(folder: Path, raw: object) -> None:
    version = raw.get("edge_lora_bundle") if isinstance(raw, dict) else None
    if not isinstance(version, list) or not version or version[0] != FORMAT_VERSION[0]:
        raise BundleError(
            f"bundle '{folder}': {MANIFEST} has format version {version!r}, this reader knows "
            f"{FORMAT_VERSION[0]}.x. Export again, or install a newer edge-lora"
        )


def _parse(raw: dict[str, Any]) -> Manifest:
    """Return the manifest; raise BundleError that lists everything that is not as it must be."""
    problems: list[str] = []
    base = collect(problems, _read_base, raw)
    task = collect(problems, text, raw.get("task"), "task", "bundle", get_args(Task))
    files = _read_files(raw.get("files"), problems)
    slots, stored = _read_slots(raw.get("slots"), files, problems)
    site_slots, sites = _read_sites(raw.get("sites", []), slots, problems)
    program = _read_program(raw, slots, stored, files, problems)
    specs = {key: read_specs(raw.get(key), key, problems) for key in ("inputs", "outputs")}
    maps = {
        key: collect(problems, mapping, raw.get(key, {}), key, "bundle") or {}
        for key in ("parity", "config", "producer")
    }
    for key, kind, must in (("parity", int | float, "number"), ("producer", str, "text")):
        for name, value in maps[key].items():
            if not isinstance(value, kind) or isinstance(value, bool):
                problems.append(f"{key}: {name!r} is {value!r:.60}, must be a {must}")
    collect(problems, _check_config, maps["config"])
    if problems or base is None or task is None:
        raise BundleError(list_all("not as it must be", problems))
    return Manifest(
        base_id=base[0],
        fingerprint=base[1],
        base_slots=base[2],
        task=cast("Task", task),
        slots=SlotTable([*slots, *site_slots], base[0], base[1]),
        stored=stored,
        sites=sites,
        program=program,
        files=files,
        extra={key: value for key, value in raw.items() if key not in _KNOWN},
        parity=maps["parity"],
        config=maps["config"],
        producer=maps["producer"],
        inputs=specs["inputs"],
        outputs=specs["outputs"],
    )


def _read_base(raw: dict[str, Any]) -> tuple[str, str, int]:
    base = mapping(raw.get("base"), "base", "bundle")
    name = member(base, "id", "base")
    return (
        name if name == "" else text(name, "id", "base"),
        digest(member(base, "fingerprint", "base"), "fingerprint", "base"),
        natural(base.get("slots", 0), "slots", "base"),
    )


def _read_files(value: object, problems: list[str]) -> dict[str, FileRecord]:
    files = {}
    for name, record in (collect(problems, mapping, value, "files", "bundle") or {}).items():
        found = collect(problems, _read_file, name, record)
        if found is not None:
            files[name] = found
    return files


def _read_file(name: str, value: object) -> FileRecord:
    where = f"file {text(name, 'name', 'files')!r}"
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise BundleError(f"{where} lies outside the bundle")
    record = mapping(value, "record", where)
    require_keys(record, ("size", "sha256"), where)
    return FileRecord(
        natural(member(record, "size", where), "size", where),
        digest(member(record, "sha256", where), "sha256", where),
    )


def _read_slots(
    value: object, files: Mapping[str, FileRecord], problems: list[str]
) -> tuple[list[Slot], dict[str, StoredSlot]]:
    slots: list[Slot] = []
    stored: dict[str, StoredSlot] = {}
    names: set[str] = set()
    for index, record in enumerate(collect(problems, sequence, value, "slots", "bundle") or []):
        slot = collect(problems, read_slot, record, f"slot {index}")
        if slot is None:
            continue
        repeated = names.intersection((slot.name, *slot.aliases))
        if repeated:
            problems.append(f"slot {slot.name}: {sorted(repeated)} names another slot too")
        names.update((slot.name, *slot.aliases))
        slots.append(slot)
        if "stored" in record:
            place = collect(problems, read_place, record["stored"], slot, files)
            if place is not None:
                stored[slot.name] = place
    return slots, stored


def _read_program(
    raw: dict[str, Any],
    slots: list[Slot],
    stored: Mapping[str, StoredSlot],
    files: Mapping[str, FileRecord],
    problems: list[str],
) -> Program | None:
    """Return the program if there is one; note slots that an engine of the bundle lacks."""
    if stored or "executorch" not in raw:
        unplaced = [slot.name for slot in slots if slot.name not in stored]
        problems += [f"slot {name}: 'stored' is missing or damaged" for name in unplaced]
    if "executorch" not in raw:
        return None
    by_name = {slot.name: slot for slot in slots}
    program = collect(problems, read_program, raw["executorch"], by_name, files)
    if program is not None:
        absent = [name for name in by_name if name not in program.slots]
        problems += [f"executorch: slot {name}: is missing" for name in absent]
        if (program.cache_length > 0) != (raw.get("task") == "causal-lm"):
            problems.append(
                f"executorch: 'cache_length' is {program.cache_length} for task {raw.get('task')!r}"
            )
    return program


def _read_sites(
    value: object, weights: list[Slot], problems: list[str]
) -> tuple[list[Slot], dict[str, BundleSite]]:
    taken = {name for slot in weights for name in (slot.name, *slot.aliases)}
    slots: list[Slot] = []
    sites: dict[str, BundleSite] = {}
    for index, record in enumerate(collect(problems, sequence, value, "sites", "bundle") or []):
        found = collect(problems, read_site, record, index)
        if found is None:
            continue
        slot, site = found
        if slot.name in taken:
            problems.append(f"site {slot.name}: names another slot too")
        taken.add(slot.name)
        slots.append(slot)
        sites[slot.name] = site
    return slots, sites


def _check_config(config: Mapping[str, Any]) -> None:
    for key in ("num_layers", "kv_heads", "head_dim", "vocab_size", "context_length"):
        if config.get(key) is not None:
            natural(config[key], key, "config", most=MAX_AXIS)
    for item in sequence(config.get("eos_token_ids", []), "eos_token_ids", "config"):
        natural(item, "eos_token_ids", "config", least=-1, most=MAX_AXIS)
    canary(config.get("canary", {}))


def hash_file(path: Path) -> FileRecord:
    """Return size and sha256 of a file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Raise BundleError that lists every file that is missing or differs from the manifest."""
    problems = []
    root = Path(folder).resolve()
    for name, expected in manifest.files.items():
        path = root / name
        if not path.is_file() or path.resolve() != path:  # a link, or in a linked folder
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
