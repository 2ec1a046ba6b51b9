"""An adapter as one safetensors file.

* Tensors are called ``<slot>/<form number>/<field>``.
* ``__metadata__["edge_lora"]`` is one JSON object, the header: format version, method, base
  fingerprint, slots with their forms, provenance, and the sha256 of the data section.
* Fields: low_rank ``A`` (rank, in), ``Bt`` (rank, out); sparse ``idx`` (U8 stream, see
  ``index_codec``), ``val`` (nnz); block ``idx`` U32 (k), ``val``; dense ``val``.
* Every tensor belongs to a form, every form has its tensors, nothing else is in the file.

A file from outside is hostile: this reader and the one of the compiled core refuse the same files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from edge_lora import index_codec
from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.errors import AdapterFileError, EdgeLoraError, list_all
from edge_lora.forms import (
    FORM_NAMES,
    VALUE_DTYPES,
    Block,
    Dense,
    Form,
    LowRank,
    Sparse,
    matrix_shape,
)
from edge_lora.strict_json import member, natural, number, parse_strict

FORMAT_VERSION = 1
HEADER_KEY = "edge_lora"
MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 64 << 20
MAX_ELEMENTS = 1 << 32  # an index is a uint32
MAX_AXES = 8
_DTYPES = {**VALUE_DTYPES, "U8": np.dtype(np.uint8), "U32": np.dtype("<u4")}
_KNOWN_KEYS = {
    "edge_lora", "name", "method", "base", "alpha", "slots", "provenance", "tensors_sha256",
}  # fmt: skip
Tensors = dict[str, np.ndarray]


def write_adapter(adapter: Adapter, path: Path) -> Path:
    """Write ``adapter`` to ``path`` atomically: a reader sees the old file or the whole new one."""
    tensors: Tensors = {}
    slots: dict[str, Any] = {}
    for slot, delta in adapter.deltas.items():
        heads = []
        for i, form in enumerate(delta.forms):
            head, fields = _encode(form, matrix_shape(delta.shape))
            heads.append(head)
            tensors.update({f"{slot}/{i}/{field}": array for field, array in fields.items()})
        slots[slot] = {
            "shape": list(delta.shape),
            "dtype": delta.dtype,
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
        "provenance": dict(adapter.provenance),
        **adapter.extra,
        "tensors_sha256": hashlib.sha256(_data_section(_serialize(tensors, {}))).hexdigest(),
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(_serialize(tensors, {HEADER_KEY: text}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
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
        for slot, entry in member(header, "slots", dict).items():
            shape = _shape_of(slot, entry)
            forms = []
            for i, head in enumerate(member(entry, "forms", list)):
                try:
                    forms.append(_decode(head, f"{slot}/{i}/", tensors, matrix_shape(shape), shape))
                except (EdgeLoraError, TypeError, ValueError) as error:
                    problems.append(f"{slot}: form {i}: {error}")
            slot_hash = member({"hash": "", **entry}, "hash", str)
            deltas[slot] = Delta(shape, member(entry, "dtype", str), tuple(forms), slot_hash)
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


def _encode(form: Form, shape: tuple[int, int]) -> tuple[dict[str, Any], Tensors]:
    head: dict[str, Any] = {"form": FORM_NAMES[type(form)], "scale": float(form.scale)}
    if not isinstance(form, LowRank):
        head["mode"] = form.mode
    match form:
        case LowRank(a=a, b=b):
            return head, {"A": a, "Bt": b.T}
        case Sparse(indices=indices, values=values):
            lines = index_codec.lines_of(indices, shape)
            stream, k = index_codec.rice_encode(indices if lines is None else lines)
            index = "rice" if lines is None else "line16"
            return {**head, "index": index, "k": k}, {"idx": stream, "val": values}
        case Block(axis=axis, indices=indices, values=values):
            return {**head, "axis": axis}, {"idx": indices, "val": values}
        case Dense(values=values):
            return head, {"val": values}


def _decode(
    head: dict[str, Any],
    prefix: str,
    tensors: Tensors,
    shape: tuple[int, int],
    full: tuple[int, ...],
) -> Form:
    def take(field: str) -> np.ndarray:
        if prefix + field not in tensors:
            raise AdapterFileError(f"tensor {prefix + field!r} is missing")
        return tensors.pop(prefix + field)

    kind, scale = member(head, "form", str), number(head, "scale")
    if kind == "low_rank":
        return LowRank(take("A"), np.ascontiguousarray(take("Bt").T), scale)
    if kind not in FORM_NAMES.values():
        raise AdapterFileError(f"unknown form {kind!r}; known: {sorted(FORM_NAMES.values())}")
    mode: Any = member(head, "mode", str)
    if mode not in ("add", "set"):
        raise AdapterFileError(f"unknown mode {mode!r}; known: 'add', 'set'")
    values = take("val")
    if kind == "dense":
        return Dense(values.reshape(full), scale, mode)
    if kind == "block":
        axis: Any = member(head, "axis", str)
        if axis not in ("row", "col"):
            raise AdapterFileError(f"unknown axis {axis!r}; known: 'row', 'col'")
        return Block(axis, take("idx"), values, scale, mode)
    return Sparse(_decode_indices(head, take("idx"), values.size, shape), values, scale, mode)


def _decode_indices(
    head: dict[str, Any], stream: np.ndarray, count: int, shape: tuple[int, int]
) -> np.ndarray:
    out_features, in_features = shape
    size, line = out_features * in_features, index_codec.LINE
    if stream.dtype != np.uint8 or stream.ndim != 1:
        raise AdapterFileError(f"idx is {stream.dtype} {stream.shape}, must be a uint8 stream")
    coding, k = member(head, "index", str), natural(head.get("k"), "k")
    if coding == "rice":
        return index_codec.rice_decode(stream, count, k, size)
    if coding != "line16":
        raise AdapterFileError(f"unknown index coding {coding!r}; known: 'rice', 'line16'")
    if out_features % line or count % line:
        raise AdapterFileError(f"line16 indices need multiples of 16, found {shape} and {count}")
    lines = index_codec.rice_decode(stream, count // line, k, size // line)
    return index_codec.expand_lines(lines, in_features)


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
