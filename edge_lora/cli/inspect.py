"""``edge-lora inspect``: what is in an adapter file or a bundle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from edge_lora.adapter import Adapter, Delta
from edge_lora.bundle import Manifest, read_manifest
from edge_lora.cli.output import human_bytes, json_option, print_facts, print_json, print_table
from edge_lora.codebook import Coded
from edge_lora.forms import (
    FORM_NAMES,
    Bottleneck,
    Form,
    LowRank,
    Values,
    form_nbytes,
    values_of,
)


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--slots", "with_slots", is_flag=True, help="List every slot.")
@json_option
def command(path: Path, with_slots: bool, as_json: bool) -> None:
    """Show what is in PATH, an adapter file or a bundle folder.

    \b
    edge-lora inspect roman.safetensors
    edge-lora inspect smollm2/ --slots
    """
    facts, rows = (
        _bundle_facts(read_manifest(path))
        if path.is_dir()
        else _adapter_facts(Adapter.load(path), path)
    )
    if as_json:
        print_json({**facts, **({"slots": rows} if with_slots else {})})
        return
    print_facts({name: _flat(value) for name, value in facts.items()})
    if with_slots:
        print_table(list(rows[0]), [[_flat(v) for v in row.values()] for row in rows], "slots")


def _adapter_facts(adapter: Adapter, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    forms = Counter(_describe(f) for d in adapter.deltas.values() for f in d.forms)
    facts = {
        "kind": "adapter",
        "name": adapter.name,
        "method": adapter.method,
        "base": adapter.base.id,
        "base_fingerprint": adapter.base.fingerprint,
        "alpha": adapter.alpha,
        "slot_count": len(adapter.deltas),
        "forms": dict(forms),
        "values": sum(_values(f) for d in adapter.deltas.values() for f in d.forms),
        "file_size": human_bytes(path.stat().st_size),
        "file_bytes": path.stat().st_size,
        "content_hash": adapter.content_hash,
        "provenance": dict(adapter.provenance),
    }
    return facts, [_slot_row(name, delta) for name, delta in adapter.deltas.items()]


def _slot_row(name: str, delta: Delta) -> dict[str, Any]:
    return {
        "slot": name,
        "shape": list(delta.shape),
        "dtype": delta.dtype,
        "forms": [_describe(form) for form in delta.forms],
        "bytes": sum(form_nbytes(form) for form in delta.forms),
    }


def _bundle_facts(manifest: Manifest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    facts = {
        "kind": "bundle",
        "base": manifest.base_id,
        "base_fingerprint": manifest.fingerprint,
        "task": manifest.task,
        "slot_count": len(manifest.slots),
        "inputs": {spec.name: [spec.dtype, list(spec.shape)] for spec in manifest.inputs},
        "outputs": {spec.name: [spec.dtype, list(spec.shape)] for spec in manifest.outputs},
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


def _describe(form: Form) -> str:
    """Return the form's kind, size and how its values are stored: ``low_rank r16 1-bit``."""
    words = [FORM_NAMES[type(form)]]
    words += [f"r{form.rank}"] if isinstance(form, LowRank | Bottleneck) else []
    words += [str(getattr(form, key)) for key in ("mode", "axis", "act") if hasattr(form, key)]
    stored = {_storage(values): None for values in values_of(form).values()}
    return " ".join([*words, "+".join(stored)])


def _storage(values: Values) -> str:
    return f"{values.bits}-bit" if isinstance(values, Coded) else values.dtype.name


def _values(form: Form) -> int:
    return sum(values.size for values in values_of(form).values())


def _flat(value: Any) -> str:
    """Return nested JSON values as one readable line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_flat(item) for item in value) + "]"
    return str(value)
