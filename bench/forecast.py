"""Forecasting on ETTh1: errors, sizes and speed of the default adapter, in 4 bits too.

The data set (zhouhaoyi/ETDataset, ETTh1.csv) is not part of this project. Standard split, scaled
data, all test windows, best epoch by validation. Rates and groups were chosen on validation errors.
Slow rows (transformers, frozen bases) are those of ``bench/forecast_rivals.py``.

    PYTHONPATH=. python bench/forecast.py PATH/ETTh1.csv                      everything
    PYTHONPATH=. python bench/forecast.py PATH/ETTh1.csv --errors 96 192      errors, no speed

The second needs neither the compiled core nor an engine; horizons that it is not asked for keep
their rows in ``bench/results/forecast_runs.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bench.common import RESULTS, report
from edge_lora.methods import attach
from edge_lora.quantise import quantise
from edge_lora.timeseries.bases import make_base
from edge_lora.timeseries.compare import (
    Result,
    baselines,
    comparisons,
    file_bytes,
    measure_adapter,
    trained,
)
from edge_lora.timeseries.series import Series, read_series
from edge_lora.timeseries.training import DEFAULTS, Recipe
from edge_lora.timeseries.windows import cut

HORIZONS = (96, 192, 336, 720)
WINDOW, SEASON, SEEDS, THREADS = 336, 24, (0, 1, 2), 2
CODED_GROUP, CODED_BOOK = 64, "lloyd_max"
REPEATS, BURST, ADAPTERS = 50, 20, 1000
RIVALS = ("dlinear", "rlinear")
PUBLISHED = {
    "DLinear": (0.375, 0.405, 0.439, 0.472),
    "NLinear": (0.374, 0.408, 0.429, 0.440),
    "FITS": (0.373, 0.407, 0.429, 0.428),
    "PatchTST/42": (0.375, 0.414, 0.431, 0.449),
}
"""Test MSE on ETTh1 of windows of 336 at ``HORIZONS``, as the papers say; not measured here."""
SHAPES = ((1, WINDOW, 7), (1, WINDOW, 1), (64, WINDOW, 1))


def rows_of(series: Series, horizon: int) -> list[dict[str, Any]]:
    """Return one row for each contestant and seed at one horizon."""
    parts = cut(series, WINDOW, horizon)
    base = make_base("linear", WINDOW, horizon)
    rows: list[dict[str, Any]] = []

    def add(name: str, result: Result, seed: int | None = None, stored: int | None = None) -> None:
        fit = result.fit
        rows.append(
            {
                "horizon": horizon,
                "forecast": name,
                "seed": seed,
                "values": result.values,
                "base_bytes": result.base_bytes,
                "adapter_bytes": result.adapter_bytes if stored is None else stored,
                "validation_mse": fit.best_validation_loss if fit else None,
                "test_mse": result.errors.mse,
                "test_mae": result.errors.mae,
                "seconds": round(fit.seconds, 1) if fit else 0.0,
            }
        )

    for result in baselines(parts, SEASON, Recipe(), with_no_base=False):
        add(result.name, result)
    for name in RIVALS:
        for seed in SEEDS:
            add(name, comparisons([name], parts, seed, "cpu")[0], seed)
    for seed in SEEDS:
        adapter, result = trained(base, "linear", parts, Recipe(seed=seed), "etth1")
        add("default adapter", result, seed)
        small = quantise(adapter, 4, CODED_GROUP, CODED_BOOK)
        coded = replace(result, errors=measure_adapter(base, small, parts.test))
        add("the same, 4-bit afterwards", coded, seed, file_bytes(small))
        recipe = Recipe("bilora", dict(DEFAULTS["bilora"]), seed=seed)
        adapter, result = trained(base, "linear", parts, recipe, "etth1-4bit")
        add("4-bit, trained so", result, seed)
    return rows


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over seeds of each contestant and horizon, then over all horizons."""
    numbers = ("values", "base_bytes", "adapter_bytes", "test_mse", "test_mae", "seconds")
    table: list[dict[str, Any]] = []
    for name in dict.fromkeys(row["forecast"] for row in rows):
        there = [h for h in HORIZONS if any(r["horizon"] == h for r in rows)]
        for horizon in there:
            same = [r for r in rows if r["forecast"] == name and r["horizon"] == horizon]
            mean = {key: float(np.mean([r[key] for r in same])) for key in numbers}
            table.append({"forecast": name, "horizon": str(horizon), **mean})
        if len(there) == len(HORIZONS):
            four = table[-len(HORIZONS) :]
            mean = {key: float(np.mean([r[key] for r in four])) for key in numbers}
            table.append({"forecast": name, "horizon": "mean", **mean})
    return table


def errors(path: Path, horizons: Sequence[int]) -> None:
    """Measure these horizons and write both tables, with the rows of others from earlier runs."""
    series = read_series(path)
    for horizon in horizons:
        found = rows_of(series, horizon)
        rows = [r for r in kept() if r["horizon"] != horizon and r.keys() == found[0].keys()]
        rows = sorted([*rows, *found], key=lambda row: HORIZONS.index(row["horizon"]))
        report("forecast_runs", rows, "Every run.")
        note = f"Means over seeds {SEEDS}; window {WINDOW}, {THREADS} threads."
        report("forecast", means(rows), note)


