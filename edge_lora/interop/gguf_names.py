"""What a base's weights are called in GGUF, and in which order llama.cpp keeps their rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import read_manifest
from edge_lora.errors import UnsupportedError, unknown_name

_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of a layer's modules, ours -> GGUF's, the same in all architectures here."""
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": ("attn_q", "attn_k"),
    "qwen2": (),
    "qwen3": (),
    "gemma": (),
    "gemma3": (),
}
"""GGUF's name of an architecture -> the modules whose rows are reordered."""
MODEL_TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma3_text": "gemma3",
}
"""transformers' name of an architecture -> GGUF's."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WHOLE = {EMBEDDING: "token_embd.weight", HEAD: "output.weight"}


@dataclass(frozen=True)
class GgufBase:
    """What must be known of a base to name and order its weights as llama.cpp does.

    Attributes:
        head_dim: Width of an attention head.
        architecture: GGUF's name of it, one of ``ARCHITECTURES``.
        is_tied: Whether the output head is the embedding's weight.
    """

    head_dim: int
    architecture: str = "llama"
    is_tied: bool = False

    def __post_init__(self) -> None:
        """Refuse an architecture that is not known."""
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedError(
                unknown_name("architecture", self.architecture, [*ARCHITECTURES])
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise UnsupportedError(f"heads of width {self.head_dim}, must be even")


def gguf_base(bundle: str | Path) -> GgufBase:
    """Return what a bundle says.

    Raises:
        UnsupportedError: If it is not of an architecture that is known, or does not say so.
    """
    manifest = read_manifest(bundle)
    model_type, head_dim = (manifest.config.get(key) for key in ("model_type", "head_dim"))
    if model_type is None or head_dim is None:
        raise UnsupportedError(
            f"bundle '{bundle}' does not say which architecture its base has, so its weights "
            f"cannot be named as in GGUF (known: {', '.join(MODEL_TYPES)}). Export it again with "
            "this release"
        )
    architecture = MODEL_TYPES.get(str(model_type))
    if architecture is None:
        raise UnsupportedError(
            f"bundle '{bundle}': {unknown_name('architecture', str(model_type), [*MODEL_TYPES])}"
        )
    is_tied = any({EMBEDDING, HEAD} <= {s.name, *s.aliases} for s in manifest.slots.values())
    return GgufBase(int(head_dim), architecture, is_tied)


def gguf_name(slot: str) -> str | None:
    """Return GGUF's name of a slot, or None if llama.cpp has no such weight.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    if slot in WHOLE:
        return WHOLE[slot]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", slot)
    module = _MODULES.get(match[2]) if match else None
    return f"blk.{match[1]}.{module}.weight" if match and module else None


def slot_name(tensor: str) -> str | None:
    """Return the slot that GGUF calls ``tensor``, or None.

    >>> slot_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    whole = {theirs: ours for ours, theirs in WHOLE.items()}
    if tensor in whole:
        return whole[tensor]
    modules = {theirs: ours for ours, theirs in _MODULES.items()}
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", tensor)
    module = modules.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{module}.weight" if match and module else None


def rotated_order(rows: int, head_dim: int) -> NDArray[np.intp]:
    """Return where each of llama.cpp's query or key rows is in transformers' order.

    >>> rotated_order(8, 4)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def is_rotated(name: str, architecture: str) -> bool:
    """Whether the rows of GGUF's weight ``name`` are in another order than transformers'."""
    return name.split(".")[-2] in ARCHITECTURES[architecture]
