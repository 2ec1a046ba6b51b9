"""SHiRA masks: which entries of a weight are trained.

A mask is a *unit* (single entries, or lines of 16 outputs x 1 input) and a *score* of the units;
the best are taken, exactly as many as the density asks for, per slot.

| score | of one entry | lines |
|---|---|---|
| rand | uniform | ``line`` |
| wm | abs(W) | ``line-wm`` |
| grad | abs(sum of dL/dW over the calibration batches) | ``line-grad`` |
| snip | abs(W * that sum) | ``line-snip`` |

The score of a line is the sum of its 16 entries' scores. ``struct`` is the paper's other pattern:
every f-th row, plus the diagonal.

Inference engines pack 16 consecutive outputs of one input into one cache line, so a swap of a
``line`` mask touches a sixteenth of the memory that a ``rand`` mask of the same size touches.

Source: Bhardwaj et al. 2024, Sparse High Rank Adapters, arXiv:2406.13175. The paper draws ``rand``
    by
Bernoulli trials; here the count is exact. Line masks are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

LINE = 16
"""Outputs in a line: fp32 lanes of one 64-byte cache line."""

Unit = Literal["entry", "line", "row"]
Scorer = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Mask:
    """One row of the table of masks.

    Attributes:
        unit: What is chosen.
        score: fp32 (out, in) score of every entry from the weight and its summed gradient; None is
            random.
        needs_gradient: True if the score reads the gradient.
    """

    unit: Unit
    score: Scorer | None = None
    needs_gradient: bool = False


def _magnitude(weight: Tensor, _: Tensor | None) -> Tensor:
    return weight.float().abs()


def _gradient(_: Tensor, gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.abs()


def _saliency(weight: Tensor, gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return (weight.float() * gradient).abs()


MASKS: dict[str, Mask] = {
    "struct": Mask("row"),
    "rand": Mask("entry"),
    "wm": Mask("entry", _magnitude),
    "grad": Mask("entry", _gradient, needs_gradient=True),
    "snip": Mask("entry", _saliency, needs_gradient=True),
    "line": Mask("line"),
    "line-wm": Mask("line", _magnitude),
    "line-grad": Mask("line", _gradient, needs_gradient=True),
    "line-snip": Mask("line", _saliency, needs_gradient=True),
}


def problem_of(mask: str, shape: tuple[int, int]) -> str | None:
    """Return why ``mask`` cannot be cut from an (out_features, in_features) weight, or None."""
    if MASKS[mask].unit == "line" and shape[0] % LINE:
        return f"{shape[0]} outputs are not a multiple of {LINE}"
    return None


def choose(
    mask: str,
    weight: Tensor,
    density: float,
    seed: int,
    gradient: Tensor | None = None,
    floor: float = 0.0,
) -> Tensor:
    """Return the positions of one slot's mask.

    Args:
        mask: A key of ``MASKS``.
        weight: (out_features, in_features), any float dtype and device. Not modified.
        density: Share of the entries, in (0, 1].
        seed: For random scores, and for the first row of ``struct``.
        gradient: fp32 of the same shape, for scores that need it.
        floor: Share of the budget that is spread evenly over the outputs (or groups of 16) before
            the best of the rest are taken: top-k masks tend to pile up on few outputs.

    Returns:
        int64 flat row-major positions, strictly ascending, on the device of ``weight``. Exactly
        round(density * entries) of them (a multiple of 16 for lines; for ``struct`` whole rows and
        the diagonal, at least one row, within a row of the budget).
    """
    row = MASKS[mask]
    out_features, in_features = weight.shape
    count = max(1, round(density * weight.numel()))
    if row.unit == "row":
        return _rows_and_diagonal(out_features, in_features, count, seed).to(weight.device)
    if row.unit == "line":
        units = max(1, round(count / LINE))
        shape = (out_features // LINE, in_features)
    else:
        units, shape = count, (out_features, in_features)
    if row.score is None:
        chosen = _random_positions(shape[0] * shape[1], units, seed).to(weight.device)
    else:
        scores = row.score(weight, gradient)
        if row.unit == "line":
            scores = scores.reshape(shape[0], LINE, in_features).sum(1)
        chosen = _best_positions(scores, units, floor)
    return _expand_lines(chosen, in_features) if row.unit == "line" else chosen


def _random_positions(total: int, count: int, seed: int) -> Tensor:
    drawn = np.random.default_rng(seed).choice(total, count, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn).astype(np.int64))


def _best_positions(scores: Tensor, count: int, floor: float) -> Tensor:
    per_row = int(floor * count) // scores.shape[0]
    if per_row:
        first = scores.topk(min(per_row, scores.shape[1]), dim=1).indices
        scores = scores.scatter(1, first, torch.inf)
    return scores.flatten().topk(count, sorted=False).indices.sort().values


def _expand_lines(lines: Tensor, in_features: int) -> Tensor:
    """Return the entries of lines given as flat positions in (out_features / 16, in_features)."""
    group, column = lines // in_features, lines % in_features
    rows = group[:, None] * LINE + torch.arange(LINE, device=lines.device)  # (lines, 16)
    return (rows * in_features + column[:, None]).flatten().sort().values


def _rows_and_diagonal(out_features: int, in_features: int, count: int, seed: int) -> Tensor:
    diagonal = torch.arange(min(out_features, in_features))
    rows = min(out_features, max(1, (count - len(diagonal)) // in_features))
    step = out_features / rows
    first = np.random.default_rng(seed).uniform(0, step)
    chosen = torch.from_numpy((first + step * np.arange(rows)).astype(np.int64) % out_features)
    entries = (chosen[:, None] * in_features + torch.arange(in_features)).flatten()
    return torch.cat([entries, diagonal * (in_features + 1)]).unique()  # type: ignore[no-any-return, no-untyped-call]
