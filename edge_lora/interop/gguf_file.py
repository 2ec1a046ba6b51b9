"""The GGUF container: typed metadata and tensors, read and written without trusting a byte.

    "GGUF" | version u32 | tensor count u64 | pair count u64
    pairs:    key string | type u32 | value
    tensors:  name string | axes u32 | sizes u64 … (fastest first) | type u32 | offset u64
    padding to the alignment | data, every tensor aligned

All little-endian; a string is its length (u64) and UTF-8. Source: the specification in ggml's
repository, ``docs/gguf.md``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_lora.atomic import replacing
from edge_lora.errors import AdapterFileError
from edge_lora.forms import VALUE_DTYPES

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
_MAX_COUNT = 1 << 20  # of tensors and of pairs; a large model has thousands
_MAX_TEXT = 1 << 20
_MAX_ARRAY = 1 << 24
_MAX_AXES = 4
_MAX_ALIGNMENT = 1 << 16
_SCALARS = {  # type -> struct's letter
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_UINT32, _FLOAT32, _TEXT, _ARRAY = 4, 6, 8, 9
_TENSOR_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
_TYPE_NUMBERS = {VALUE_DTYPES[name]: number for number, name in _TENSOR_TYPES.items()}

Metadata = dict[str, Any]
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        shape: Slowest axis first, as NumPy has it.
        type: GGML's number of the type.
        offset: Bytes from the start of the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """An opened file; tensors are read one by one.

    Attributes:
        metadata: Key -> number, text, truth value or list of them.
        tensors: Name -> where it lies.
        data: The whole file, mapped.
    """

    metadata: Metadata
    tensors: dict[str, TensorEntry]
    data: NDArray[np.uint8]

    def read(self, name: str) -> NDArray[Any]:
        """Return a copy of one tensor: fp32, fp16 or bf16.

        Raises:
            AdapterFileError: If it has another type or reaches beyond the file.
        """
        entry = self.tensors[name]
        if entry.type not in _TENSOR_TYPES:
            known = ", ".join(_TENSOR_TYPES.values())
            raise AdapterFileError(f"tensor {name!r} has GGML type {entry.type}; known: {known}")
        dtype = VALUE_DTYPES[_TENSOR_TYPES[entry.type]]
        size = math.prod(entry.shape) * dtype.itemsize
        if entry.offset + size > self.data.size:
            raise AdapterFileError(
                f"tensor {name!r} takes bytes {entry.offset} to {entry.offset + size}, "
                f"the file has {self.data.size}"
            )
        raw = self.data[entry.offset : entry.offset + size]
        return np.array(raw).view(dtype).reshape(entry.shape)


def is_gguf(path: Path) -> bool:
    """Whether it is a file that can be read and begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> GgufFile:
    """Read the metadata and the table of tensors.

    Raises:
        AdapterFileError: If the file is missing, damaged or of another version.
    """
    try:
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        return _parse(data)
    except FileNotFoundError as error:
        raise AdapterFileError(f"GGUF file '{path}' does not exist") from error
    except (AdapterFileError, OSError, ValueError) as error:
        raise AdapterFileError(f"GGUF file '{path}': {error}") from error


def write_gguf(path: Path, metadata: Mapping[str, str | int | float], tensors: Tensors) -> Path:
    """Write a file atomically: text, uint32 and fp32 metadata, tensors in fp32, fp16 or bf16."""
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head.append(_text(key))
        match value:
            case str():
                head.append(struct.pack("<I", _TEXT) + _text(value))
            case int():
                head.append(struct.pack("<II", _UINT32, value))
            case float():
                head.append(struct.pack("<If", _FLOAT32, value))
    offset = 0
    for name, array in tensors.items():
        sizes = array.shape[::-1]
        head.append(_text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        head.append(struct.pack("<IQ", _TYPE_NUMBERS[array.dtype], offset))
        offset += _aligned(array.nbytes)
    with replacing(path) as part, part.open("wb") as file:
        file.write(b"".join(head))
        for array in tensors.values():
            file.write(bytes(_aligned(file.tell()) - file.tell()))
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.write(bytes(_aligned(file.tell()) - file.tell()))
    return path


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _aligned(position: int, alignment: int = ALIGNMENT) -> int:
    return -(-position // alignment) * alignment


class _Reader:
    """Takes typed values from the front of a file's bytes."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        if self.position + size > self.data.size:
            raise AdapterFileError(f"truncated: its header goes on beyond {self.data.size} bytes")
        self.position += size
        return self.data[self.position - size : self.position].tobytes()

    def number(self, letter: str) -> Any:  # noqa: ANN401
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def count(self, what: str, most: int) -> int:
        found = int(self.number("Q"))
        if found > most:
            raise AdapterFileError(f"damaged: {found} {what}, at most {most} are read")
        return found

    def text(self) -> str:
        return self.take(self.count("bytes in a text", _MAX_TEXT)).decode()

    def value(self, kind: int) -> Any:  # noqa: ANN401
        if kind == _TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise AdapterFileError(f"damaged: a value has type {kind}")
        item = self.number("I")
        count = self.count("values in a list", _MAX_ARRAY)
        if item == _TEXT:
            return [self.text() for _ in range(count)]
        if item not in _SCALARS:
            raise AdapterFileError(f"damaged: a list has values of type {item}")
        layout = f"<{count}{_SCALARS[item]}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout))))

    def tensor(self) -> TensorEntry:
        axes = self.number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise AdapterFileError(f"damaged: a tensor has {axes} axes, at most {_MAX_AXES}")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        if 0 in shape:
            raise AdapterFileError(f"damaged: a tensor has shape {shape}")
        kind, offset = self.number("I"), self.number("Q")
        return TensorEntry(shape, kind, offset)


def _parse(data: NDArray[np.uint8]) -> GgufFile:
    reader = _Reader(data)
    if reader.take(len(MAGIC)) != MAGIC:
        raise AdapterFileError("not a GGUF file: it does not begin with 'GGUF'")
    version = reader.number("I")
    if version not in (2, VERSION):
        raise AdapterFileError(f"version {version}, this reader knows 2 and {VERSION}")
    tensor_count = reader.count("tensors", _MAX_COUNT)
    metadata: Metadata = {}
    for _ in range(reader.count("metadata pairs", _MAX_COUNT)):
        key = reader.text()
        if key in metadata:
            raise AdapterFileError(f"damaged: key {key!r} stands twice")
        metadata[key] = reader.value(reader.number("I"))
    tensors: dict[str, TensorEntry] = {}
    for _ in range(tensor_count):
        name = reader.text()
        if name in tensors:
            raise AdapterFileError(f"damaged: tensor {name!r} stands twice")
        tensors[name] = reader.tensor()
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
        raise AdapterFileError(f"damaged: general.alignment is {alignment!r}")
    start = _aligned(reader.position, alignment)
    placed = {
        name: TensorEntry(entry.shape, entry.type, start + entry.offset)
        for name, entry in tensors.items()
    }
    return GgufFile(metadata, placed, data)
