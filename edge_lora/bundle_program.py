"""The part of the manifest about the ExecuTorch program: its inputs, and where its weights lie.

The raw values of every slot lie in the program file, row-major in the slot's own shape. XNNPACK
packs those that it computes with and names each packed weight by what went into it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, cast, get_args

from edge_lora.bundle_fields import (
    MAX_AXIS,
    canary,
    collect,
    digest,
    mapping,
    member,
    natural,
    require_keys,
    text,
    texts,
)
from edge_lora.bundle_slots import FileRecord
from edge_lora.bundle_tensors import TensorSpec, read_specs
from edge_lora.errors import BundleError, list_all
from edge_lora.slots import Slot

ProgramWeights = Literal["fp32", "int8-dynamic"]
ProgramDtype = Literal["F32", "I8"]
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "I8": 1}


@dataclass(frozen=True)
class ProgramSlot:
    """Where the program keeps a slot's weight.

    Attributes:
        offset: Bytes from the start of the program file, of the raw values.
        key: The name of the packed weight in XNNPACK's cache: sha256 (hex) of the raw values,
            followed by that of the layer's bias if it has one. "" if XNNPACK does not pack it.
        dtype: "F32", or "I8": a weight is ``code * scale`` of its row, codes as raw values.
        scales_offset: I8: bytes from the start of the file, of (out,) fp32 scales.
        is_read_in_place: Whether a kernel reads the raw values where they lie, so that writing
            there changes the base: embeddings. A tied weight is packed too, from a copy.
        packed_offset: Of a tied weight: bytes from the start of the file, of that copy.
        lora_inputs: Names of the inputs a (in, rank) and b (rank, out), if exported.
    """

    offset: int
    key: str
    dtype: ProgramDtype = "F32"
    scales_offset: int | None = None
    is_read_in_place: bool = False
    packed_offset: int | None = None
    lora_inputs: tuple[str, str] | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the raw values lie: once, or twice if the weight is tied."""
        return (self.offset,) if self.packed_offset is None else (self.offset, self.packed_offset)


@dataclass(frozen=True)
class Program:
    """An ExecuTorch program: one file, one method ``forward``.

    Attributes:
        file: Path inside the bundle.
        inputs: The required inputs, in the method's order.
        input_order: Every input of the method by position, inputs of slots included.
        outputs: In the method's order.
        slots: Name of a slot -> where its weight lies.
        weights: "fp32", or "int8-dynamic": 8-bit weights with a scale per row, and activations that
            are quantised at every run.
        cache_length: Positions of the KV cache inside the program; 0: it has none.
        max_rank: Largest rank that the inputs of slots take; 0: there are none.
        largest: Name of a symbolic size -> the most that the program takes.
        canary: Input name -> {"values": flat list, "shape"}, a small run for self-tests; floating
            inputs that it leaves out may be drawn at random.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    input_order: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    slots: Mapping[str, ProgramSlot]
    weights: ProgramWeights = "fp32"
    cache_length: int = 0
    max_rank: int = 0
    largest: Mapping[str, int] = field(default_factory=dict)
    canary: Mapping[str, Any] = field(default_factory=dict)


def program_record(program: Program) -> dict[str, Any]:
    """Return the manifest's record of a program."""
    return asdict(program)


def read_program(
    value: object, slots: Mapping[str, Slot], files: Mapping[str, FileRecord]
) -> Program:
    """Return the program of a stranger's manifest.

    Args:
        value: Its record.
        slots: The slots of the bundle that have a weight.
        files: The bundle's files.

    Raises:
        BundleError: If a field is missing or not what it must be; lists every one.
    """
    where = "executorch"
    record = mapping(value, where, "bundle")
    require_keys(record, (f.name for f in fields(Program)), where)
    problems: list[str] = []
    file = text(member(record, "file", where), "file", where)
    if file not in files:
        raise BundleError(f"{where}: its file {file!r} is not listed or its record is damaged")
    specs = {
        key: read_specs(record.get(key), key, problems, where) for key in ("inputs", "outputs")
    }
    places = _read_places(record.get("slots"), slots, files[file], problems)
    order = collect(problems, texts, record.get("input_order"), "input_order", where) or ()
    weights = text(member(record, "weights", where), "weights", where, get_args(ProgramWeights))
    largest = collect(problems, _read_largest, record.get("largest", {}), specs["inputs"]) or {}
    problems += _disagreements(order, specs["inputs"], places, weights)
    collect(problems, canary, record.get("canary", {}), where)
    numbers = {
        key: natural(record.get(key, 0), key, where, most=MAX_AXIS)
        for key in ("cache_length", "max_rank")
    }
    if not numbers["max_rank"] and any(place.lora_inputs for place in places.values()):
        problems.append(f"{where}: slots have inputs, but 'max_rank' is 0")
    if problems:
        raise BundleError(list_all("not as it must be", problems))
    return Program(
        file=file,
        inputs=specs["inputs"],
        outputs=specs["outputs"],
        input_order=order,
        slots=places,
        weights=cast("ProgramWeights", weights),
        largest=largest,
        canary=record.get("canary", {}),
        **numbers,
    )


