"""An ExecuTorch program that was not exported for us, described as a bundle without slots."""

from __future__ import annotations

from pathlib import Path

from edge_lora.bundle import Manifest, Program, hash_file
from edge_lora.errors import BundleError
from edge_lora.slots import SlotTable


def is_program(path: Path) -> bool:
    """Whether ``path`` is a program file, and not the folder of a bundle."""
    return path.suffix == ".pte" and path.is_file()


def describe_program(path: Path) -> Manifest:
    """Return a manifest that says as much about a program as its file does.

    Inputs and outputs have no names in it; the engine numbers them.

    Raises:
        BundleError: If the file cannot be read.
    """
    try:
        record = hash_file(path)
    except OSError as error:
        raise BundleError(f"program '{path}' cannot be read: {error}") from error
    return Manifest(
        base_id=path.name,
        fingerprint=record.sha256,
        task="generic",
        slots=SlotTable((), path.name, record.sha256),
        stored={},
        inputs=(),
        outputs=(),
        files={path.name: record},
        program=Program(file=path.name, inputs=(), input_order=(), outputs=(), slots={}),
    )
