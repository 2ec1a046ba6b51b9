"""Slots: the named places of a base that adapters may change, and whether an adapter fits them."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from edge_lora.adapter import BaseIdentity
from edge_lora.errors import AdapterMismatchError, UnknownNameError, list_all

SlotKind = Literal["linear", "embedding", "conv", "other", "site"]
"""What reads a weight ("other": a norm, a bias); "site": no weight but a module's output."""


@dataclass(frozen=True)
class Slot:
    """One weight of the base, or one site.

    Attributes:
        name: The torch parameter's name, ``model.layers.0.self_attn.q_proj.weight``; of a site the
            module's, ``model.layers.0.mlp``, or ``from->module`` if the branch reads the input of
            another module.
        shape: (out_features, in_features, …) as ``torch.nn.Linear`` or ``ConvNd`` stores it, also
            for modules that store the transpose (GPT-2's Conv1D); of a site (d_out, d_in).
        dtype: safetensors dtype name.
        sha256: Hex digest of the weight's bytes in that shape, little-endian, row-major; "" for a
            site.
        kind: What reads the weight.
        aliases: Other names of the same tensor (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    kind: SlotKind = "linear"
    aliases: tuple[str, ...] = ()

    @property
    def slot_hash(self) -> str:
        """The short hash that an adapter records for this slot."""
        return self.sha256[:16]


class DeltaLike(Protocol):
    """What must be known of a delta to see whether it fits."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def slot_hash(self) -> str: ...  # noqa: D102
    @property
    def form_names(self) -> tuple[str, ...]: ...  # noqa: D102


