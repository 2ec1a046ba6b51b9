"""Overlapping patches of a series, filled up with its last value."""

from __future__ import annotations

from torch import Tensor, nn

PATCH, STRIDE = 16, 8
LEAST_WINDOW = PATCH - STRIDE  # of one patch


def count_overlapping(window: int) -> int:
    """Return how many patches a window makes."""
    return (window + STRIDE - PATCH) // STRIDE + 1


def overlapping(series: Tensor) -> Tensor:
    """Return patches (n, patches, PATCH) of series (n, window)."""
    longer = nn.functional.pad(series[:, None], (0, STRIDE), "replicate")[:, 0]
    return longer.unfold(1, PATCH, STRIDE)
