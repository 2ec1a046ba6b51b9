"""``from_peft``: an adapter of the PEFT library as one of ours, exactly or not at all.

A type is one converter: it takes the tensors of a module and returns forms. What PEFT itself
would merge into the base's weights is the definition; PEFT and torch are not needed to read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.errors import AdapterFileError, EdgeLoraError, list_all
from edge_lora.interop.base import BaseWeights, as_base
from edge_lora.interop.binding import bound_to
from edge_lora.interop.peft_config import parse_config
from edge_lora.interop.peft_extra import extras
from edge_lora.interop.peft_folder import read_config, read_tensors
from edge_lora.interop.peft_low_rank import ADALORA_PARTS, LORA_PARTS, adalora, lora
from edge_lora.interop.peft_products import LOHA_PARTS, LOKR_PARTS, loha, lokr
from edge_lora.interop.peft_shared import (
    RANDLORA_PARTS,
    UNILORA_PARTS,
    VERA_PARTS,
    randlora,
    unilora,
    vera,
)
from edge_lora.interop.peft_source import Lowered, Source, sort_tensors, tied_problem
from edge_lora.interop.peft_sparse import (
    IA3_PARTS,
    SHIRA_PARTS,
    TOKEN_PARTS,
    ia3,
    shira,
    trainable_tokens,
)


@dataclass(frozen=True)
class PeftType:
    """How one type is read.

    Attributes:
        parts: What its tensors are called, after the module's name.
        convert: Returns the forms of all modules.
    """

    parts: tuple[str, ...]
    convert: Callable[[Source], list[Lowered]]


TYPES: dict[str, PeftType] = {
    "ADALORA": PeftType(ADALORA_PARTS, adalora),
    "IA3": PeftType(IA3_PARTS, ia3),
    "LOHA": PeftType(LOHA_PARTS, loha),
    "LOKR": PeftType(LOKR_PARTS, lokr),
    "LORA": PeftType(LORA_PARTS, lora),
    "RANDLORA": PeftType(RANDLORA_PARTS, randlora),
    "SHIRA": PeftType(SHIRA_PARTS, shira),
    "TRAINABLE_TOKENS": PeftType(TOKEN_PARTS, trainable_tokens),
    "UNILORA": PeftType(UNILORA_PARTS, unilora),
    "VERA": PeftType(VERA_PARTS, vera),
}
"""``peft_type`` -> how it is read."""


def from_peft(
    folder: str | Path, base: BaseWeights | str | Path | None = None, name: str | None = None
) -> Adapter:
    """Read a folder that PEFT's ``save_pretrained`` wrote.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: A bundle's folder or ``edge_lora.methods.model_base.ModelBase(model)``. The adapter
            is checked against it and bound to it. Without one it is unbound: it will fit any base
            that has its slots. Types whose files do not say the layers' shapes, and DoRA, need it.
        name: Of the adapter; by default the folder's.

    Returns:
        The adapter, with the dtypes of the file where its tensors are used as they are.

    Raises:
        AdapterFileError: If the folder is damaged; lists everything that is wrong.
        UnsupportedError: If it cannot be imported exactly, with the reason and what to do.
        UnknownNameError: If its type is unknown; lists the known ones.
        ShapeError: If two of its parts exclude each other at one slot.
        BundleError: If ``base`` is a folder but no sound bundle.
    """
    folder = Path(folder)
    raw = read_config(folder)
    weights = as_base(base)
    try:
        config = parse_config(raw, tuple(TYPES))
        kind = TYPES[config.type]
        source = sort_tensors(config, weights, read_tensors(folder), kind.parts)
        lowered = [*kind.convert(source), *extras(source)]
    except EdgeLoraError as error:
        if str(folder) in str(error):
            raise
        raise type(error)(f"PEFT adapter '{folder}': {error}") from error
    source.problems += [f"{name}: belongs to nothing" for name in source.shared]
    deltas = _by_slot(source, lowered)
    if not deltas and not source.problems:
        source.problems.append("it adapts nothing")
    if source.problems:
        raise AdapterFileError(
            list_all(f"PEFT adapter '{folder}' cannot be imported", source.problems)
        )
    adapter = Adapter(
        name=name or folder.resolve().name,
        method=config.type.lower(),
        base=BaseIdentity("", str(raw.get("base_model_name_or_path") or "")),
        deltas=deltas,
        provenance={
            "imported_from": "PEFT",
            "peft_type": config.type,
            "peft_version": str(raw.get("peft_version", "")),
        },
    )
    return adapter if weights is None else bound_to(adapter, weights.slots)


def _by_slot(source: Source, lowered: list[Lowered]) -> dict[str, Delta]:
    """Return the deltas by slot; note every form that does not fit its slot."""
    by_slot: dict[str, list[Lowered]] = {}
    for item in lowered:
        try:
            name = item.name if source.base is None else source.slot(item.name).name
        except EdgeLoraError as error:
            source.problems.append(f"{item.name}: {error}")
            continue
        by_slot.setdefault(name, []).append(item)
    return {name: _delta(source, name, items) for name, items in by_slot.items()}


def _delta(source: Source, name: str, items: list[Lowered]) -> Delta:
    shape = items[0].shape
    if source.base is not None:
        slot = source.slot(name)
        shape = slot.shape
        names = {item.name for item in items}
        is_tied = names == {name, *slot.aliases} and all(_same(items[0], x) for x in items[1:])
        if slot.aliases and is_tied:
            items = items[:1]
        elif slot.aliases and not items[0].is_shared:
            source.problems.append(tied_problem(items[0].name, slot))
    source.problems += [
        f"{item.name}: made for {item.shape}, slot is {shape}"
        for item in items
        if item.shape != shape
    ]
    forms = tuple(form for item in items for form in item.forms)
    return Delta(shape, "F32", forms)


def _same(item: Lowered, other: Lowered) -> bool:
    """Whether two modules that share a tensor change it by the same forms."""
    if [type(form) for form in item.forms] != [type(form) for form in other.forms]:
        return False
    return all(
        np.array_equal(mine, theirs)
        for a, b in zip(item.forms, other.forms, strict=True)
        for mine, theirs in zip(vars(a).values(), vars(b).values(), strict=True)
    )