class AdapterLike(Protocol):
    """An Adapter, or only the header of its file."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def base(self) -> BaseIdentity: ...  # noqa: D102
    @property
    def deltas(self) -> Mapping[str, DeltaLike]: ...  # noqa: D102


def fingerprint_of(slots: Iterable[Slot]) -> str:
    """Return the sha256 (hex) over name, dtype, shape and content hash of all slots, by name.

    Sites have no content; norms and biases are named by some exports and not by others, so neither
    counts.
    """
    digest = hashlib.sha256()
    for slot in sorted(_counted(slots), key=lambda s: s.name):
        digest.update(f"{slot.name}\0{slot.dtype}\0{list(slot.shape)}\0{slot.sha256}\n".encode())
    return digest.hexdigest()


def count_base_slots(slots: Iterable[Slot]) -> int:
    """Return how many of ``slots`` a fingerprint over them covers."""
    return len(_counted(slots))


def _counted(slots: Iterable[Slot]) -> list[Slot]:
    return [slot for slot in slots if slot.kind not in ("other", "site")]


class SlotTable(Mapping[str, Slot]):
    """All slots of a base, by name, in the order of the model.

    Iterating and ``len`` see the canonical names; looking up by an alias works too.
    """

    def __init__(self, slots: Iterable[Slot], base_id: str = "", fingerprint: str = "") -> None:
        """Hold ``slots``; ``fingerprint`` is of the base they were cut from (default: of these)."""
        self._slots = {slot.name: slot for slot in slots}
        self._canonical = {a: s.name for s in self._slots.values() for a in s.aliases}
        self.base_id = base_id
        self.fingerprint = fingerprint or fingerprint_of(self._slots.values())

    def __getitem__(self, name: str) -> Slot:
        """Return the slot of that name or alias."""
        return self._slots[self._canonical.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        """Iterate over canonical names."""
        return iter(self._slots)

    def __len__(self) -> int:
        """Return the number of distinct slots."""
        return len(self._slots)

    def check(self, adapter: AdapterLike) -> None:
        """Raise AdapterMismatchError that lists every reason why ``adapter`` does not fit."""
        problems = self.problems(adapter)
        if not problems:
            return
        advice = "List the slots with: edge-lora inspect BUNDLE --slots"
        if adapter.base.fingerprint not in ("", self.fingerprint):
            advice = (
                f"Trained on base {adapter.base.id or '?'} ({adapter.base.fingerprint[:12]}…), "
                f"this is {self.base_id or '?'} ({self.fingerprint[:12]}…). {advice}"
            )
        title = f"adapter {adapter.name!r} does not fit base {self.base_id!r}"
        raise AdapterMismatchError(f"{list_all(title, problems)}\n{advice}")

    def problems(self, adapter: AdapterLike) -> list[str]:
        """Return every reason why ``adapter`` does not fit this base; empty if it does.

        An unbound adapter names no base: its slots must exist with these shapes, and have these
        hashes where it says one. Without a hash it cannot be for a tensor that several modules
        share, because other trainers adapt one of these modules alone.
        """
        problems = []
        is_bound = adapter.base.fingerprint != ""
        if is_bound and adapter.base.fingerprint != self.fingerprint:
            problems.append("it was trained on another base (fingerprints differ)")
        seen: dict[str, str] = {}
        for name, delta in adapter.deltas.items():
            try:
                slot = self[name]
            except KeyError:
                is_site = "bottleneck" in delta.form_names
                hint = "; export the bundle with --sites" if is_site else self._hint(name)
                problems.append(f"{name}: no such {'site' if is_site else 'slot'}{hint}")
                continue
            if slot.name in seen:
                problems.append(f"{name}: is the same tensor as {seen[slot.name]}")
            seen[slot.name] = name
            if tuple(delta.shape) != slot.shape:
                problems.append(f"{name}: made for shape {delta.shape}, slot is {slot.shape}")
            if is_bound and delta.dtype != slot.dtype:
                problems.append(f"{name}: made for dtype {delta.dtype}, slot is {slot.dtype}")
            if not is_bound and not delta.slot_hash and slot.aliases:
                others = ", ".join(n for n in (slot.name, *slot.aliases) if n != name)
                problems.append(
                    f"{name}: shares its tensor with {others}, and an adapter that names no base "
                    "may be for one of them alone. Import it with base=, or untie them in the base"
                )
            if delta.slot_hash and delta.slot_hash != slot.slot_hash:
                problems.append(
                    f"{name}: trained on weight {delta.slot_hash}, slot is {slot.slot_hash}"
                )
            is_site = slot.kind == "site"
            if is_site != ("bottleneck" in delta.form_names):
                place, forms = "a site" if is_site else "a weight", "+".join(delta.form_names)
                problems.append(f"{name}: is {place}, which takes no {forms}")
        return problems

    def _hint(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._slots, n=1)
        return f" (close: {close[0]})" if close else ""


def match_names(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that match any pattern, in the order of ``names``.

    A pattern is a shell glob over the parameter name, with or without its ``.weight``:
    ``*.q_proj`` and ``*.q_proj.weight`` mean the same.

    Raises:
        UnknownNameError: If a pattern matches nothing; the message suggests close names.

    >>> match_names(["*.q"], ["a.q.weight", "a.k.weight"])
    ['a.q.weight']
    """
    matched: set[str] = set()
    problems = []
    for pattern in patterns:
        hits = [n for n in names if _matches(n, pattern)]
        if not hits:
            leaves = sorted({_module_of(n).rsplit(".", 1)[-1] for n in names})
            leaf = pattern.removesuffix(".weight").rsplit(".", 1)[-1]
            close = difflib.get_close_matches(leaf, leaves) or leaves[:8]
            counts = ", ".join(
                f"{c!r} ({sum(_module_of(n).endswith(c) for n in names)})" for c in close
            )
            problems.append(
                f"pattern {pattern!r} matches none of {len(names)} slots. Close: {counts}"
            )
        matched.update(hits)
    if problems:
        raise UnknownNameError(list_all("no slots found", problems))
    return [n for n in names if n in matched]


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether ``pattern`` matches any of ``names``, as in ``match_names``."""
    return any(_matches(name, pattern) for name in names)


def _module_of(name: str) -> str:
    return name.removesuffix(".weight")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(_module_of(name), pattern)
