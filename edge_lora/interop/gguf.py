"""LoRA adapters as GGUF files, as llama.cpp loads them.

Metadata: ``general.type`` "adapter", ``general.architecture`` as the base's, ``adapter.type``
"lora", ``adapter.lora.alpha``. Tensors of a weight, in NumPy's order of axes:

| weight | ``<weight>.lora_a`` | ``<weight>.lora_b`` |
|---|---|---|
| of a linear layer | A (rank, in) | B (out, rank) |
| ``token_embd.weight`` | B (vocabulary, rank) | A.T (width, rank) |

* llama.cpp multiplies each pair by alpha / its rank (by 1 if alpha is 0). There is one alpha for
  all: the first slot's scale * rank. What another slot needs beside it is folded into its B. So
  rsLoRA's scales, and any other, come out right.
* A Llama's query and key rows are reordered: llama.cpp rotates neighbouring pairs of a head,
  transformers pairs half a head apart. So the width of a head must be known. Other architectures
  are rotated alike in both.
* The head of a base whose output is tied to its embedding cannot be adapted: llama.cpp would find
  one pair for both, of which one has the wrong shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BundleError,
    EdgeLoraError,
    UnsupportedError,
    list_all,
)
from edge_lora.forms import (
    FORM_NAMES,
    Block,
    Bottleneck,
    Dense,
    LowRank,
    RowScale,
    Sparse,
    to_fp32,
)
from edge_lora.interop.gguf_file import GgufFile, open_gguf, write_gguf
from edge_lora.interop.gguf_names import (
    ARCHITECTURES,
    EMBEDDING,
    WHOLE,
    GgufBase,
    gguf_base,
    gguf_name,
    is_rotated,
    rotated_order,
    slot_name,
)

Array = NDArray[Any]


def to_gguf(adapter: Adapter, path: str | Path, base: GgufBase) -> Path:
    """Write ``adapter`` for llama.cpp.

    Factors stay fp16 where nothing has to be folded into them; all others are written in fp32.

    Args:
        adapter: Low-rank forms only, several of a slot are joined.
        path: File to write, atomically.
        base: See ``gguf_names.gguf_base``.

    Raises:
        UnsupportedError: If a slot has another form or is unknown to llama.cpp; lists every one.
    """
    problems: list[str] = []
    pairs: dict[str, tuple[Array, Array, float]] = {}
    for slot, delta in adapter.deltas.items():
        reasons = _reasons(slot, delta, base)
        problems += [f"{slot}: {reason}" for reason in reasons]
        if not reasons:
            a, b, scale = _joined([f for f in delta.forms if isinstance(f, LowRank)])
            pairs[slot] = a, b, scale * adapter.alpha
    if problems:
        advice = _advice({type(f) for delta in adapter.deltas.values() for f in delta.forms})
        title = f"adapter {adapter.name!r} cannot be written as GGUF"
        raise UnsupportedError("\n".join([list_all(title, problems), *advice]))
    first_a, _, first_scale = next(iter(pairs.values()))
    alpha = _common_alpha(len(first_a), first_scale)
    tensors: dict[str, Array] = {}
    for slot, (a, b, scale) in pairs.items():
        name = gguf_name(slot)
        assert name is not None
        factor = scale * len(a) / alpha
        if abs(factor - 1) > 1e-7:  # what an fp32 alpha leaves is no reason to touch B
            b = _folded(b, factor, slot)
        if is_rotated(name, base.architecture):
            b = b[rotated_order(len(b), base.head_dim)]
        pair = (b, np.ascontiguousarray(a.T)) if slot == EMBEDDING else (a, b)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = map(_storable, pair)
    metadata: dict[str, str | int | float] = {
        "general.type": "adapter",
        "general.architecture": base.architecture,
        "general.name": adapter.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    return write_gguf(Path(path), metadata, tensors)


def from_gguf(
    path: str | Path,
    base: str | Path | None = None,
    head_dim: int | None = None,
    name: str | None = None,
) -> Adapter:
    """Read a LoRA adapter made for llama.cpp.

    Args:
        path: The file.
        base: A bundle's folder: the adapter is checked against it and bound to it. Without one it
            fits any base with these slots.
        head_dim: Width of an attention head, where there is no ``base`` to ask.
        name: Of the adapter; default: the file's ``general.name``, or the file's own name.

    Raises:
        AdapterFileError: If the file is damaged, no LoRA adapter, or of an architecture that is
            not known; lists everything that is wrong.
        AdapterMismatchError: If it does not fit ``base``, or is of another architecture.
        BundleError: If ``base`` is no sound bundle.
        UnsupportedError: If query or key weights are in it, and the width of a head is not known.
    """
    path = Path(path)
    file = open_gguf(path)
    try:
        architecture = _require_lora(file)
        if base is not None:
            head_dim = _require_same(architecture, base).head_dim
        deltas = _read_deltas(file, architecture, head_dim)
        found = file.metadata.get("general.name")
        name = name or (found if isinstance(found, str) and found else path.stem)
        adapter = Adapter(name, "lora", BaseIdentity(""), deltas, provenance={"imported": "gguf"})
    except (UnsupportedError, AdapterMismatchError, BundleError) as error:
        raise type(error)(f"GGUF file '{path}': {error}") from error
    except EdgeLoraError as error:
        raise AdapterFileError(f"GGUF file '{path}': {error}") from error
    if base is None:
        return adapter
    from edge_lora.interop.base import BundleBase
    from edge_lora.interop.binding import bind

    return bind(adapter, BundleBase(base).slots)


def _advice(kinds: set[type]) -> list[str]:
    """Return what to do about forms of ``kinds`` that are not low-rank."""
    advice = []
    if kinds & {Sparse, Block, Dense}:
        advice += ["Forms that add a matrix become low-rank with: edge-lora convert … --rank R"]
    if kinds & {RowScale, Bottleneck}:
        advice += ["llama.cpp has no place for row scales (DoRA, IA3) and bottlenecks: train LoRA"]
    return advice


def _reasons(slot: str, delta: Delta, base: GgufBase) -> list[str]:
    """Return why a slot's delta cannot be written; empty if it can."""
    kinds = {FORM_NAMES[type(f)] for f in delta.forms if not isinstance(f, LowRank)}
    reasons = [f"form {' + '.join(sorted(kinds))} is not low-rank"] if kinds else []
    name = gguf_name(slot)
    if name is None:
        reasons.append("llama.cpp adapts no such weight")
    elif slot in WHOLE and base.is_tied:
        reasons.append("llama.cpp cannot adapt an embedding that is also the output head")
    elif is_rotated(name, base.architecture) and delta.shape[0] % base.head_dim:
        reasons.append(f"{delta.shape[0]} rows are not whole heads of {base.head_dim}")
    return reasons


