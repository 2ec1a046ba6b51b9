"""Attention as the traced graph computes it: heads that share a key are one matrix product.

transformers repeats every key and value for the query heads that share it, which copies the whole
cache in every layer at every token. Here the queries of one group are stacked instead; the result
is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch


def grouped_attention(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Let a transformers model use ``attend`` inside the block; its own attention afterwards."""
    return using_attention(model, "edge_lora_grouped", attend)


@contextlib.contextmanager
def using_attention(
    model: torch.nn.Module, name: str, implementation: Callable[..., Any]
) -> Iterator[None]:
    """Let a transformers model attend by ``implementation`` inside the block."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(name, implementation)
    AttentionMaskInterface.register(name, eager_mask)
    config: Any = model.config
    switch: Any = model.set_attn_implementation
    before = config._attn_implementation
    switch(name)
    try:
        yield
    finally:
        switch(before)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,  # noqa: ANN401  (transformers passes what other implementations use)
) -> tuple[torch.Tensor, None]:
    """Return softmax(q kᵀ * scaling + mask) v.

    Args:
        module: The attention layer; not used.
        query: (batch, heads, seq, head size).
        key: (batch, kv_heads, total, head size); ``heads`` is a multiple of ``kv_heads``.
        value: Like ``key``.
        attention_mask: Added to the scores, (batch, 1, seq, total); None hides nothing.
        scaling: Default: 1 / sqrt(head size).

    Returns:
        (batch, seq, heads, head size), and no attention weights.
    """
    del module
    batch, heads, seq, size = query.shape
    kv_heads = key.shape[1]
    grouped = heads // kv_heads * seq
    scale = size**-0.5 if scaling is None else scaling
    stacked = (query * scale).reshape(batch, kv_heads, grouped, size)
    scores = stacked @ key.transpose(2, 3)  # (batch, kv_heads, group * seq, total)
    if attention_mask is not None:
        scores = scores.reshape(batch, heads, seq, -1) + attention_mask
    weights = torch.softmax(scores, dim=-1).reshape(batch, kv_heads, grouped, -1)
    mixed = (weights @ value).reshape(batch, heads, seq, size)
    return mixed.transpose(1, 2), None
