"""Splits, scaling, and windows that treat every channel as a series of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_lora.timeseries.series import Series, SeriesError

Floats = NDArray[np.float32]
SplitName = Literal["auto", "ett", "70/10/20"]
ETT_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
ETT_MONTHS = (12, 4, 4)
MONTH = 30 * 24 * 3600.0  # seconds
SHARES = (0.7, 0.1, 0.2)


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of one part of a series, one channel each.

    Attributes:
        values: (rows, channels) fp32, scaled.
        window: Rows that a forecast sees.
        horizon: Rows that it gives.
        first: Row of the series that ``values`` begins with.
    """

    values: Floats
    window: int
    horizon: int
    first: int = 0

    def __len__(self) -> int:
        """Return the number of windows over all channels."""
        return self.starts * int(self.values.shape[1])

    @property
    def starts(self) -> int:
        """How many windows each channel has."""
        return len(self.values) - self.window - self.horizon + 1

    def take(self, which: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return inputs (n, window) and truths (n, horizon) of the windows with these numbers."""
        start, channel = np.divmod(which, self.values.shape[1])
        rows = start[:, None] + np.arange(self.window + self.horizon)
        both = self.values[rows, channel[:, None]]
        return both[:, : self.window], both[:, self.window :]

    def spread(self, most: int) -> NDArray[np.int64]:
        """Return numbers of about ``most`` windows: starts evenly spread, every channel of each."""
        channels = int(self.values.shape[1])
        count = min(self.starts, max(1, most // channels))
        starts = np.linspace(0, self.starts - 1, count).round().astype(np.int64)
        return (starts[:, None] * channels + np.arange(channels)).ravel()

    def batches(self, size: int) -> Iterator[tuple[Floats, Floats]]:
        """Yield every window once, in order; the last batch may be smaller."""
        for first in range(0, len(self), size):
            yield self.take(np.arange(first, min(first + size, len(self))))


@dataclass(frozen=True, eq=False)
class Parts:
    """A series cut for a forecast.

    Attributes:
        train: Windows to learn from.
        validation: Windows to choose by; their inputs reach back into ``train``.
        test: Windows to report; their inputs reach back into ``validation``.
        mean: (channels,) of the training rows, taken off before ``scale``.
        scale: (channels,) standard deviation of the training rows; 1 where it is 0.
        split: How it was cut.
    """

    train: Windows
    validation: Windows
    test: Windows
    mean: Floats
    scale: Floats
    split: str


def cut(series: Series, window: int, horizon: int, split: SplitName = "auto") -> Parts:
    """Cut a series into training, validation and test windows, scaled by the training rows.

    Args:
        series: Any.
        window: Rows that a forecast sees, at least 1.
        horizon: Rows that it gives, at least 1.
        split: "ett": the first 12, 4 and 4 months of 30 days; "70/10/20": shares of all rows;
            "auto": "ett" for files with the columns of that data set.

    Raises:
        SeriesError: Window or horizon below 1, or a part with no window.
    """
    if window < 1 or horizon < 1:
        raise SeriesError(f"window is {window} and horizon {horizon}; both must be at least 1")
    if split == "auto":
        split = "ett" if series.columns == ETT_COLUMNS else "70/10/20"
    train_end, validation_end, end = _borders(series, split)
    rows = series.values.astype(np.float64)[:train_end]
    mean, scale = rows.mean(0), rows.std(0)
    scale[scale == 0] = 1.0
    scaled = ((series.values - mean) / scale).astype(np.float32)
    parts = {
        "training": (0, train_end),
        "validation": (max(0, train_end - window), validation_end),
        "test": (max(0, validation_end - window), end),
    }
    made = {name: Windows(scaled[a:b], window, horizon, a) for name, (a, b) in parts.items()}
    for name, windows in made.items():
        if windows.starts < 1:
            raise SeriesError(
                f"the {name} part has {len(windows.values)} rows of {len(series.values)}, "
                f"fewer than one window: {window} + {horizon} rows. Lower the window or horizon"
            )
    train, validation, test = made.values()
    return Parts(train, validation, test, mean.astype(np.float32), scale.astype(np.float32), split)


def _borders(series: Series, split: SplitName) -> tuple[int, int, int]:
    rows = len(series.values)
    if split == "ett":
        sizes = [round(months * MONTH / series.step) for months in ETT_MONTHS]
        if sum(sizes) > rows:
            raise SeriesError(
                f"split ett needs 20 months, {sum(sizes)} rows; there are {rows}. Use 70/10/20"
            )
    else:
        train, test = int(rows * SHARES[0]), int(rows * SHARES[2])
        sizes = [train, rows - train - test, test]
    return sizes[0], sizes[0] + sizes[1], sum(sizes)
