"""``edge-lora plot``: a forecasting adapter beside the truth; and ``--plot`` of its training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_lora.adapter import Adapter
from edge_lora.cli.output import json_option, print_facts, print_json, report, require_file_place
from edge_lora.cli.series_options import series_options
from edge_lora.errors import UnsupportedError

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


@click.command("plot")
@click.argument("adapter", type=click.Path(path_type=Path))
@series_options
@click.option(
    "--split",
    type=click.Choice(["auto", "ett", "70/10/20"]),
    default="auto",
    show_default=True,
    help="Its test part is drawn.",
)
@click.option("--base", help="Default: the base that the adapter names.")
@click.option("--season", default=24, show_default=True, type=click.IntRange(1), help="In rows.")
@errors_option
@click.option(
    "-o",
    "--out",
    "plots",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="File to write: .png, .svg, .pdf or .html. May be given again.",
)
@json_option
def command(
    adapter: Path,
    data: Path,
    columns: str | None,
    time: str | None,
    fill: int,
    split: Any,
    base: str | None,
    season: int,
    errors: Path | None,
    plots: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Draw what a forecasting ADAPTER makes of the test part of a CSV file.

    \b
    edge-lora plot my.safetensors --data my.csv -o forecast.html -o forecast.png
    """
    require_plots(plots, errors, None)
    loaded = Adapter.load(adapter)
    about = _description(loaded, base)
    from edge_lora.methods import slot_table
    from edge_lora.timeseries.bases import make_base
    from edge_lora.timeseries.compare import Result, baselines, bytes_of, measure_adapter
    from edge_lora.timeseries.series import read_series
    from edge_lora.timeseries.training import Recipe
    from edge_lora.timeseries.windows import cut

    names = [name.strip() for name in columns.split(",")] if columns else []
    series = read_series(data, time, fill, columns=names)
    parts = cut(series, about["window"], about["horizon"], split)
    model = make_base(about["base"], about["window"], about["horizon"], about["affine"])
    slot_table(model, model.id).check(loaded)
    ours = Result(
        f"adapter ({loaded.name})",
        0,
        measure_adapter(model, loaded, parts.test),
        adapter=loaded,
        base_bytes=bytes_of(model),
        adapter_bytes=adapter.stat().st_size,
    )
    results = [ours, *baselines(parts, season, Recipe(), with_no_base=False)]
    draw(plots, errors, series, parts, model, results, season, data.name)
    facts = {
        "plots": [str(path) for path in plots],
        "test": {r.name: {"mse": r.errors.mse, "mae": r.errors.mae} for r in results},
    }
    if as_json:
        print_json(facts)
        return
    print_facts({r.name: f"test MSE {r.errors.mse:.4f}, MAE {r.errors.mae:.4f}" for r in results})


def _description(adapter: Adapter, base: str | None) -> dict[str, Any]:
    """Return what the adapter's file says of its base, or refuse it."""
    told = adapter.provenance.get("training")
    about = {"affine": False, **told} if isinstance(told, dict) else {}
    if base is not None:
        about["base"] = base
    sound = (
        isinstance(about.get("base"), str)
        and all(type(about.get(key)) is int for key in ("window", "horizon"))
        and isinstance(about.get("affine"), bool)
    )
    if about.get("task") != "forecast" or not sound:
        raise UnsupportedError(
            f"adapter {adapter.name!r} does not say that it forecasts, with which window, horizon "
            "and base. Train one with: edge-lora train --task forecast"
        )
    return about
