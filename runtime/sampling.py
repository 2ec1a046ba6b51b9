"""How the next token is chosen from logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import UnsupportedError

Logits = NDArray[np.float32]
Tokens = NDArray[np.int64]
Sampler = Callable[[Logits], Tokens]
"""Logits (batch, vocab) -> token ids (batch,)."""


def greedy(logits: Logits) -> Tokens:
    """Take the most likely token; of equals the first."""
    tokens: Tokens = logits.argmax(axis=-1).astype(np.int64)
    return tokens


def nucleus(top_p: float, temperature: float = 1.0, seed: int | None = None) -> Sampler:
    """Draw from the smallest set of tokens whose probabilities reach ``top_p``.

    Source:
        Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv:1904.09751.
    """
    if not 0 < top_p <= 1 or not temperature > 0:
        raise UnsupportedError(
            f"top_p {top_p!r} must be in (0, 1] and temperature {temperature!r} above 0"
        )
    rng = np.random.default_rng(seed)

    def draw(logits: Logits) -> Tokens:
        scaled = logits.astype(np.float64) / temperature
        order = np.argsort(-scaled, axis=-1, kind="stable")
        sorted_logits = np.take_along_axis(scaled, order, axis=-1)
        p = np.exp(sorted_logits - sorted_logits[:, :1])
        p /= p.sum(axis=-1, keepdims=True)
        before = p.cumsum(axis=-1) - p  # probability of all more likely tokens
        p = np.where(before < top_p, p, 0.0)
        p /= p.sum(axis=-1, keepdims=True)
        picks = [rng.choice(p.shape[1], p=row) for row in p]
        return order[np.arange(len(picks)), picks].astype(np.int64)

    return draw
