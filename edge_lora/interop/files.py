"""Which kind of adapter file something is, and how any of them is read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edge_lora.adapter import Adapter
from edge_lora.errors import AdapterFileError

Kind = Literal["edge-lora", "peft", "gguf"]


def kind_of(path: Path) -> Kind:
    """Return what ``path`` holds: by its first bytes, or because it is a folder.

    Raises:
        AdapterFileError: If there is nothing.
    """
    from edge_lora.interop.gguf_file import is_gguf

    if path.is_dir():
        return "peft"
    if not path.is_file():
        raise AdapterFileError(f"adapter file '{path}' does not exist")
    return "gguf" if is_gguf(path) else "edge-lora"


def read_any(path: Path, base: Path | None = None) -> Adapter:
    """Read an adapter of any kind; with ``base``, a bundle's folder, it is bound to that base.

    Raises:
        EdgeLoraError: What the reader of its kind raises, or AdapterMismatchError.
    """
    from edge_lora.bundle import read_manifest
    from edge_lora.interop.binding import bind
    from edge_lora.interop.gguf import from_gguf
    from edge_lora.interop.peft import from_peft

    match kind_of(path):
        case "peft":
            return from_peft(path, base)
        case "gguf":
            return from_gguf(path, base)
        case "edge-lora":
            adapter = Adapter.load(path)
            return adapter if base is None else bind(adapter, read_manifest(base).slots)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
