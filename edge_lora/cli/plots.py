"""``--plot`` and ``--errors`` of a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_lora.cli.output import report, require_file_place

if TYPE_CHECKING:
    from edge_lora.timeseries.compare import Result
    from edge_lora.timeseries.forecaster import Forecaster
    from edge_lora.timeseries.series import Series
    from edge_lora.timeseries.windows import Parts

plot_option = click.option(
    "--plot",
    "plots",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Draw forecasts beside the truth: .png, .svg, .pdf or .html. May be given again.",
)
errors_option = click.option(
    "--errors", type=click.Path(path_type=Path), help="Write the errors of every step as CSV."
)


def require_plots(plots: Sequence[Path], errors: Path | None, condition: str | None) -> None:
    """Refuse what cannot be written: before the work, not after it."""
    wanted = [*plots, *([errors] if errors else [])]
    if wanted and condition is not None:
        raise click.UsageError("--plot and --errors show one adapter; --condition trains several")
    for path in wanted:
        require_file_place(path)
    if plots:
        from edge_lora.timeseries.plots import check_plots

        check_plots(plots)


def draw(
    plots: Sequence[Path],
    errors: Path | None,
    series: Series,
    parts: Parts,
    base: Forecaster,
    results: Sequence[Result],
    season: int,
    source: str,
) -> None:
    """Write what was asked for."""
    from edge_lora.timeseries.plots import picture, save_errors, save_plot

    if errors is not None:
        report(f"errors: {save_errors(results, errors)}")
    if plots:
        found = picture(series, parts, base, results, season, source)
        for path in plots:
            report(f"plot: {save_plot(found, path)}")
