"""``edge-lora inspect``: what is in a bundle, adapter file, scenario set, PEFT or GGUF file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_lora.adapter import Adapter, Delta
from edge_lora.bundle import MANIFEST, Program, read_manifest
from edge_lora.bundle_engine import as_seen_by, choose_engine, engines_of
from edge_lora.cli.output import (
    engine_option,
    human_bytes,
    json_option,
    print_facts,
    print_json,
    print_table,
)
from edge_lora.cli.scenarios import is_set, set_facts
from edge_lora.codebook import Coded
from edge_lora.errors import EdgeLoraError
from edge_lora.forms import (
    FORM_NAMES,
    Bottleneck,
    Form,
    LowRank,
    Values,
    form_nbytes,
    values_of,
)

if TYPE_CHECKING:
    from edge_lora.interop.gguf_file import GgufFile


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--slots", "with_slots", is_flag=True, help="List every slot.")
@engine_option
@json_option
def command(path: Path, with_slots: bool, engine: str, as_json: bool) -> None:
    """Show what is in PATH: a bundle, an adapter file, a scenario set, a PEFT folder, a GGUF file.

    \b
    edge-lora inspect roman.safetensors
    edge-lora inspect smollm2/ --slots
    """
    facts, rows = _facts(path, engine)
    if as_json:
        print_json({**facts, **({"slots": rows} if with_slots else {})})
        return
    print_facts({name: _flat(value) for name, value in facts.items()})
    if with_slots and rows:
        print_table(list(rows[0]), [[_flat(v) for v in row.values()] for row in rows], "slots")


Facts = tuple[dict[str, Any], list[dict[str, Any]]]
"""What is true of the whole, and of each slot."""


def _facts(path: Path, engine: str) -> Facts:
    from edge_lora.interop.gguf_file import is_gguf, open_gguf
    from edge_lora.interop.peft_folder import CONFIG_NAME, WEIGHTS_NAME

    if is_set(path):
        return set_facts(path)
    if path.is_dir():
        peft_files = any((path / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))
        is_peft = peft_files and not (path / MANIFEST).is_file()
        return _peft_facts(path) if is_peft else _bundle_facts(path, engine)
    if is_gguf(path):
        return _gguf_facts(open_gguf(path), path)
    return _adapter_facts(Adapter.load(path), path)


def _peft_facts(folder: Path) -> Facts:
    """Describe a PEFT folder by its config, and as the adapter that it imports as, if it does."""
    from edge_lora.interop.files import size_of
    from edge_lora.interop.peft import from_peft
    from edge_lora.interop.peft_folder import read_config

    config = read_config(folder)
    facts = {
        "kind": "peft",
        "type": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "size": human_bytes(size_of(folder)),
        "bytes": size_of(folder),
    }
    try:
        adapter = from_peft(folder)
    except EdgeLoraError as error:
        return {**facts, "imports": str(error)}, []
    imported = {"slot_count": len(adapter.deltas), **_content(adapter), "imports": "yes"}
    return {**facts, **imported}, [_slot_row(*item) for item in adapter.deltas.items()]


def _gguf_facts(file: GgufFile, path: Path) -> Facts:
    """Describe a GGUF file, adapter or not, by its metadata and its tensors."""
    told = ("general.", "adapter.")
    facts = {
        "kind": "gguf",
        **{key: value for key, value in file.metadata.items() if key.startswith(told)},
        "tensors": len(file.tensors),
        "file_size": human_bytes(path.stat().st_size),
        "file_bytes": path.stat().st_size,
    }
    rows = [{"tensor": name, "shape": list(e.shape)} for name, e in file.tensors.items()]
    return facts, rows


def _adapter_facts(adapter: Adapter, path: Path) -> Facts:
    facts = {
        "kind": "adapter",
        "name": adapter.name,
        "method": adapter.method,
        "base": adapter.base.id,
        "base_fingerprint": adapter.base.fingerprint,
        "alpha": adapter.alpha,
        "slot_count": len(adapter.deltas),
        **_content(adapter),
        "file_size": human_bytes(path.stat().st_size),
        "file_bytes": path.stat().st_size,
        "content_hash": adapter.content_hash,
        "provenance": dict(adapter.provenance),
    }
    return facts, [_slot_row(name, delta) for name, delta in adapter.deltas.items()]


def _content(adapter: Adapter) -> dict[str, Any]:
    """Return how many forms of which kind there are, and how many values are stored how."""
    forms = [form for delta in adapter.deltas.values() for form in delta.forms]
    stored: Counter[str] = Counter()
    for form in forms:
        for values in values_of(form).values():
            stored[_storage(values)] += values.size
    return {
        "forms": dict(Counter(map(_describe, forms))),
        "values": stored.total(),
        "storage": dict(stored),
    }


def _slot_row(name: str, delta: Delta) -> dict[str, Any]:
    return {
        "slot": name,
        "shape": list(delta.shape),
        "dtype": delta.dtype,
        "forms": [_describe(form) for form in delta.forms],
        "storage": [{k: _storage(v) for k, v in values_of(f).items()} for f in delta.forms],
        "bytes": sum(form_nbytes(form) for form in delta.forms),
    }


def _bundle_facts(folder: Path, engine: str) -> Facts:
    """Describe a bundle as one of its engines sees it."""
    whole = read_manifest(folder)
    engines = engines_of(whole)
    asked = engine != "auto" or engines
    manifest = as_seen_by(choose_engine(folder, whole, engine), whole) if asked else whole
    facts = {
        "kind": "bundle",
        "engines": engines,
        "base": manifest.base_id,
        "base_fingerprint": manifest.fingerprint,
        "task": manifest.task,
        "slot_count": len(manifest.slots),
        "inputs": {spec.name: [spec.dtype, list(spec.shape)] for spec in manifest.inputs},
        "outputs": {spec.name: [spec.dtype, list(spec.shape)] for spec in manifest.outputs},
        **_program_facts(manifest.program),
        "files": {name: human_bytes(record.size) for name, record in manifest.files.items()},
        "parity": dict(manifest.parity),
        "producer": dict(manifest.producer),
    }
    rows = [
        {
            "slot": slot.name,
            "shape": list(slot.shape),
            "dtype": slot.dtype,
            "kind": slot.kind,
            "hash": slot.slot_hash,
            "unfused": slot.name in manifest.sites
            or manifest.stored[slot.name].lora_inputs is not None,
        }
        for slot in manifest.slots.values()
    ]
    return facts, rows


def _program_facts(program: Program | None) -> dict[str, Any]:
    if program is None:
        return {}
    return {"largest": dict(program.largest), "weights": program.weights}


def _describe(form: Form) -> str:
    """Return the form's kind, size and how its values are stored: ``low_rank r16 1-bit/row``."""
    words = [FORM_NAMES[type(form)]]
    words += [f"r{form.rank}"] if isinstance(form, LowRank | Bottleneck) else []
    if isinstance(form, LowRank) and form.ranks:
        words.append(f"ranks {','.join(map(str, form.ranks))}")
    words += [str(getattr(form, key)) for key in ("mode", "axis", "act") if hasattr(form, key)]
    stored = {_storage(values): None for values in values_of(form).values()}
    return " ".join([*words, "+".join(stored)])


def _storage(values: Values) -> str:
    """Return a dtype's name, or the bits and, unless it is the tensor, what shares statistics."""
    if not isinstance(values, Coded):
        return values.dtype.name
    return f"{values.bits}-bit" + ("" if values.group == "tensor" else f"/{values.group}")


def _flat(value: Any) -> str:
    """Return nested JSON values as one readable line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_flat(item) for item in value) + "]"
    return str(value)
