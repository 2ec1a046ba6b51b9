"""Forecasts of a stream of 1,000 series: one adapter for all, one each, one each in half the room.

PYTHONPATH=. python bench/stream.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench.common import report
from bench.forecast import HORIZONS, WINDOW, Live
from edge_lora.runtime import open_bundle
from edge_lora.runtime.bench.measure import resident_bytes
from edge_lora.runtime.stream import Forecasts

SERIES, ROWS = 1000, 10


def measured(live: Live, name: str, adapters: dict[str, Path], room: int | None) -> dict[str, Any]:
    """Return what ``ROWS`` rows of ``SERIES`` values took, after the windows were full."""
    rng = np.random.default_rng(0)
    with open_bundle(live.bundle, threads=1) as session:
        before = resident_bytes()
        forecasts = Forecasts(session, adapters, memory_bytes=room, every=1)
        for i in range(WINDOW + 1):  # the last two are forecast: every adapter was loaded
            forecasts.push_row(float(i), _row(rng))
        start, made = perf_counter(), 0
        for i in range(ROWS):
            made += len(forecasts.push_row(float(WINDOW + 1 + i), _row(rng)))
        seconds = perf_counter() - start
        residents = forecasts.residents
        return {
            "series": SERIES,
            "adapters": name,
            "forecasts a second": made / seconds,
            "adapters in memory": residents.count,
            "evictions": residents.evictions,
            "held MB": forecasts.nbytes / 1e6,
            "resident memory grew by MB": (resident_bytes() - before) / 1e6,
        }


def _row(rng: np.random.Generator) -> dict[str, float]:
    return {f"s{i}": float(value) for i, value in enumerate(rng.standard_normal(SERIES))}


def main() -> int:
    """Measure all three and write the table; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        live = Live("linear", Path(folder), SERIES)
        own = {path.stem: path for path in live.paths}
        half = SERIES * WINDOW * 4 + sum(path.stat().st_size for path in live.paths) // 2
        rows = [
            measured(live, "one for all", {"*": live.paths[0]}, None),
            measured(live, "one each", own, None),
            measured(live, "one each, room for half", own, half),
        ]
    report("stream", rows, f"Window {WINDOW}, horizon {HORIZONS[0]}, one thread, {ROWS} rows.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
