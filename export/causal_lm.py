"""Plan the export of a causal language model: its KV cache becomes inputs and outputs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from edge_lora.errors import UnsupportedError
from edge_lora.export.attention import grouped_attention
from edge_lora.export.plan import Plan, run_module

logger = logging.getLogger(__name__)

_AGREES = 1e-3  # relative; reordered fp32 sums differ by 1e-5, a missing feature by 1e-1

# Per layer: key and value, (batch, heads, past, head size).
Past = list[tuple[torch.Tensor, torch.Tensor]]


class CausalLanguageModel(torch.nn.Module):
    """A causal language model as a function of tokens and its KV cache."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Past,
    ) -> tuple[torch.Tensor, Past]:
        """Return logits (batch, seq, vocab) and the cache with the new tokens appended.

        Args:
            input_ids: (batch, seq) int64.
            attention_mask: (batch, past + seq) int64; 0 hides a position.
            position_ids: (batch, seq) int64.
            past: Keys and values so far; a length of 0 is an empty cache.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        output = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


def is_causal_lm(model: torch.nn.Module) -> bool:
    """Whether ``model`` looks like a causal language model of transformers."""
    return hasattr(model, "config") and hasattr(model, "generate")


def plan_causal_lm(model: torch.nn.Module) -> Plan:
    """Plan the export of ``model``, in evaluation mode.

    Raises:
        UnsupportedError: If it is not a causal language model with a plain KV cache.
    """
    shapes = cache_shapes(model)
    layers = len(shapes)
    axes = {0: "batch", 2: "past"}
    past_names = tuple(f"past.{i}.{part}" for i in range(layers) for part in ("key", "value"))
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = [i % vocabulary for i in (1, 5, 2, 7)]
    plan = Plan(
        task="causal-lm",
        module=CausalLanguageModel(model).eval(),
        example=_case(shapes, vocabulary, batch=2, seq=3, past=5),
        dynamic_shapes={
            "input_ids": {0: "batch", 1: "seq"},
            "attention_mask": {0: "batch", 1: "total"},
            "position_ids": {0: "batch", 1: "seq"},
            "past": [(axes, axes)] * layers,
        },
        input_names=("input_ids", "attention_mask", "position_ids", *past_names),
        output_names=("logits", *(name.replace("past", "present", 1) for name in past_names)),
        weight_prefix="base.",
        cases=tuple(
            _case(shapes, vocabulary, batch, seq, past)
            for batch, seq, past in ((1, 1, 0), (2, 5, 0), (1, 1, 7), (2, 5, 7))
        ),
        config={
            **language_config(model, shapes),
            "canary": _canary(tokens, past_names, shapes),
        },
    )
    grouped = partial(grouped_attention, model)
    return replace(plan, while_tracing=grouped) if _agrees(plan, grouped) else plan


def language_config(model: torch.nn.Module, shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Return what the runtime must know of a language model.

    Args:
        model: The model.
        shapes: (heads, head size) of every layer's cache.
    """
    config: Any = model.config
    text_config = config.get_text_config()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return {
        "model_type": getattr(text_config, "model_type", None),
        "num_layers": len(shapes),
        "kv_heads": shapes[0][0],
        "head_dim": shapes[0][1],
        "vocab_size": head.weight.shape[0],
        "context_length": getattr(text_config, "max_position_embeddings", None),
        "bos_token_id": text_config.bos_token_id,
        "eos_token_ids": _eos_ids(model),
    }


def _agrees(plan: Plan, context: Callable[[], AbstractContextManager[None]]) -> bool:
    """Whether the model computes the same inside ``context``: it may lack what its layers need."""
    expected = run_module(plan, plan.example)["logits"]
    try:
        with context():
            found = run_module(plan, plan.example)["logits"]
    except Exception as error:
        logger.info("traced with the model's own attention: %s", error)
        return False
    return bool((found - expected).abs().max() <= _AGREES * expected.abs().max())


def cache_shapes(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Return (heads, head size) of every layer's cache, by running two tokens."""
    from transformers import DynamicCache

    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError(
            f"{type(model).__name__} takes no position_ids, which the exported graph needs"
        )
    cache = DynamicCache()
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]]), past_key_values=cache, use_cache=True)
        shapes = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]
        same = all(layer.values.shape == layer.keys.shape for layer in cache.layers)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} does not run with a plain KV cache: {error}"
        ) from error
    if not shapes or len(set(shapes)) > 1 or not same:
        raise UnsupportedError(
            f"{type(model).__name__} has cache layers of different shapes ({sorted(set(shapes))}); "
            "only one shape for all layers can be exported"
        )
    return shapes


def _case(
    shapes: list[tuple[int, int]], vocabulary: int, batch: int, seq: int, past: int
) -> dict[str, Any]:
    """Return arguments drawn from a fixed seed; the second row of a batch is left-padded."""
    generator = torch.Generator().manual_seed(1000 * batch + 10 * seq + past)

    def draw(heads: int, size: int) -> torch.Tensor:
        return torch.randn(batch, heads, past, size, generator=generator)

    mask = torch.ones(batch, past + seq, dtype=torch.long)
    if past + seq > seq:
        mask[1:, 0] = 0
    return {
        "input_ids": torch.randint(0, vocabulary, (batch, seq), generator=generator),
        "attention_mask": mask,
        "position_ids": torch.arange(past, past + seq)[None].repeat(batch, 1),
        "past": [(draw(*shape), draw(*shape)) for shape in shapes],
    }


def _canary(
    tokens: list[int], past_names: tuple[str, ...], shapes: list[tuple[int, int]]
) -> dict[str, Any]:
    """Return one small run for the runtime's self-test: a few tokens on an empty cache."""
    shape = [1, len(tokens)]
    heads, size = shapes[0]
    return {
        "input_ids": {"values": tokens, "shape": shape},
        "attention_mask": {"values": [1] * len(tokens), "shape": shape},
        "position_ids": {"values": list(range(len(tokens))), "shape": shape},
        **{name: {"values": [], "shape": [1, heads, 0, size]} for name in past_names},
    }


def _eos_ids(model: torch.nn.Module) -> list[int]:
    config: Any = model.config
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = config.get_text_config().eos_token_id
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list | tuple) else [int(eos)]
