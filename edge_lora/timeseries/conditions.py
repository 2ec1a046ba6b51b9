"""Conditions of windows: by the clock at their last input row, or by a column of the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import list_all
from edge_lora.scenarios import MOST_CONDITIONS, condition_name
from edge_lora.timeseries.series import Series, SeriesError
from edge_lora.timeseries.windows import Floats, Parts, Windows

FEWEST_TRAINING, FEWEST_VALIDATION = 64, 16
"""Windows that a condition needs."""
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
)  # fmt: skip
CLOCKS: dict[str, Callable[[datetime], str]] = {
    "hour": lambda time: f"{time.hour:02}h",
    "weekday": lambda time: _DAYS[time.weekday()],
    "weekend": lambda time: "weekend" if time.weekday() > 4 else "workday",
    "month": lambda time: _MONTHS[time.month - 1],
}
"""What ``--condition`` may name beside a column."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """The condition of every row of a series.

    Attributes:
        names: Each once, in order of first appearance.
        rows: (rows,) number of each row's condition.
    """

    names: tuple[str, ...]
    rows: NDArray[np.int64]

    def of(self, windows: Windows) -> NDArray[np.int64]:
        """Return (len(windows),): the condition at the last input row of every window."""
        last = windows.first + windows.window - 1
        by_start = self.rows[last : last + windows.starts]
        return np.repeat(by_start, windows.values.shape[1])


@dataclass(frozen=True, eq=False)
class SomeWindows(Windows):
    """Windows with some numbers only.

    Attributes:
        which: (n,) numbers of the windows meant.
    """

    which: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Return how many are meant."""
        return len(self.which)

    def take(self, which: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return inputs and truths of these among the windows meant."""
        return super().take(self.which[which])


def only(windows: Windows, which: NDArray[np.int64]) -> SomeWindows:
    """Return the windows with these numbers."""
    return SomeWindows(windows.values, windows.window, windows.horizon, windows.first, which)


def conditions_of(series: Series, condition: str) -> Conditions:
    """Return every row's condition: a column's labels, or the clock's.

    Args:
        series: Read with ``label=condition``.
        condition: A column of the file; if there is none of that name, hour, weekday, weekend or
            month.

    Raises:
        SeriesError: Unknown, only one condition or too many, or names that cannot be used.
    """
    labels = series.labels or _by_clock(series, condition)
    names = tuple(dict.fromkeys(labels))
    if not 2 <= len(names) <= MOST_CONDITIONS:
        raise SeriesError(
            f"condition {condition!r} has {len(names)} values; a set has 2 to {MOST_CONDITIONS}"
        )
    for name in names:
        condition_name(name)
    number = {name: i for i, name in enumerate(names)}
    return Conditions(names, np.array([number[label] for label in labels]))


def require_windows(conditions: Conditions, parts: Parts) -> None:
    """Raise SeriesError that names every condition with too few windows to learn or choose by."""
    problems = []
    counts = [
        np.bincount(conditions.of(part), minlength=len(conditions.names))
        for part in (parts.train, parts.validation)
    ]
    for name, train, validation in zip(conditions.names, *counts, strict=True):
        if train < FEWEST_TRAINING or validation < FEWEST_VALIDATION:
            problems.append(f"{name}: {train} to train on, {validation} to validate")
    if problems:
        title = (
            f"these conditions have too few windows (at least {FEWEST_TRAINING} and "
            f"{FEWEST_VALIDATION}; the file is cut {parts.split}, by time)"
        )
        raise SeriesError(f"{list_all(title, problems)}\nUse a coarser condition, or more data")


def _by_clock(series: Series, condition: str) -> tuple[str, ...]:
    if condition not in CLOCKS:
        raise SeriesError(
            f"unknown condition {condition!r}: neither a column nor one of {', '.join(CLOCKS)}"
        )
    clock, step = CLOCKS[condition], timedelta(seconds=series.step)
    try:
        begin = datetime(1970, 1, 1) + timedelta(seconds=series.start)
        return tuple(clock(begin + i * step) for i in range(len(series.values)))
    except OverflowError as error:
        raise SeriesError(
            f"the times of the file are no dates, so it has no {condition}"
        ) from error
