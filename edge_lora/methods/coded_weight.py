"""Weights that a forward sees through a codebook, and how their gradient gets past it.

    n = (W - mean) / (std + 1e-5)        live statistics of each group, std unbiased
    V = book[nearest(n)] * std + mean    what the forward multiplies

Rounding to the book has no gradient, so it is taken for the identity (straight through), but mean
and std are differentiated. With g = dL/dV, q = book[nearest(n)] and k = std / (std + 1e-5)

    dL/dW = k g + (1 - k) mean(g) + sum(g (q - k n)) / std * (W - mean) / (N - 1)

which is g + sum(g (q - n)) n / (N - 1) but for the 1e-5.

``coded`` emits exactly the codes and statistics that the forward used, so its ``decode`` is equal
to the forward's weight to the bit.

Source: Jie, Wang, Deng 2023, arXiv:2307.16867.
"""

from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_lora.codebook import SPREAD_FLOOR, Book, Coded, Group, group_size, levels_of, pack

BOOK: Book = "gauss_l1"
"""The paper's book; the decoder reads any."""


def seen_through_codes(weight: Tensor, bits: int, group: Group = "tensor") -> Tensor:
    """Return what ``weight`` decodes to after coding, with a straight-through gradient.

    Args:
        weight: fp32, any shape (fp64 for tests).
        bits: 1, 2, 4 or 8.
        group: What shares one mean and standard deviation, see ``edge_lora.codebook``.
    """
    book = _book(bits, weight.device, weight.dtype)
    parts = [_StraightThrough.apply(rows, *book) for rows in _groups(weight, group)]  # type: ignore[no-untyped-call]
    flat = parts[0] if len(parts) == 1 else torch.cat([part.view(-1) for part in parts])
    return flat.view(weight.shape)


@torch.no_grad()
def coded(weight: Tensor, bits: int, group: Group = "tensor") -> Coded:
    """Return ``weight`` as the codes and statistics that ``seen_through_codes`` uses."""
    _, thresholds = _book(bits, weight.device, weight.dtype)
    codes, stats = [], []
    for rows in _groups(weight, group):
        mean, std = _statistics(rows)
        normal = (rows - mean) / (std + SPREAD_FLOOR)
        codes.append(torch.bucketize(normal, thresholds).reshape(-1))
        stats.append(torch.cat([mean, std], dim=1))
    packed = pack(torch.cat(codes).to(torch.uint8).cpu().numpy(), bits)
    numbers = torch.cat(stats).cpu().numpy().astype(np.float32)
    return Coded(packed, numbers, levels_of(BOOK, bits), tuple(weight.shape), group)


class _StraightThrough(torch.autograd.Function):
    """V from W, both (groups, n)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:  # noqa: ANN401
        mean, std = _statistics(weight)
        normal = (weight - mean) / (std + SPREAD_FLOOR)
        chosen = levels[torch.bucketize(normal, thresholds)]
        ctx.save_for_backward(weight, chosen, mean, std)
        return chosen * std + mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        weight, chosen, mean, std = ctx.saved_tensors
        centred = weight - mean
        normal = centred / (std + SPREAD_FLOOR)
        kept = std / (std + SPREAD_FLOOR)
        through_std = (gradient * (chosen - kept * normal)).sum(1, keepdim=True)
        per_value = torch.where(std > 0, through_std / std / (weight.shape[1] - 1), 0.0)
        mean_gradient = gradient.mean(1, keepdim=True)
        return kept * gradient + (1 - kept) * mean_gradient + per_value * centred, None, None


@cache
def _book(bits: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the levels, and the thresholds between them, as ``edge_lora.codebook.nearest``."""
    levels = torch.from_numpy(levels_of(BOOK, bits)).to(device, dtype)
    return levels, (levels[1:] + levels[:-1]) / 2


def _groups(weight: Tensor, group: Group) -> list[Tensor]:
    """Return the values as (groups, n), and the shorter last group, if any, as (1, rest)."""
    flat, size = weight.reshape(-1), group_size(group, tuple(weight.shape))
    whole = prod(weight.shape) // size * size
    parts = [flat[:whole].view(-1, size), flat[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation of each row, (groups, 1); of one value 0."""
    if rows.shape[1] == 1:
        return rows.clone(), torch.zeros_like(rows)
    variance, mean = torch.var_mean(rows, 1, correction=1, keepdim=True)
    return mean, variance.sqrt()
