"""Plan a causal language model whose KV cache lies inside the program, in memory of fixed size.

A run reads tokens and the position of the first of them, writes their keys and values into the
cache and attends to what is written so far, never to the rest of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edge_lora.errors import UnsupportedError
from edge_lora.export.attention import using_attention
from edge_lora.export.causal_lm import cache_shapes, language_config
from edge_lora.export.plan import Plan

DEFAULT_CACHE_LENGTH = 1024
_PREFILL, _STEPS = 7, 12  # of the parity check
_HIDDEN = -1e30  # added to the scores of positions that come later


class StaticCausalLanguageModel(torch.nn.Module):
    """A causal language model as a function of tokens and where they start."""

    def __init__(
        self, base: torch.nn.Module, shapes: Sequence[tuple[int, int]], length: int
    ) -> None:
        super().__init__()
        self.base = base
        self.length = length
        self.layers = len(shapes)
        for layer, (heads, size) in enumerate(shapes):
            for part in ("key", "value"):
                self.register_buffer(f"{part}_{layer}", torch.zeros(heads, length, size))

    def forward(self, input_ids: Tensor, start: Tensor) -> Tensor:
        """Return logits (1, seq, vocab).

        Args:
            input_ids: (1, seq) int64.
            start: (1,) int64, position of the first of them; what lies before it was run earlier.
        """
        seq = input_ids.shape[1]
        first: Any = start.item()  # a symbol while tracing
        _require(first >= 0)
        _require(first + seq <= self.length)
        positions = start + torch.arange(seq)
        total = first + seq
        later = torch.arange(total)[None] > positions[:, None]
        cache = _Cache(
            [getattr(self, f"key_{i}") for i in range(self.layers)],
            [getattr(self, f"value_{i}") for i in range(self.layers)],
            positions,
            total,
        )
        output = self.base(
            input_ids=input_ids,
            attention_mask=torch.where(later, _HIDDEN, 0.0)[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits


def _require(condition: bool) -> None:
    """Tell the tracer what it may rely on."""
    torch._check(condition)  # type: ignore[no-untyped-call]


class _Cache:
    """What transformers' layers need of a cache, over buffers of fixed size."""

    is_compileable = False
    layers: tuple[Any, ...] = ()

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], positions: Tensor, total: int
    ) -> None:
        self.keys, self.values = keys, values  # per layer (kv_heads, length, head size)
        self.positions, self.total = positions, total
        self.is_sliding = [False] * len(keys)

    def update(
        self,
        key: Tensor,
        value: Tensor,
        layer: int,
        *_: Any,  # noqa: ANN401  (transformers passes what other caches use)
        **__: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Write (1, kv_heads, seq, size); return all that is written, (kv_heads, total, size)."""
        written = []
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            heads, _length, size = cache.shape
            rows = new.clone(memory_format=torch.contiguous_format).view(heads, -1, size)
            cache[:, self.positions] = rows
            written.append(cache[:, : self.total])
        return written[0], written[1]

    def get_seq_length(self, *_: Any) -> int:  # noqa: ANN401
        """Return how many positions were written before this run."""
        return self.total - int(self.positions.shape[0])


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **others: Any,  # noqa: ANN401  (transformers passes what other implementations use)
) -> tuple[Tensor, None]:
    """Return softmax(q kᵀ * scaling + mask) v; the heads that share a key are one product.

    Args:
        module: The attention layer; not used.
        query: (1, heads, seq, head size).
        key: (kv_heads, total, head size); ``heads`` is a multiple of ``kv_heads``.
        value: Like ``key``.
        attention_mask: Added to the scores, (1, 1, seq, total).
        scaling: Default: 1 / sqrt(head size).
        others: Refused if they change the result.

    Returns:
        (1, seq, heads, head size), and no attention weights.
    """
    if unknown := [name for name in ("softcap", "s_aux") if others.get(name) is not None]:
        raise UnsupportedError(f"{type(module).__name__} attends with {', '.join(unknown)}")
    _, heads, seq, size = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    scaled = query * (size**-0.5 if scaling is None else scaling)
    stacked = scaled.clone(memory_format=torch.contiguous_format).view(kv_heads, group * seq, size)
    scores = torch.bmm(stacked, key.transpose(1, 2)).view(kv_heads, group, seq, -1)
    weights = torch.softmax((scores + attention_mask).view(kv_heads, group * seq, -1), dim=-1)
    mixed = torch.bmm(weights, value).view(1, heads, seq, size).transpose(1, 2)
    return mixed.clone(memory_format=torch.contiguous_format), None


class _Reference(torch.nn.Module):
    """The same function by transformers' own growing cache: what the program is compared with."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base
        self.cache: Any = None

    def forward(self, input_ids: Tensor, start: Tensor) -> Tensor:
        """Return logits (1, seq, vocab); a start of 0 forgets what was run earlier."""
        from transformers import DynamicCache

        if int(start) == 0:
            self.cache = DynamicCache()
        positions = start + torch.arange(input_ids.shape[1])
        output = self.base(
            input_ids=input_ids,
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits


def plan_static_causal_lm(model: torch.nn.Module, cache_length: int | None) -> tuple[Plan, int]:
    """Plan the export of ``model``, in evaluation mode; returns the cache's length too.

    Args:
        model: A causal language model of transformers.
        cache_length: Default: the model's context, at most ``DEFAULT_CACHE_LENGTH``.

    Raises:
        UnsupportedError: If it is not a causal language model with a plain KV cache, or its cache
            cannot have this length.
    """
    shapes = cache_shapes(model)
    config = language_config(model, shapes)
    length = _length(model, config["context_length"], cache_length)
    vocabulary = config["vocab_size"]
    tokens = [i % vocabulary for i in (1, 5, 2, 7)]
    plan = Plan(
        task="causal-lm",
        module=StaticCausalLanguageModel(model, shapes, length).eval(),
        example={"input_ids": torch.tensor([tokens[:3]]), "start": torch.tensor([2])},
        dynamic_shapes={"input_ids": {1: "seq"}, "start": {}},
        input_names=("input_ids", "start"),
        output_names=("logits",),
        weight_prefix="base.",
        cases=_cases(vocabulary),
        config={
            **config,
            "canary": {
                "input_ids": {"values": tokens, "shape": [1, len(tokens)]},
                "start": {"values": [0], "shape": [1]},
            },
        },
        while_tracing=partial(using_attention, model, "edge_lora_static", attend),
        state=tuple(f"{part}_{i}" for i in range(len(shapes)) for part in ("key", "value")),
        reference=_Reference(model).eval(),
    )
    return plan, length


def _length(model: torch.nn.Module, context: int | None, asked: int | None) -> int:
    config: Any = model.config
    limits = {
        "the model's context": context,
        "its attention window": getattr(config.get_text_config(), "sliding_window", None),
    }
    known = {name: limit for name, limit in limits.items() if limit}
    length = min([DEFAULT_CACHE_LENGTH, *known.values()]) if asked is None else asked
    least = _PREFILL + _STEPS
    problems = [f"{name} is {limit}" for name, limit in known.items() if length > limit]
    if length < least:
        problems.append(f"it must hold {least} tokens at least")
    if problems:
        raise UnsupportedError(f"cache_length={length} is not possible: {'; '.join(problems)}")
    return length


def _cases(vocabulary: int) -> tuple[dict[str, Tensor], ...]:
    """Return a prompt and one token after another, then a prompt anew over what was written."""
    generator = torch.Generator().manual_seed(0)

    def case(start: int, seq: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, vocabulary, (1, seq), generator=generator)
        return {"input_ids": tokens, "start": torch.tensor([start])}

    steps = [case(_PREFILL + step, 1) for step in range(_STEPS)]
    return (case(0, _PREFILL), *steps, case(0, 3), case(3, 4))
