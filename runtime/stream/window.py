"""The last values of one series, at equal steps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge_lora.csv_values import LARGEST

OBJECT_BYTES = 380  # of one window beside its values: measured over 20,000 of them, CPython 3.11
JITTER = 0.1  # of a step: live clocks are not exact, and a row that is missing makes a whole step
_LONG_AGO = 1 << 60


class Window:
    """A ring of the last ``size`` values of a series.

    A forecast needs equal steps. What breaks them starts the window anew, and the step is learned
    again from the next two times: no forecast is ever made of a window with a hole in it.
    """

    __slots__ = ("_filled", "_ring", "_since", "_start", "checked", "last", "step")

    def __init__(self, size: int) -> None:
        self._ring = np.empty(size, np.float32)
        self._start = 0  # where the oldest value lies once the ring is full
        self._filled = 0
        self._since = _LONG_AGO  # values since the last forecast
        self.last = math.nan  # time of the newest value, seconds
        self.step = math.nan  # seconds between rows, from the first two
        self.checked = math.nan  # the step that was checked last: for who compares it

    @property
    def is_full(self) -> bool:
        """Whether a forecast can be made."""
        return self._filled == len(self._ring)

    @property
    def nbytes(self) -> int:
        """Memory that it takes, itself included."""
        return self._ring.nbytes + OBJECT_BYTES

    def add(self, time: float, value: float, fill: int = 0) -> str:
        """Take the value of the next row.

        Args:
            time: In seconds; after the one before.
            value: Finite in fp32; anything else is refused.
            fill: Longest gap, in rows, to fill by a straight line; no longer than the window.

        Returns:
            What is wrong with it, or nothing. A value without a problem of its own is kept: after a
            gap or another step it is the first of a new window.
        """
        if not abs(value) <= LARGEST:
            return "no value" if math.isnan(value) else f"{value:g} is not a number in fp32"
        if self._filled == 0:
            self._begin(time, value)
            return ""
        gap = time - self.last
        if gap <= 0:
            return "its time is not after the last one"
        if math.isnan(self.step):
            self.step = gap
        steps = gap / self.step
        rows = round(steps) if math.isfinite(steps) else 0
        if rows < 1 or abs(gap - rows * self.step) > JITTER * self.step:
            told = f"{gap:g} s after the last one, usual is {self.step:g} s"
        elif rows - 1 > min(fill, len(self._ring)):
            told = f"{rows - 1:g} row{'s are' if rows > 2 else ' is'} missing before it"
        else:
            for i in range(1, rows):
                self._push(self.newest + (value - self.newest) / (rows - i + 1))
            self._push(value)
            self.last = time
            return ""
        self._begin(time, value)
        return f"{told}; its window starts anew"

    @property
    def newest(self) -> float:
        """The value that came last."""
        return float(self._ring[(self._start + self._filled - 1) % len(self._ring)])

    def is_due(self, every: int) -> bool:
        """Count a value; return whether it asks for a forecast.

        The first full window does, then each value that is ``every`` after the last that did.
        """
        self._since += 1
        if not self.is_full or self._since < every:
            return False
        self._since = 0
        return True

    def copy_to(self, out: NDArray[np.float32]) -> None:
        """Write the values into ``out`` (size,), oldest first; it must be full."""
        older = len(self._ring) - self._start
        out[:older] = self._ring[self._start :]
        out[older:] = self._ring[: self._start]

    def _begin(self, time: float, value: float) -> None:
        self._start = self._filled = 0
        self._since = _LONG_AGO
        self.last, self.step = time, math.nan
        self._push(value)

    def _push(self, value: float) -> None:
        if self._filled < len(self._ring):
            self._ring[self._filled] = value
            self._filled += 1
            return
        self._ring[self._start] = value
        self._start = (self._start + 1) % len(self._ring)
