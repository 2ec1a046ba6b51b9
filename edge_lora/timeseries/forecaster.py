"""What all bases share: their description, and reversible normalisation of a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

EPSILON = 1e-5  # added to the variance of a window
LEAST_GAIN = 0.01  # that a forecast is divided by
OFF = 2.0**-20  # from one and zero, which an engine takes out of the graph when it loads it


class Normalise(nn.Module):
    """Take mean and spread of each window off a series, and put them back on its forecast.

    With ``affine`` a learned gain and shift follow, and come off again before mean and spread do
    (Kim et al. 2022, "Reversible instance normalization"). All channels share them, as they share
    every weight: the number of channels stays free.

    Time is the last axis here, and no axes change place between the two ends: for that an engine
    would make copies of gain and shift when it loads the graph, which no adapter reaches.
    """

    def __init__(self, affine: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 1 + OFF)) if affine else None
        self.shift = nn.Parameter(torch.full((1,), OFF)) if affine else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (…, window) normalised, and mean and spread for ``back``."""
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        spread = torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPSILON)
        x = centred / spread
        if self.gain is not None and self.shift is not None:
            x = x * self.gain + self.shift
        return x, mean, spread

    def back(self, y: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        """Return a forecast (…, horizon) in the unit of the series."""
        if self.gain is not None and self.shift is not None:
            y = (y - self.shift) / _away_from_zero(self.gain.expand_as(spread))
        return y * spread + mean


def _away_from_zero(gain: Tensor) -> Tensor:
    """Return ``gain`` with its sign, at least ``LEAST_GAIN`` from zero.

    It comes as wide as the batch: what follows from a weight alone, an engine computes once.
    """
    size = gain.abs().clamp(min=LEAST_GAIN)
    return torch.where(gain < 0, -size, size)


class Forecaster(nn.Module):
    """A frozen base: (batch, window, channels) to (batch, horizon, channels).

    Attributes:
        slots: Patterns of the weights that a training method changes.
        nonzero_start: Those among them whose change must not start at zero: their weight is zero,
            and nothing behind them would see the window.
        lr: Peak learning rate that validation chose.
        batch_size: Windows of a training step.
        settings: Of low-rank methods, in place of the usual ones.
        id: Readable name.
        window: Rows that a forecast sees.
        horizon: Rows that it gives.
        norm: Normalisation of a window.
    """

    slots: tuple[str, ...]
    nonzero_start: tuple[str, ...] = ()
    lr: ClassVar[float] = 1e-3
    batch_size: ClassVar[int] = 256
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, name: str, window: int, horizon: int, affine: bool = False) -> None:
        super().__init__()
        self.id = f"{name}-{window}-{horizon}{'-affine' if affine else ''}"
        self.window, self.horizon = window, horizon
        self.norm = Normalise(affine)

    @property
    def affine_slots(self) -> tuple[str, ...]:
        """The gain and shift of the normalisation, if there are any."""
        return ("norm.gain", "norm.shift") if self.norm.gain is not None else ()
