"""A forecast beside the truth: examples from the test part, and the errors of every step ahead.

``picture`` gathers the numbers, in the units of the file; ``save_plot`` draws them as an image
(matplotlib) or as one page (``edge_lora.timeseries.plot_page``).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import UnsupportedError
from edge_lora.timeseries import baselines as rules
from edge_lora.timeseries.bases import LinearForecaster
from edge_lora.timeseries.compare import NO_BASE, Result, wearing
from edge_lora.timeseries.forecaster import Forecaster
from edge_lora.timeseries.metrics import Errors, Predict
from edge_lora.timeseries.plot_page import page
from edge_lora.timeseries.series import Series
from edge_lora.timeseries.windows import Floats, Parts

MOST_COLUMNS, WINDOWS = 8, 3  # shown
IMAGES = (".png", ".svg", ".pdf")
LAST_DATE = 2.5e11  # seconds since 1970: the year 9892
_GRID = 6  # columns of the image: 1, 2 or 3 windows, and two curves
COLOURS = ("#c8472f", "#2f6fb5", "#4f9a4f", "#8a5fb0", "#b08a2f", "#5f8f8f", "#888888")


@dataclass(frozen=True, eq=False)
class Example:
    """One test window of one column, in the file's unit.

    Attributes:
        column: Its name.
        times: (past + horizon,) datetime64[s], or row numbers where the file's times are no dates.
        past: The last rows that the forecast saw.
        truth: (horizon,) what followed.
        forecasts: Name -> (horizon,); the first is the adapter's.
    """

    column: str
    times: NDArray[Any]
    past: Floats
    truth: Floats
    forecasts: Mapping[str, Floats]


@dataclass(frozen=True, eq=False)
class Picture:
    """All that a plot shows.

    Attributes:
        title: What was forecast.
        caption: What it took, and how good it is.
        examples: One list of windows per column.
        errors: Forecast -> errors on scaled data; the first is the adapter's.
        step: Seconds between rows.
    """

    title: str
    caption: str
    examples: Sequence[Sequence[Example]]
    errors: Mapping[str, Errors]
    step: float


def picture(
    series: Series,
    parts: Parts,
    base: Forecaster,
    results: Sequence[Result],
    season: int,
    source: str,
) -> Picture:
    """Forecast a few test windows of every column with the first of ``results`` and its rivals.

    Args:
        series: As it was read.
        parts: Cut from it.
        base: Of the first result, whose adapter it wears for a moment.
        results: As they were compared; the seasonal rule and the no-base line are drawn too.
        season: Of the seasonal rule, in rows.
        source: What the series is called.
    """
    ours = results[0]
    assert ours.adapter is not None
    window, horizon = parts.test.window, parts.test.horizon
    seasonal = f"seasonal ({season})"
    line = next((r.adapter for r in results if r.name == NO_BASE), None)
    with ExitStack() as stack:
        predict = {ours.name: stack.enter_context(wearing(base, ours.adapter))}
        predict[seasonal] = rules.seasonal(horizon, season)
        if line is not None:
            plain = LinearForecaster(window, horizon)
            predict[NO_BASE] = stack.enter_context(wearing(plain, line))
        examples = [
            _examples(series, parts, column, predict)
            for column in range(min(len(series.columns), MOST_COLUMNS))
        ]
    hidden = len(series.columns) - len(examples)
    return Picture(
        f"{source}: {horizon} rows ahead from {window}",
        f"Adapter {ours.adapter_bytes:,} bytes, base {ours.base_bytes:,} bytes. Test MSE "
        f"{ours.errors.mse:.4f}, MAE {ours.errors.mae:.4f} on scaled data, "
        f"{ours.errors.windows:,} windows." + (f" {hidden} more columns." if hidden else ""),
        examples,
        {result.name: result.errors for result in results},
        series.step,
    )


def check_plots(paths: Sequence[Path]) -> None:
    """Raise UnsupportedError for a plot that cannot be written: before the work, not after it."""
    for path in paths:
        if path.suffix not in (*IMAGES, ".html"):
            known = ", ".join((*IMAGES, ".html"))
            raise UnsupportedError(f"'{path}': unknown ending of a plot; known: {known}")
    if any(path.suffix in IMAGES for path in paths):
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(
                "images need matplotlib; a .html does not. "
                "Install it with: pip install 'edge-lora[plot]'"
            ) from error


def save_plot(found: Picture, path: Path) -> Path:
    """Write an image or a page, by the file's ending."""
    check_plots([path])
    if path.suffix == ".html":
        path.write_text(page(found), encoding="utf-8")
        return path
    return _save_image(found, path)


