"""An adapter: named deltas for the slots of one base, and where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_lora.codebook import Coded
from edge_lora.errors import ShapeError, list_all
from edge_lora.forms import FORM_NAMES, Bottleneck, Form, form_nbytes, is_replacing, problems_of

AUTO = "auto"
"""Not the name of an adapter: ``session.set_adapter("auto")`` picks by the input of each run."""


@dataclass(frozen=True)
class BaseIdentity:
    """Which base an adapter belongs to.

    Attributes:
        fingerprint: sha256 (hex) over the slot weights of the base, see ``edge_lora.slots``.
        id: Readable name, for messages only.
    """

    fingerprint: str
    id: str = ""


@dataclass(frozen=True, eq=False)
class Delta:
    """The ordered forms that one adapter has for one slot; they add up.

    Attributes:
        shape: Shape of the slot's weight in the base; (d_out, d_in) of a site.
        dtype: safetensors dtype name of that weight ("F32", …).
        forms: At least one.
        slot_hash: First 16 hex digits of the sha256 of the base weight's bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    forms: tuple[Form, ...]
    slot_hash: str = ""

    @property
    def form_names(self) -> tuple[str, ...]:
        """What each form is called in a file."""
        return tuple(FORM_NAMES[type(form)] for form in self.forms)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Named deltas plus metadata; what one file holds.

    Attributes:
        name: Readable name.
        method: The training method that made it, for people; nothing depends on it.
        base: The base that it was trained on.
        deltas: Slot name -> delta.
        alpha: Strength, multiplies every form's scale; 1 is as trained, 0 is the base.
        provenance: Seed, versions, command: JSON values.
        extra: Unknown optional header keys, kept as they were found.
    """

    name: str
    method: str
    base: BaseIdentity
    deltas: Mapping[str, Delta]
    alpha: float = 1.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse forms that do not fit their slots, all at once."""
        problems = [] if np.isfinite(self.alpha) else [f"alpha is {self.alpha!r}, must be finite"]
        if not self.deltas:
            problems.append("no slots: an adapter changes at least one")
        for slot, delta in self.deltas.items():
            if not delta.forms:
                problems.append(f"{slot}: no forms")
            for i, form in enumerate(delta.forms):
                problems += [f"{slot}: form {i}: {p}" for p in problems_of(form, delta.shape)]
            if len(delta.forms) > 1 and any(map(is_replacing, delta.forms)):
                problems.append(f"{slot}: a form with mode 'set' must stand alone")
            if len({isinstance(form, Bottleneck) for form in delta.forms}) > 1:
                problems.append(f"{slot}: a bottleneck stands at a site, other forms at a weight")
        if problems:
            raise ShapeError(list_all(f"adapter {self.name!r} is not sound", problems))

    def scaled(self, factor: float) -> Adapter:
        """Return the same adapter at ``factor`` times its strength."""
        return replace(self, alpha=self.alpha * factor)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in memory."""
        return sum(form_nbytes(form) for delta in self.deltas.values() for form in delta.forms)

    @property
    def content_hash(self) -> str:
        """sha256 (hex) of what the adapter does; its name and provenance do not count."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.base.fingerprint, self.alpha]).encode())
        for slot in sorted(self.deltas):
            delta = self.deltas[slot]
            digest.update(json.dumps([slot, list(delta.shape), delta.dtype]).encode())
            for form in delta.forms:
                digest.update(type(form).__name__.encode())
                _hash_fields(digest, vars(form))
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; see ``edge_lora.adapter_file``."""
        from edge_lora.adapter_file import write_adapter

        return write_adapter(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read and check one file; raises AdapterFileError with everything that is wrong."""
        from edge_lora.adapter_file import read_adapter

        return read_adapter(Path(path))


def _hash_fields(digest: hashlib._Hash, fields: Mapping[str, object]) -> None:
    for key, value in sorted(fields.items()):
        if isinstance(value, np.ndarray):
            digest.update(f"{key}{value.dtype.name}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).view(np.uint8).data)
        elif isinstance(value, Coded):
            digest.update(key.encode())
            _hash_fields(digest, vars(value))
        else:
            digest.update(f"{key}={value!r}".encode())
