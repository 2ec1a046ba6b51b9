"""An adapter as one safetensors file.

* Tensors are called ``<slot>/<form number>/<field>``.
* ``__metadata__["edge_lora"]`` is one JSON object, the header: format version, method, base
  fingerprint, slots with their forms, provenance, and the sha256 of the data section.
* The forms and their fields: ``form_codec``.
* Every tensor belongs to a form, every form has its tensors, nothing else is in the file.

A file from outside is hostile: this reader and the one of the compiled core refuse the same files.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.atomic import replacing
from edge_lora.errors import AdapterFileError, EdgeLoraError, list_all
from edge_lora.form_codec import MAX_AXES, MAX_ELEMENTS, Codebooks, FormReader, Tensors, encode_form
from edge_lora.forms import VALUE_DTYPES
from edge_lora.strict_json import member, natural, number, parse_strict

FORMAT_VERSION = 1
HEADER_KEY = "edge_lora"
DEFAULT_DTYPE = "F32"
"""Of a slot that names none: names take more room than the codes of a small adapter."""
MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 64 << 20
_DTYPES = {**VALUE_DTYPES, "U8": np.dtype(np.uint8), "U32": np.dtype("<u4")}
_KNOWN_KEYS = {
    "edge_lora", "name", "method", "base", "alpha", "slots", "codebooks", "provenance",
    "tensors_sha256",
}  # fmt: skip


def write_adapter(adapter: Adapter, path: Path) -> Path:
    """Write ``adapter`` to ``path`` atomically: a reader sees the old file or the whole new one."""
    tensors: Tensors = {}
    slots: dict[str, Any] = {}
    books = Codebooks()
    for slot, delta in adapter.deltas.items():
        heads = []
        for i, form in enumerate(delta.forms):
            head, fields = encode_form(form, delta.shape, books)
            heads.append(head)
            tensors.update({f"{slot}/{i}/{field}": array for field, array in fields.items()})
        slots[slot] = {
            "shape": list(delta.shape),
            **({"dtype": delta.dtype} if delta.dtype != DEFAULT_DTYPE else {}),
            **({"hash": delta.slot_hash} if delta.slot_hash else {}),
            "forms": heads,
        }
    header = {
        "edge_lora": FORMAT_VERSION,
        "name": adapter.name,
        "method": adapter.method,
        "base": {"id": adapter.base.id, "sha256": adapter.base.fingerprint},
        "alpha": adapter.alpha,
        "slots": slots,
        **({"codebooks": books.heads} if books.heads else {}),
        "provenance": dict(adapter.provenance),
        **adapter.extra,
        "tensors_sha256": hashlib.sha256(_data_section(_serialize(tensors, {}))).hexdigest(),
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    with replacing(path) as part:
        part.write_bytes(_serialize(tensors, {HEADER_KEY: text}))
    return path


def read_adapter(path: Path) -> Adapter:
    """Read and check one adapter file.

    Raises:
        AdapterFileError: With everything that is wrong with the file.
    """
    try:
        return _read(path)
    except FileNotFoundError as error:
        raise AdapterFileError(f"adapter file '{path}' does not exist") from error
    except (EdgeLoraError, OSError) as error:
        raise AdapterFileError(f"adapter file '{path}': {error}") from error


def _read(path: Path) -> Adapter:
    size = path.stat().st_size
    if not path.is_file():
        raise AdapterFileError("not a plain file")
    if size < 10 or size > MAX_FILE_BYTES:
        raise AdapterFileError(f"{size} bytes, an adapter has 10 to {MAX_FILE_BYTES}")
    blob = path.read_bytes()
    header_bytes = int.from_bytes(blob[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(blob) - 8):
        raise AdapterFileError(f"truncated or not safetensors: header claims {header_bytes} bytes")
    metadata = parse_strict(blob[8 : 8 + header_bytes])
    try:
        entries = dict(safetensors.deserialize(blob))  # type: ignore[no-untyped-call]
    except Exception as error:  # of a type of its own
        raise AdapterFileError(f"not a safetensors file: {error}") from error
    if not isinstance(metadata, dict):
        raise AdapterFileError("not a safetensors file: its header is not an object")
    text = (metadata.get("__metadata__") or {}).get(HEADER_KEY)
    header = None if text is None else parse_strict(text)
    if not isinstance(header, dict):
        raise AdapterFileError(
            "a safetensors file, but not an edge_lora adapter (no 'edge_lora' header). "
            "Train one with: edge-lora train"
        )
    version = header.get("edge_lora")
    if type(version) is not int or version != FORMAT_VERSION:
        raise AdapterFileError(
            f"format version {version!r}, this reader knows {FORMAT_VERSION}; "
            "install a newer edge-lora"
        )
    digest = hashlib.sha256(memoryview(blob)[8 + header_bytes :]).hexdigest()
    if digest != header.get("tensors_sha256"):
        raise AdapterFileError("tensor bytes do not match their sha256: the file is damaged")
    return _assemble(header, {name: _array(name, e) for name, e in entries.items()})


def _assemble(header: dict[str, Any], tensors: Tensors) -> Adapter:
    problems: list[str] = []
    deltas: dict[str, Delta] = {}
    try:
        books = Codebooks.decode(member({"codebooks": [], **header}, "codebooks", list))
        for slot, entry in member(header, "slots", dict).items():
            shape = _shape_of(slot, entry)
            reader = FormReader(tensors, books, shape)
            forms = []
            for i, head in enumerate(member(entry, "forms", list)):
                try:
                    forms.append(reader.read(head, f"{slot}/{i}/"))
                except (EdgeLoraError, TypeError, ValueError) as error:
                    problems.append(f"{slot}: form {i}: {error}")
            given = {"dtype": DEFAULT_DTYPE, "hash": "", **entry}
            deltas[slot] = Delta(
                shape, member(given, "dtype", str), tuple(forms), member(given, "hash", str)
            )
        problems += [f"tensor {name!r} belongs to no form" for name in tensors]
        if problems:
            raise AdapterFileError(list_all("damaged", problems))
        base = member(header, "base", dict)
        return Adapter(
            name=member(header, "name", str),
            method=member(header, "method", str),
            base=BaseIdentity(member(base, "sha256", str), member({"id": "", **base}, "id", str)),
            deltas=deltas,
            alpha=number(header, "alpha"),
            provenance=member({"provenance": {}, **header}, "provenance", dict),
            extra={k: v for k, v in header.items() if k not in _KNOWN_KEYS},
        )
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, EdgeLoraError):
            raise
        raise AdapterFileError(f"header is damaged: {error}") from error


def _shape_of(slot: str, entry: dict[str, Any]) -> tuple[int, ...]:
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in slot):
        raise AdapterFileError(f"control characters in the slot's name {slot!r}")
    shape = tuple(natural(n, f"{slot}: shape") for n in member(entry, "shape", list))
    if len(shape) > MAX_AXES or not 0 < math.prod(shape) <= MAX_ELEMENTS:
        raise AdapterFileError(
            f"{slot}: shape {shape}; a slot has 1 to 2^32 values and at most {MAX_AXES} axes"
        )
    return shape


def _array(name: str, entry: dict[str, Any]) -> np.ndarray:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise AdapterFileError(f"tensor {name!r} has dtype {entry['dtype']}, not one of ours")
    if len(entry["shape"]) > MAX_AXES:
        raise AdapterFileError(f"tensor {name!r} has more than {MAX_AXES} axes")
    return np.frombuffer(entry["data"], dtype).reshape(entry["shape"])


def _serialize(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(contiguous, metadata or None)


def _data_section(blob: bytes) -> memoryview:
    return memoryview(blob)[8 + int.from_bytes(blob[:8], "little") :]