def save_errors(results: Sequence[Result], path: Path) -> Path:
    """Write the errors of every forecast and step as CSV: forecast, step, mse, mae."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("forecast", "step", "mse", "mae"))
        for result in results:
            errors = zip(result.errors.mse_by_step, result.errors.mae_by_step, strict=True)
            writer.writerows(
                (result.name, i + 1, float(mse), float(mae)) for i, (mse, mae) in enumerate(errors)
            )
    return path


def _examples(
    series: Series, parts: Parts, column: int, predict: Mapping[str, Predict]
) -> list[Example]:
    test = parts.test
    shown = min(test.window, test.horizon)
    starts = np.unique(np.linspace(0, test.starts - 1, WINDOWS + 2)[1:-1].astype(np.int64))
    x, y = test.take(starts * test.values.shape[1] + column)
    forecasts = {name: one(x) for name, one in predict.items()}
    mean, scale = parts.mean[column], parts.scale[column]
    return [
        Example(
            series.columns[column],
            _times(series, test.first + start + test.window - shown, shown + test.horizon),
            x[i, -shown:] * scale + mean,
            y[i] * scale + mean,
            {name: values[i] * scale + mean for name, values in forecasts.items()},
        )
        for i, start in enumerate(starts.tolist())
    ]


def _times(series: Series, first: int, count: int) -> NDArray[Any]:
    rows = first + np.arange(count)
    seconds = series.start + rows * series.step
    if np.abs(seconds).max() > LAST_DATE:
        return rows
    return np.array(np.rint(seconds).astype(np.int64), "datetime64[s]")


def _save_image(found: Picture, path: Path) -> Path:
    from matplotlib.figure import Figure

    rows, windows = len(found.examples), len(found.examples[0])
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(found.errors)}
    figure: Any = Figure(figsize=(13, 1.9 * rows + 4.6), layout="constrained")
    grid = figure.add_gridspec(rows + 1, _GRID, height_ratios=[1.9] * rows + [2.8])
    width = _GRID // windows
    for row, examples in enumerate(found.examples):
        for i, example in enumerate(examples):
            axes = figure.add_subplot(grid[row, i * width : (i + 1) * width])
            truth = _draw_example(axes, example, colours)
            if i == 0:
                axes.set_ylabel(_plain(example.column))
    curves: list[Any] = []
    for half, kind in enumerate(("mse", "mae")):
        axes = figure.add_subplot(grid[rows, half * _GRID // 2 : (half + 1) * _GRID // 2])
        curves = _draw_errors(axes, found.errors, kind, colours)
    figure.suptitle(f"{_plain(found.title)}\n{_plain(found.caption)}", fontsize=11)
    handles = [truth, *curves]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _draw_example(axes: Any, example: Example, colours: Mapping[str, str]) -> Any:  # noqa: ANN401
    """Draw one window; returns the line of the truth."""
    ahead = example.times[-len(example.truth) :]
    values = np.concatenate([example.past, example.truth])
    (truth,) = axes.plot(example.times, values, color="black", linewidth=1, label="truth")
    for i, (name, forecast) in reversed(list(enumerate(example.forecasts.items()))):
        axes.plot(ahead, forecast, color=colours[name], linewidth=1.0 if i else 2.0)
    axes.axvline(ahead[0], color="gray", linewidth=0.7, linestyle=":")
    axes.margins(x=0)
    axes.tick_params(labelsize=8)
    if np.issubdtype(example.times.dtype, np.datetime64):
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator(maxticks=6)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.xaxis.get_offset_text().set_size(8)
    return truth


def _draw_errors(
    axes: Any,  # noqa: ANN401
    errors: Mapping[str, Errors],
    kind: str,
    colours: Mapping[str, str],
) -> list[Any]:
    """Draw the errors by step; returns the lines in the order of ``errors``."""
    lines = []
    for i, (name, one) in enumerate(errors.items()):
        values = one.mse_by_step if kind == "mse" else one.mae_by_step
        lines += axes.plot(
            np.arange(1, len(values) + 1),
            values,
            color=colours[name],
            linewidth=1.0 if i else 2.0,
            label=_plain(name),
            marker="o" if len(values) == 1 else None,
            zorder=2 if i else 3,
        )
    axes.set_xlabel("rows ahead")
    axes.set_ylabel(f"test {kind.upper()}, scaled data")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    return lines


def _plain(text: str) -> str:
    """Return text that matplotlib takes as it stands, not as a formula."""
    return text.replace("$", r"\$")
