"""Errors of a forecast over all windows of a part, overall and by step of the horizon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_lora.timeseries.windows import Floats, Windows

Predict = Callable[[Floats], Floats]
"""(n, window) -> (n, horizon)."""
BATCH = 2048


@dataclass(frozen=True, eq=False)
class Errors:
    """Errors on scaled data; every window and channel counts the same.

    Attributes:
        mse_by_step: (horizon,) mean squared error of each step ahead.
        mae_by_step: (horizon,) mean absolute error of each step ahead.
        windows: How many windows were forecast.
    """

    mse_by_step: NDArray[np.float64]
    mae_by_step: NDArray[np.float64]
    windows: int

    @property
    def mse(self) -> float:
        """Mean squared error over all steps."""
        return float(self.mse_by_step.mean())

    @property
    def mae(self) -> float:
        """Mean absolute error over all steps."""
        return float(self.mae_by_step.mean())


def measure(predict: Predict, windows: Windows, which: NDArray[np.int64] | None = None) -> Errors:
    """Forecast windows (no last batch is dropped) and return the errors.

    Args:
        predict: The forecast.
        windows: Of one part.
        which: (n,) numbers of those to forecast, for forecasts that take long; None for all.
    """
    which = np.arange(len(windows)) if which is None else which
    count = len(which)
    squared = np.zeros(windows.horizon)
    absolute = np.zeros(windows.horizon)
    for first in range(0, count, BATCH):
        x, y = windows.take(which[first : first + BATCH])
        error = (predict(x) - y).astype(np.float64)
        squared += np.square(error).sum(0)
        absolute += np.abs(error).sum(0)
    return Errors(squared / count, absolute / count, count)