def _joined(forms: list[LowRank]) -> tuple[Array, Array, float]:
    """Return A (rank, in), B (out, rank) and the scale of all low-rank forms of a slot."""
    if len(forms) == 1:
        (form,) = forms
        a, bt = (v if isinstance(v, np.ndarray) else v.decode() for v in (form.a, form.bt))
        return a, bt.T, form.scale
    a = np.concatenate([to_fp32(form.a) for form in forms])
    bt = np.concatenate([to_fp32(form.bt) * np.float32(form.scale) for form in forms])
    return a, bt.T, 1.0


def _common_alpha(rank: int, scale: float) -> float:
    """Return scale * rank in fp32; where that is no usable number, the rank: then scale is 1."""
    alpha = scale * rank
    return float(np.float32(alpha)) if 1e-30 < abs(alpha) < 1e30 else float(rank)


def _folded(b: Array, factor: float, slot: str) -> Array:
    with np.errstate(over="ignore"):
        folded = b.astype(np.float32) * np.float32(factor)
    if not np.isfinite(folded).all():
        raise UnsupportedError(f"{slot}: its scale times B is beyond fp32")
    return folded


def _storable(array: Array) -> Array:
    return array if array.dtype == np.float16 else array.astype(np.float32)


def _require_lora(file: GgufFile) -> str:
    """Return the architecture of a LoRA adapter; raise if the file is something else."""
    wanted: Mapping[str, str] = {"general.type": "adapter", "adapter.type": "lora"}
    problems = [
        f"{key} is {file.metadata.get(key)!r}, must be {value!r}"
        for key, value in wanted.items()
        if file.metadata.get(key) != value
    ]
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        problems.append(
            f"architecture {architecture!r} is not known; known: {', '.join(ARCHITECTURES)}"
        )
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) is not float or not np.isfinite(alpha):
        problems.append(f"adapter.lora.alpha is {alpha!r}, must be a finite number")
    if problems:
        raise AdapterFileError(list_all("no LoRA adapter that can be read", problems))
    return str(architecture)


def _require_same(architecture: str, bundle: str | Path) -> GgufBase:
    """Return what a bundle says; raise AdapterMismatchError if it is of another architecture."""
    base = gguf_base(bundle)
    if base.architecture != architecture:
        raise AdapterMismatchError(
            f"made for architecture {architecture!r}, bundle '{bundle}' is {base.architecture!r}"
        )
    return base


def _read_deltas(file: GgufFile, architecture: str, head_dim: int | None) -> dict[str, Delta]:
    alpha = float(file.metadata.get("adapter.lora.alpha", 0.0))
    deltas: dict[str, Delta] = {}
    halves = [re.fullmatch(r"(.+)\.lora_[ab]", name) for name in file.tensors]
    problems = [
        f"tensor {name!r} is no half of a low-rank pair"
        for name, half in zip(file.tensors, halves, strict=True)
        if half is None
    ]
    for weight in dict.fromkeys(half[1] for half in halves if half):
        try:
            slot, a, b = _read_pair(file, weight)
        except EdgeLoraError as error:
            problems.append(str(error))
            continue
        if is_rotated(weight, architecture):
            b = _unrotated(b, weight, head_dim)
        scale = alpha / len(a) if alpha else 1.0
        form = LowRank(a, np.ascontiguousarray(b.T), scale)
        deltas[slot] = Delta((b.shape[0], a.shape[1]), "F32", (form,))
    if problems:
        raise AdapterFileError(list_all("damaged", problems))
    return deltas


def _read_pair(file: GgufFile, weight: str) -> tuple[str, Array, Array]:
    """Return slot, A (rank, in) and B (out, rank)."""
    names = f"{weight}.lora_a", f"{weight}.lora_b"
    for name in names:
        if name not in file.tensors:
            raise AdapterFileError(f"tensor {name!r} is missing")
    slot = slot_name(weight)
    if slot is None:
        raise AdapterFileError(f"tensor {weight!r} is of no weight that is known")
    a, b = map(file.read, names)
    if slot == EMBEDDING and a.ndim == b.ndim == 2:
        a, b = np.ascontiguousarray(b.T), a
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise AdapterFileError(f"{weight}: lora_a {a.shape} and lora_b {b.shape} do not pair up")
    return slot, a, b


def _unrotated(b: Array, weight: str, head_dim: int | None) -> Array:
    if head_dim is None:
        raise UnsupportedError(
            f"{weight}: the order of its rows depends on the width of a head; give the base"
        )
    if len(b) % head_dim:
        raise AdapterFileError(f"{weight}: {len(b)} rows are not whole heads of {head_dim}")
    order = rotated_order(len(b), head_dim)
    plain = np.empty_like(b)
    plain[order] = b
    return plain
