"""``to_peft``: an adapter of low-rank or of sparse forms as a folder that PEFT loads.

| forms | type | what is written |
|---|---|---|
| one LowRank for each slot | LORA | scale as lora_alpha / rank, by pattern where slots differ |
| one adding Sparse for each slot | SHIRA | values times scale |

Coded values are decoded, nested ranks written whole. PEFT's SHIRA holds exactly rank * (out + in)
entries for each weight, with one rank for all: missing ones are filled up with zeros.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from re import escape
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save

from edge_lora.adapter import Adapter, Delta
from edge_lora.atomic import replacing
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import FORM_NAMES, LowRank, Sparse, to_array, to_fp32
from edge_lora.interop.base import BaseWeights, as_base
from edge_lora.interop.peft_folder import CONFIG_NAME, WEIGHTS_NAME, Tensors
from edge_lora.interop.peft_source import MODEL_PREFIX

T = TypeVar("T")
EMBEDDING_NAMES = (
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "embed_in",
)
"""What embeddings are usually called; a base knows better."""


def to_peft(
    adapter: Adapter, folder: str | Path, base: BaseWeights | str | Path | None = None
) -> Path:
    """Write a folder that ``PeftModel.from_pretrained(model, folder)`` loads.

    Args:
        adapter: Its strength (``alpha``) is written into the scales.
        folder: Made if need be; its two files are replaced.
        base: Tells embeddings from linear layers, which PEFT stores differently. Without it an
            embedding is known by its name (``embed_tokens``, ``wte`` …).

    Returns:
        The folder.

    Raises:
        UnsupportedError: If PEFT has no form for what a slot holds; lists every such slot.
    """
    kinds = {type(form) for delta in adapter.deltas.values() for form in delta.forms}
    kind: type[LowRank] | type[Sparse] = Sparse if kinds == {Sparse} else LowRank
    problems = []
    for name, delta in adapter.deltas.items():
        reason = _unwritable(name, delta, kind)
        if reason:
            problems.append(f"{name}: {reason}")
    if problems:
        title = (
            f"adapter {adapter.name!r} cannot be written for PEFT, which holds one low-rank form "
            "for each slot (LORA) or one adding sparse form (SHIRA)"
        )
        raise UnsupportedError(list_all(title, problems))
    weights = as_base(base)
    if kind is Sparse:
        tensors, config = _shira(adapter)
    else:
        tensors, config = _lora(adapter, lambda name: _is_embedding(name, weights))
    config |= {
        "base_model_name_or_path": adapter.base.id or None,
        "inference_mode": True,
        "target_modules": [_module_of(name) for name in adapter.deltas],
        "task_type": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    _replace(folder / WEIGHTS_NAME, save(contiguous, {"format": "pt"}))
    _replace(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode())
    return folder


def _unwritable(name: str, delta: Delta, kind: type) -> str:
    """Return why PEFT cannot hold a slot's forms; empty if it can."""
    if len(delta.forms) != 1:
        return f"{len(delta.forms)} forms ({', '.join(FORM_NAMES[type(f)] for f in delta.forms)})"
    form = delta.forms[0]
    if not name.endswith(".weight"):
        return f"form {FORM_NAMES[type(form)]!r}, not of a module's weight"
    if not isinstance(form, kind):
        return f"form {FORM_NAMES[type(form)]!r}, others are {FORM_NAMES[kind]!r}"
    if isinstance(form, Sparse) and form.mode == "set":
        return "replaces entries instead of adding to them"
    if isinstance(form, Sparse) and len(delta.shape) != 2:
        return "sparse in a convolution"
    return ""


def _lora(adapter: Adapter, is_embedding: Callable[[str], bool]) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, delta in adapter.deltas.items():
        (form,) = delta.forms
        assert isinstance(form, LowRank)
        module = _module_of(name)
        a, b = to_array(form.a), to_array(form.bt).T
        ranks[module] = form.rank
        alphas[module] = _whole(adapter.alpha * form.scale * form.rank)
        if is_embedding(name):  # the table is (rows, dim): what multiplies it swaps places
            tensors[f"{MODEL_PREFIX}{module}.lora_embedding_A"] = b.T
            tensors[f"{MODEL_PREFIX}{module}.lora_embedding_B"] = a.T
            continue
        kernel = delta.shape[2:]
        a = a.reshape(form.rank, delta.shape[1], *kernel)
        b = b.reshape(*b.shape, *[1] * len(kernel))
        tensors[f"{MODEL_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{MODEL_PREFIX}{module}.lora_B.weight"] = b
    rank, alpha = _most_common(ranks), _most_common(alphas)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": {f"^{escape(m)}": r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{escape(m)}": x for m, x in alphas.items() if x != alpha},
    }
    return tensors, config


def _shira(adapter: Adapter) -> tuple[Tensors, dict[str, Any]]:
    counts = {name: _entries(delta) for name, delta in adapter.deltas.items()}
    rank = max(1, *(-(-n // sum(adapter.deltas[name].shape)) for name, n in counts.items()))
    problems = [
        f"{name}: {rank} * {' + '.join(map(str, delta.shape))} entries are more than it has; "
        f"at most rank {int(np.prod(delta.shape)) // sum(delta.shape)} fits"
        for name, delta in adapter.deltas.items()
        if rank * sum(delta.shape) > np.prod(delta.shape)
    ]
    if problems:
        title = f"PEFT's SHIRA holds rank * (out + in) entries, here with rank {rank} for all"
        raise UnsupportedError(list_all(title, problems))
    tensors: Tensors = {}
    for name, delta in adapter.deltas.items():
        (form,) = delta.forms
        assert isinstance(form, Sparse)
        total = rank * sum(delta.shape)
        free = np.setdiff1d(np.arange(total, dtype=np.uint32), form.indices)
        index = np.concatenate([form.indices, free[: total - form.indices.size]])
        values = np.zeros(total, np.float32)
        values[: form.indices.size] = to_fp32(form.values) * np.float32(adapter.alpha * form.scale)
        order = np.argsort(index)
        prefix = f"{MODEL_PREFIX}{_module_of(name)}"
        tensors[f"{prefix}.shira_weight"] = values[order]
        tensors[f"{prefix}.shira_indices"] = np.stack(
            np.divmod(index[order].astype(np.int32), np.int32(delta.shape[1]))
        )
    return tensors, {"peft_type": "SHIRA", "r": rank, "mask_type": "random"}


def _entries(delta: Delta) -> int:
    (form,) = delta.forms
    assert isinstance(form, Sparse)
    return int(form.indices.size)


def _is_embedding(name: str, base: BaseWeights | None) -> bool:
    if base is not None and name in base.slots:
        return base.slots[name].kind == "embedding"
    return _module_of(name).rpartition(".")[2] in EMBEDDING_NAMES


def _module_of(name: str) -> str:
    return name.removesuffix(".weight")


def _most_common(values: dict[str, T]) -> T:
    return Counter(values.values()).most_common(1)[0][0]


def _whole(number: float) -> float:
    """Return a number as an int where it is one: PEFT's configs show alphas so."""
    return int(number) if float(number).is_integer() else float(number)


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(data)
