"""Forecast many series as their values arrive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import TensorSpec
from edge_lora.errors import EdgeLoraError, UnsupportedError
from edge_lora.runtime.session import Session
from edge_lora.runtime.stream.residents import Residents
from edge_lora.runtime.stream.window import JITTER, Window

log = logging.getLogger(__name__)

MOST_TOGETHER = 64  # windows of a run: what the base computes in between takes memory for each


@dataclass(frozen=True, eq=False, slots=True)
class Forecast:
    """What is expected of one series.

    Attributes:
        series: Its name.
        time: Of the last value that was seen, in seconds.
        values: (horizon,) fp32, for the rows after it.
        adapter: The file that it was made with; None: the base.
    """

    series: str
    time: float
    values: NDArray[np.float32]
    adapter: Path | None


@dataclass
class Counts:
    """What happened to a stream so far; a problem is one call of ``on_problem``."""

    values: int = 0
    forecasts: int = 0
    runs: int = 0
    problems: int = 0
    left_out: int = 0  # values of series that are not followed


def _warn(series: str, what: str) -> None:
    log.warning("series %r: %s", series, what)


class Forecasts:
    """The last window of every series, and the adapter that it is forecast with.

    A series begins to be forecast when its window is full. Values of one row that need the same
    adapter are forecast together, 64 to a run. What is wrong with a value is said once, by
    ``on_problem``, and concerns its own series alone; a caller that wants to stop raises there.

    Not safe to use from several threads. The session is this object's own while it is in use.
    """

    def __init__(
        self,
        session: Session,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        every: int = 1,
        fill: int = 0,
        memory_bytes: int | None = None,
        on_problem: Callable[[str, str], None] = _warn,
    ) -> None:
        """Forecast with ``session``.

        Args:
            session: Over a bundle with one input (batch, window, channels) or (batch, window), and
                one output of the same kind.
            adapters: Series -> adapter file; "*" is for all others, which else use the base.
            every: Forecast a series every so many values.
            fill: Longest gap to fill by a straight line, in rows; after a longer one, the window
                starts anew.
            memory_bytes: Most bytes for windows and adapters together. Adapters make room for
                windows, but for one, which stays whatever it takes; once there is no room, further
                series are refused. Default: no limit.
            on_problem: Is told the series and what is wrong; default: a warning is logged.

        Raises:
            UnsupportedError: If the bundle does not forecast windows.
        """
        self._input, self._output, self._shape = _ends(session.inputs, session.outputs)
        self._session = session
        self._residents = Residents(session, adapters or {})
        self._every, self._fill, self._memory = every, fill, memory_bytes
        self._on_problem = on_problem
        self._windows: dict[str, Window] = {}
        self._refused: set[Path | None] = set()  # adapters that cannot be used
        self._is_full = False  # was a series left out for lack of memory?
        self._window_bytes = 0
        self.counts = Counts()

    @property
    def window(self) -> int:
        """Values that a forecast sees."""
        return self._shape[1]

    @property
    def horizon(self) -> int:
        """Values that a forecast gives."""
        size = self._output.shape[1]
        assert isinstance(size, int)  # see _ends
        return size

    @property
    def series(self) -> int:
        """How many series are followed."""
        return len(self._windows)

    @property
    def series_on_the_base(self) -> int:
        """How many of them have no adapter."""
        return sum(self._residents.of(series) is None for series in self._windows)

    @property
    def residents(self) -> Residents:
        """The adapters in memory."""
        return self._residents

    @property
    def window_bytes(self) -> int:
        """Memory that the windows take."""
        return self._window_bytes

    @property
    def nbytes(self) -> int:
        """Memory that windows and adapters take beside the base."""
        return self._window_bytes + self._residents.nbytes

    def push(self, series: str, time: float, value: float) -> Forecast | None:
        """Take one value; return a forecast if one is due."""
        made = self.push_row(time, {series: value})
        return made[0] if made else None

    def push_row(self, time: float, values: Mapping[str, float]) -> list[Forecast]:
        """Take one value of each of several series, all of one time, in seconds.

        Returns:
            The forecasts that are due, in the order of ``values``.
        """
        due: dict[Path | None, list[str]] = {}
        for series, value in values.items():
            if self._take(series, time, value):
                due.setdefault(self._residents.of(series), []).append(series)
        made: dict[str, Forecast] = {}
        # Those in memory first: where all take turns, they would be thrown out just before theirs.
        for path, names in sorted(due.items(), key=lambda item: not self._residents.has(item[0])):
            made.update(
                (forecast.series, forecast) for forecast in self._forecast(path, names, time)
            )
        self.counts.forecasts += len(made)
        return [made[series] for series in values if series in made]

    def _take(self, series: str, time: float, value: float) -> bool:
        """Keep a value; return whether a forecast is due."""
        window = self._windows.get(series) or self._new_window(series)
        if window is None:
            return False
        problem = window.add(time, value, self._fill)
        if problem:
            self._problem(series, problem)
            return False
        self.counts.values += 1
        return window.is_due(self._every)

    def _new_window(self, series: str) -> Window | None:
        """Return a window for a series that has none; None if it gets none.

        Names of series that are left out are not kept: a stream may have any number.
        """
        window = Window(self.window)
        if self._residents.of(series) in self._refused or not self._make_room(series, window):
            self.counts.left_out += 1
            return None
        self._window_bytes += window.nbytes
        self._windows[series] = window
        return window

    def _make_room(self, series: str, window: Window) -> bool:
        """Throw out adapters for a window; return whether there is room. Says once that not."""
        if self._memory is None:
            return True
        room = self._memory - self._window_bytes - window.nbytes
        if room >= self._residents.largest:
            self._residents.shrink(room)
            return True
        if not self._is_full:
            self._is_full = True
            self._problem(
                series,
                f"no room for its window: {len(self._windows):,} series fill {self._memory:,} "
                "bytes. It and later ones get no forecasts; allow more memory",
            )
        return False

    def _forecast(self, path: Path | None, names: Sequence[str], time: float) -> list[Forecast]:
        """Run the windows of ``names``, which use the adapter at ``path``."""
        room = None if self._memory is None else self._memory - self._window_bytes
        try:
            self._residents.use(path, room)
        except EdgeLoraError as error:
            self._refuse(path)
            self._problem(names[0], f"{error}; no series of this adapter gets forecasts")
            return []
        if path is not None:
            self._compare_steps(path, names)
        batch = self._input.shape[0]
        most = self._session.largest.get(str(batch), MOST_TOGETHER)
        size = 1 if isinstance(batch, int) else min(MOST_TOGETHER, most)
        made = []
        for first in range(0, len(names), size):
            some = names[first : first + size]
            for series, values in zip(some, self._run(some), strict=True):
                if np.isfinite(values).all():
                    made.append(Forecast(series, time, values, path))
                else:
                    self._problem(series, "its forecast is not finite")
        return made

    def _run(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Return (n, horizon) for the windows of ``names``."""
        x = np.empty((len(names), self.window), np.float32)
        for row, series in zip(x, names, strict=True):
            self._windows[series].copy_to(row)
        self.counts.runs += 1
        y = self._session.run({self._input.name: x.reshape(-1, *self._shape[1:])})
        return np.asarray(y[self._output.name], np.float32).reshape(len(names), -1)

    def _compare_steps(self, path: Path, names: Sequence[str]) -> None:
        """Tell of series that have another step than their adapter; of each window's step once."""
        trained = self._residents.step_of(path)
        for series in names:
            window = self._windows[series]
            if window.checked == window.step:
                continue
            window.checked = window.step
            if trained is not None and abs(window.step - trained) > JITTER * trained:
                self._problem(
                    series,
                    f"has rows every {window.step:g} s, its adapter '{path.name}' was trained on "
                    f"rows every {trained:g} s",
                )

    def _refuse(self, path: Path | None) -> None:
        """Follow no series of an adapter any more."""
        self._refused.add(path)
        for series in [name for name in self._windows if self._residents.of(name) == path]:
            self._window_bytes -= self._windows.pop(series).nbytes

    def _problem(self, series: str, what: str) -> None:
        self.counts.problems += 1
        self._on_problem(series, what)


def _ends(
    inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> tuple[TensorSpec, TensorSpec, tuple[int, ...]]:
    """Return the graph's input and output, and the shape of one window, (1, window[, 1])."""
    shapes = {**inputs, **outputs}
    told = ", ".join(f"{name} {spec.dtype} {spec.shape}" for name, spec in shapes.items())
    problem = UnsupportedError(
        "this bundle does not forecast windows of single series: it must have one float32 input "
        f"(batch, window[, channels]) and one output, it has {told}. "
        "Export one with: edge-lora export --task forecast --horizon 96 -o BUNDLE"
    )
    if len(inputs) != 1 or len(outputs) != 1:
        raise problem
    (x,), (y,) = inputs.values(), outputs.values()
    if x.dtype != "float32" or len(x.shape) not in (2, 3) or len(y.shape) != len(x.shape):
        raise problem
    batch, window, *channels = x.shape
    sizes = (window, y.shape[1])
    if not all(isinstance(size, int) for size in sizes) or any(
        isinstance(d, int) and d != 1 for d in (batch, *channels)
    ):
        raise problem
    assert isinstance(window, int)
    return x, y, (1, window, *[1 for _ in channels])
