"""One switch of adapters: what is asked for, and what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.engines import Route


@dataclass(frozen=True)
class SwapStats:
    """What one switch did.

    Attributes:
        ms: Wall time of the switch alone; compiling, and waiting for running calls, are not in it.
        bytes: Bytes of weights written.
        route: How it was done.
        rounding_error: Root mean square of what 8-bit weights took from the adapters by rounding,
            as a share of what the adapters change; 0 for fp32 weights.
    """

    ms: float
    bytes: int
    route: Route
    rounding_error: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """What a switch will do.

    Attributes:
        changed: How many values, or codes, will differ from the base's.
        rounding_error: See ``SwapStats``.
    """

    changed: int
    rounding_error: float = 0.0


def paired(
    names: Sequence[str], weights: Sequence[float] | None, ranks: Sequence[int | None] | None
) -> list[tuple[str, float, int | None]]:
    """Return name, weight and rank of every adapter; by default 1 and the whole adapter.

    Raises:
        UnsupportedError: If a name comes twice, they do not pair up, or a weight is not finite.
    """
    weights = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    ranks = [None] * len(names) if ranks is None else ranks
    if not len(weights) == len(names) == len(ranks) == len(set(names)):
        raise UnsupportedError(
            f"adapters {list(names)}, weights {weights} and ranks {list(ranks)} do not pair up"
        )
    if not np.isfinite(weights).all():
        raise UnsupportedError(f"weights {weights} are not finite")
    return list(zip(names, weights, ranks, strict=True))
