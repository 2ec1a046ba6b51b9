"""What a forecast must beat: rules without parameters, and one full linear map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_lora.timeseries.metrics import Predict, measure
from edge_lora.timeseries.windows import Floats, Parts, Windows

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried by ``linear``, relative to the mean variance of an input."""
LEAST_UNIT = 1e-6  # of that; a series that never changes has none


def last_value(horizon: int) -> Predict:
    """Return the forecast that repeats the last value."""
    return lambda x: np.repeat(x[:, -1:], horizon, axis=1)


def seasonal(horizon: int, season: int) -> Predict:
    """Return the forecast that repeats the last ``season`` values, or the window if shorter."""

    def predict(x: Floats) -> Floats:
        last = x[:, -season:]
        return last[:, np.arange(horizon) % last.shape[1]]

    return predict


def linear(parts: Parts) -> tuple[Predict, int]:
    """Return the best linear map of the window without its mean, and its number of parameters.

    Every weight is free: (horizon, window). Solved as ridge regression on all training windows;
    the ridge is chosen by validation.
    """
    window, horizon = parts.train.window, parts.train.horizon
    gram, cross = _moments(parts.train)
    unit = max(float(np.trace(gram)) / window, LEAST_UNIT)

    def solved(ridge: float) -> Predict:
        weight = np.linalg.solve(gram + ridge * unit * np.eye(window), cross).astype(np.float32)

        def predict(x: Floats) -> Floats:
            mean = x.mean(1, keepdims=True)
            forecast: Floats = (x - mean) @ weight + mean
            return forecast

        return predict

    best = min(map(solved, RIDGES), key=lambda predict: measure(predict, parts.validation).mse)
    return best, window * horizon


def _moments(windows: Windows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sums of x xᵀ and x yᵀ over all windows, both without the mean of x."""
    gram = np.zeros((windows.window, windows.window))
    cross = np.zeros((windows.window, windows.horizon))
    for x, y in windows.batches(4096):
        mean = x.mean(1, keepdims=True)
        gram += (x - mean).T @ (x - mean)
        cross += (x - mean).T @ (y - mean)
    return gram, cross