def _read_largest(value: object, inputs: Iterable[TensorSpec]) -> dict[str, int]:
    where = "executorch: largest"
    record = mapping(value, "largest", "executorch")
    names = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    if unknown := sorted(set(record) - names):
        raise BundleError(f"{where}: {unknown[0]!a:.60} is no size of an input")
    return {name: natural(n, name, where, least=1, most=MAX_AXIS) for name, n in record.items()}


def _read_places(
    value: object, slots: Mapping[str, Slot], file: FileRecord, problems: list[str]
) -> dict[str, ProgramSlot]:
    places = {}
    for name, record in (collect(problems, mapping, value, "slots", "executorch") or {}).items():
        if name not in slots:
            problems.append(f"executorch: slot {name!a:.60} is not in the slot table")
            continue
        place = collect(problems, _read_place, record, slots[name], file)
        if place is not None:
            places[name] = place
    keys = [place.key[:64] for place in places.values() if place.key]
    if len(set(keys)) < len(keys):
        problems.append("executorch: two slots have one 'key'")
    ends = sorted(span for name, p in places.items() for span in _spans(p, slots[name]))
    if any(start < end for (_, end), (start, _) in pairwise(ends)):
        problems.append("executorch: the weights of two slots overlap in the file")
    return places


def _read_place(value: object, slot: Slot, file: FileRecord) -> ProgramSlot:
    where = f"executorch: slot {slot.name}"
    record = mapping(value, "place", where)
    require_keys(record, (f.name for f in fields(ProgramSlot)), where)
    dtype = text(member(record, "dtype", where), "dtype", where, get_args(ProgramDtype))
    key = member(record, "key", where)
    in_place = record.get("is_read_in_place", False)
    if type(in_place) is not bool or (key == "" and not in_place):
        raise BundleError(f"{where}: 'is_read_in_place' is {in_place!a:.60}, 'key' {key!a:.60}")
    if dtype == "I8" and (in_place or len(slot.shape) != 2):
        raise BundleError(f"{where}: is I8, but not a matrix that XNNPACK packs")
    scales = record.get("scales_offset")
    if (scales is not None) != (dtype == "I8"):
        raise BundleError(f"{where}: 'scales_offset' is {scales!a:.60} of {dtype} values")
    copy = record.get("packed_offset")
    if (copy is not None) != (key != "" and in_place):
        raise BundleError(
            f"{where}: 'packed_offset' is {copy!a:.60}, but only tied weights have it"
        )
    pair = record.get("lora_inputs")
    if pair is not None and len(texts(pair, "lora_inputs", where)) != 2:
        raise BundleError(f"{where}: 'lora_inputs' must be two names")
    place = ProgramSlot(
        offset=natural(member(record, "offset", where), "offset", where),
        key=_read_key(key, where),
        dtype=cast("ProgramDtype", dtype),
        scales_offset=None if scales is None else natural(scales, "scales_offset", where),
        is_read_in_place=in_place,
        packed_offset=None if copy is None else natural(copy, "packed_offset", where),
        lora_inputs=None if pair is None else (pair[0], pair[1]),
    )
    for start, end in _spans(place, slot):
        if end > file.size:
            raise BundleError(f"{where}: 'offset' {start} of its values is outside the file")
        if start % 4 and dtype == "F32":
            raise BundleError(f"{where}: 'offset' {start} is not a multiple of 4")
    return place


def _read_key(value: object, where: str) -> str:
    if value == "":
        return ""
    if isinstance(value, str) and len(value) == 128:
        return digest(value[:64], "key", where) + digest(value[64:], "key", where)
    return digest(value, "key", where)


def _spans(place: ProgramSlot, slot: Slot) -> list[tuple[int, int]]:
    """Return where a slot's values, and scales, start and end in the file."""
    size = math.prod(slot.shape) * ITEM_BYTES[place.dtype]
    spans = [(start, start + size) for start in place.offsets]
    if place.scales_offset is not None:
        spans.append((place.scales_offset, place.scales_offset + slot.shape[0] * 4))
    return spans


def _disagreements(
    order: tuple[str, ...],
    inputs: Iterable[TensorSpec],
    places: Mapping[str, ProgramSlot],
    weights: str,
) -> list[str]:
    """Return where the lists of inputs, and the dtypes, contradict each other."""
    problems = []
    required = [spec.name for spec in inputs]
    of_slots = [name for place in places.values() for name in place.lora_inputs or ()]
    if sorted(order) != sorted([*required, *of_slots]) or len(set(order)) < len(order):
        problems.append(
            "executorch: 'input_order' must name each of 'inputs' and of the slots' inputs once"
        )
    elif [name for name in order if name in set(required)] != required:
        problems.append("executorch: 'inputs' are in another order than in 'input_order'")
    if weights == "fp32" and any(place.dtype != "F32" for place in places.values()):
        problems.append("executorch: 'weights' is 'fp32', but slots have 'dtype' I8")
    return problems