def kept() -> list[dict[str, Any]]:
    """Return the rows of earlier runs."""
    path = RESULTS / "forecast_runs.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


class Live:
    """A base as a bundle and as torch module, with adapters of random values for it."""

    def __init__(self, name: str, folder: Path, count: int) -> None:
        """Export the base and write ``count`` adapters into ``folder``."""
        from edge_lora.export import export_bundle

        self.base = make_base(name, WINDOW, HORIZONS[0])
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, WINDOW, 7, generator=generator)
        self.bundle = folder / "bundle"
        export_bundle(
            self.base, self.bundle, example_inputs={"x": self.x.expand(3, -1, -1)},
            dynamic_shapes={"x": {0: "batch", 2: "channels"}}, slot_names=self.base.slots,
            base_id=self.base.id, progress=False,
        )  # fmt: skip
        attached = attach(self.base, "rslora", self.base.slots, **DEFAULTS["rslora"])
        self.paths = []
        for i in range(count):
            with torch.no_grad():
                for parameter in attached.parameters():
                    parameter.normal_(std=0.05, generator=generator)
            self.paths.append(attached.lower(f"s{i}").save(folder / f"s{i}.safetensors"))
        attached.detach()


def speed(name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return forecasts a second on one core: the bundle with an adapter fused, and torch eager.

    Both forecast ``BURST`` times in a row, in turn. torch runs the plain module, in inference mode,
    without an adapter: fused weights cost the same.

    Args:
        name: Of the base.
        shape: (batch, window, channels); one forecast is one channel of one window.
    """
    from edge_lora.runtime import open_bundle
    from edge_lora.runtime.bench.measure import interleave

    with tempfile.TemporaryDirectory() as folder:
        live = Live(name, Path(folder), 1)
        torch.set_num_threads(1)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with open_bundle(live.bundle, threads=1) as session, torch.inference_mode():
            session.load_adapter(live.paths[0], "a")
            session.set_adapter("a")
            feeds = {"x": x.numpy()}
            actions = {
                "torch": lambda: [live.base(x) for _ in range(BURST)],
                "bundle": lambda: [session.run(feeds) for _ in range(BURST)],
            }
            times = interleave(actions, REPEATS)
    series = shape[0] * shape[2]
    rates = {key: 1e3 * BURST * series / samples.median for key, samples in times.items()}
    return {
        "base": name,
        "windows at once": shape[0],
        "channels": shape[2],
        "torch a second": rates["torch"],
        "bundle": rates["bundle"],
        "x": rates["bundle"] / rates["torch"],
    }


def memory() -> dict[str, Any]:
    """Return what many adapters of the linear base take in one session, against their files."""
    from edge_lora.runtime import open_bundle
    from edge_lora.runtime.bench.measure import resident_bytes

    with tempfile.TemporaryDirectory() as folder:
        live = Live("linear", Path(folder), ADAPTERS)
        files = sum(path.stat().st_size for path in live.paths)
        with open_bundle(live.bundle, threads=1) as session:
            feeds = {"x": live.x.numpy()}
            session.run(feeds)
            gc.collect()
            before, start = resident_bytes(), perf_counter()
            for path in live.paths:
                session.load_adapter(path, path.stem)
            milliseconds = 1e3 * (perf_counter() - start) / ADAPTERS
            for path in live.paths:
                session.set_adapter(path.stem)
            session.run(feeds)
            gc.collect()
            grown, patches = resident_bytes() - before, session.patch_bytes
    return {
        "adapters": ADAPTERS,
        "files MB": files / 1e6,
        "held by the session MB": patches / 1e6,
        "resident memory grew by MB": grown / 1e6,
        "ms to load one": milliseconds,
    }


def main(arguments: list[str]) -> int:
    """Measure everything, or errors alone, and write the tables; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, help="ETTh1.csv")
    parser.add_argument("--errors", type=int, nargs="+", choices=HORIZONS, help="Only of these.")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    if given.errors:
        errors(given.data, given.errors)
        return 0
    note = f"One thread, medians of {REPEATS} alternating bursts of {BURST} calls each."
    bases = ("linear", "gpt2-random:2x64")
    report("forecast_speed", [speed(base, shape) for base in bases for shape in SHAPES], note)
    report("forecast_memory", [memory()], "Heap that was free before is used again.")
    torch.set_num_threads(THREADS)
    errors(given.data, HORIZONS)
    published = [
        {
            "forecast": f"{name}, published",
            **{str(h): mse for h, mse in zip(HORIZONS, figures, strict=True)},
            "mean": float(np.mean(figures)),
        }
        for name, figures in PUBLISHED.items()
    ]
    report("forecast_published", published, "Test MSE as published, window 336; not measured here.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
