"""The part of the manifest about weights: each slot, and where its weight lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, cast, get_args

from edge_lora.bundle_fields import (
    axes,
    digest,
    mapping,
    member,
    natural,
    require_keys,
    text,
    texts,
)
from edge_lora.errors import BundleError
from edge_lora.forms import VALUE_DTYPES
from edge_lora.slots import Slot, SlotKind

Layout = Literal["oi", "io"]


@dataclass(frozen=True)
class StoredSlot:
    """Where a slot's weight lies in the bundle.

    Attributes:
        file: Path inside the bundle.
        offset: Bytes from the start of the file.
        layout: "oi" if stored in the slot's own shape, "io" if stored transposed (in, out).
        initializer: Name of the graph's initializer (the torch name).
        operators: Operator types that read it, sorted: of ONNX ("MatMul", "Gather", …), or as a
            place of an ExecuTorch program "linear" and "embedding".
        lora_inputs: Names of the optional graph inputs a (in, rank) and b (rank, out), if exported;
            of a convolution two kernels, a (rank, in, …) and b (out, rank, 1, …).
        gain_input: Name of the optional graph input (out,) that multiplies the base's product.
        is_input: Whether the graph has the weight itself as an optional input, so that no engine
            may pack it, fold it away or copy it.
    """

    file: str
    offset: int
    layout: Layout
    initializer: str
    operators: tuple[str, ...] = ()
    lora_inputs: tuple[str, str] | None = None
    gain_input: str | None = None
    is_input: bool = False

    @property
    def is_table(self) -> bool:
        """Whether rows of it are looked up and nothing else, so that not every run reads all."""
        return self.operators in (("Gather",), ("embedding",))


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 (hex) of one file of the bundle."""

    size: int
    sha256: str


def read_slot(value: object, where: str) -> Slot:
    """Return one slot of a stranger's manifest; raises BundleError."""
    record = mapping(value, "record", where)
    name = text(member(record, "name", where), "name", where)
    where = f"slot {name}"
    kinds = [kind for kind in get_args(SlotKind) if kind != "site"]  # those have a list of theirs
    kind = text(record.get("kind", "linear"), "kind", where, kinds)
    require_keys(record, (*(f.name for f in fields(Slot)), "stored"), where)
    shape = axes(member(record, "shape", where), "shape", where, least=1)
    if not shape:
        raise BundleError(f"{where}: 'shape' has no axes")
    return Slot(
        name=name,
        shape=shape,
        dtype=text(member(record, "dtype", where), "dtype", where, VALUE_DTYPES),
        sha256=digest(member(record, "sha256", where), "sha256", where),
        kind=cast("SlotKind", kind),
        aliases=texts(record.get("aliases", []), "aliases", where),
    )


def read_place(value: object, slot: Slot, files: Mapping[str, FileRecord]) -> StoredSlot:
    """Return where a stranger's manifest says that a slot's weight lies; raises BundleError."""
    where = f"slot {slot.name}"
    record = mapping(value, "stored", where)
    require_keys(record, (f.name for f in fields(StoredSlot)), where)
    layout = text(member(record, "layout", where), "layout", where, get_args(Layout))
    file = text(member(record, "file", where), "file", where)
    offset = member(record, "offset", where)
    pair = record.get("lora_inputs")
    if pair is not None and len(texts(pair, "lora_inputs", where)) != 2:
        raise BundleError(f"{where}: 'lora_inputs' must be two names")
    gain = record.get("gain_input")
    is_input = record.get("is_input", False)
    if type(is_input) is not bool:
        raise BundleError(f"{where}: 'is_input' must be true or false")
    if file not in files:
        raise BundleError(f"{where}: its file {file!r} is not listed or its record is damaged")
    room = files[file].size - math.prod(slot.shape) * VALUE_DTYPES[slot.dtype].itemsize
    if type(offset) is int and not 0 <= offset <= room:
        raise BundleError(f"{where}: its weight at 'offset' {offset} is outside {file!r}")
    return StoredSlot(
        file=file,
        offset=natural(offset, "offset", where),
        layout=cast("Layout", layout),
        initializer=text(member(record, "initializer", where), "initializer", where),
        operators=texts(record.get("operators", []), "operators", where),
        lora_inputs=(pair[0], pair[1]) if pair is not None else None,
        gain_input=text(gain, "gain_input", where) if gain is not None else None,
        is_input=is_input,
    )
