"""``edge-lora train --task forecast`` and ``edge-lora export --task forecast``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_lora.cli.output import (
    engines_option,
    human_bytes,
    json_option,
    parse_settings,
    print_facts,
    print_json,
    print_table,
    report,
)
from edge_lora.cli.plot import draw, errors_option, plot_option, require_plots
from edge_lora.cli.scenarios import condition_option, require_out, train_set
from edge_lora.cli.series_options import series_options
from edge_lora.cli.tasks import task_option

if TYPE_CHECKING:
    from edge_lora.timeseries.compare import Result

STEPS_SHOWN = 8
_base_option = click.option(
    "--base",
    default="linear",
    show_default=True,
    help="linear, fracast, smollm2:LAYERS, gpt2-compact or gpt2-random, these two also with "
    ":LAYERSxWIDTH, gpt2-compact:FOLDER or FOLDER of a GPT-2 checkpoint.",
)
_affine_option = click.option(
    "--affine", is_flag=True, help="A gain and a shift in the normalisation, which adapters train."
)
_window_option = click.option(
    "--window", default=336, show_default=True, help="Rows that a forecast sees."
)
_horizon_option = click.option("--horizon", type=int, required=True, help="Rows that it gives.")


@click.command("train")
@task_option("What to train.")
@series_options
@click.option(
    "--split",
    type=click.Choice(["auto", "ett", "70/10/20"]),
    default="auto",
    show_default=True,
    help="ett: 12, 4 and 4 months; auto: that for files with its columns.",
)
@_base_option
@_affine_option
@_window_option
@_horizon_option
@click.option("--method", default="rslora", show_default=True, help="See: edge-lora methods")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the method.")
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1))
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate. Default: the base's."
)
@click.option(
    "--batch-size", type=click.IntRange(1), help="Windows of a step. Default: the base's."
)
@click.option("--season", default=24, show_default=True, type=click.IntRange(1), help="In rows.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="cpu or cuda. Default: cuda where there is one.")
@click.option(
    "--compare",
    help="Train beside it for as many epochs, at rates of their own, separated by commas: dlinear, "
    "rlinear, patchtst; or measure untrained: fracast.",
)
@condition_option
@plot_option
@errors_option
@click.option("--name", help="Name of the adapter. Default: that of the file.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@json_option
def train_command(
    data: Path,
    columns: str | None,
    time: str | None,
    fill: int,
    split: Any,
    base: str,
    affine: bool,
    window: int,
    horizon: int,
    method: str,
    settings: tuple[str, ...],
    epochs: int,
    lr: float | None,
    batch_size: int | None,
    season: int,
    seed: int,
    device: str | None,
    compare: str | None,
    condition: str | None,
    plots: tuple[Path, ...],
    errors: Path | None,
    name: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Train a forecasting adapter on a CSV file, and say what it is worth.

    The last epoch that validation likes best is kept. Test errors are on scaled data, over all
    windows, beside the same windows forecast without any adapter.

    \b
    edge-lora train --task forecast --data my.csv --horizon 96 -o my.safetensors
    edge-lora train --task forecast --data my.csv --horizon 96 -o x.safetensors --fill 3
    """
    config = parse_settings(settings)
    require_out(out, condition)
    require_plots(plots, errors, condition)
    if condition is not None and (compare is not None or name is not None):
        raise click.UsageError(
            "--compare and --name go with one adapter; --condition trains several"
        )
    others, channels = _names("--compare", compare), _names("--columns", columns)
    from edge_lora.timeseries.bases import make_base
    from edge_lora.timeseries.compare import (
        baselines,
        check_comparisons,
        comparisons,
        trained,
        verdict,
    )
    from edge_lora.timeseries.series import read_series
    from edge_lora.timeseries.training import Recipe, pick_device, settings_for
    from edge_lora.timeseries.windows import cut

    check_comparisons(others, window, horizon)
    series = read_series(data, time, fill, condition, channels)
    parts = cut(series, window, horizon, split)
    model = make_base(base, window, horizon, affine)
    recipe = Recipe(
        method=method,
        settings={**settings_for(model, method), **config},
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        device=pick_device(device),
    )
    if condition is not None:
        train_set(model, base, series, parts, condition, season, recipe, out, as_json)
        return
    report(f"training on {len(parts.train):,} windows of {len(series.columns)} channels")
    adapter, ours = trained(model, base, parts, recipe, name or out.stem)
    if series.filled:
        report(f"{series.filled} missing values were filled in")
    source = {"data": data.name, "columns": list(series.columns), "step": series.step}
    about = {**adapter.provenance["training"], **source}
    replace(adapter, provenance={**adapter.provenance, "training": about}).save(out)
    ours = replace(ours, adapter_bytes=out.stat().st_size)
    report("measuring what it must beat")
    results = [
        ours,
        *baselines(parts, season, recipe, with_no_base=base != "linear"),
        *comparisons(others, parts, seed, recipe.device, epochs),
    ]
    draw(plots, errors, series, parts, model, results, season, data.name)
    facts = {
        "adapter": str(out),
        "base": base,
        "method": method,
        "values": ours.values,
        "file_bytes": out.stat().st_size,
        "base_bytes": ours.base_bytes,
        "split": parts.split,
        "test_windows": ours.errors.windows,
        "filled": series.filled,
        "verdict": verdict(results),
    }
    _print(facts, results, as_json)


@click.command("export")
@task_option("What the base is for.")
@_base_option
@_affine_option
@_window_option
@_horizon_option
@engines_option
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@json_option
def export_command(
    base: str,
    affine: bool,
    window: int,
    horizon: int,
    engines: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Export a forecasting base to a bundle, for any number of series and channels.

    Its input x is (batch, window, channels), its output (batch, horizon, channels), in any unit:
    normalisation is inside. ExecuTorch reserves memory for a run: of 64 windows of 16 channels.

    \b
    edge-lora export --task forecast --horizon 96 -o forecast-bundle
    edge-lora export --task forecast --horizon 96 -o forecast-et --engine executorch
    """
    import torch

    from edge_lora.export import export_bundle
    from edge_lora.timeseries.bases import make_base

    model = make_base(base, window, horizon, affine)
    manifest = export_bundle(
        model,
        out,
        example_inputs={"x": torch.randn(8, window, 2, generator=torch.Generator().manual_seed(0))},
        engines=engines,
        dynamic_shapes={"x": {0: "batch", 2: "channels"}},
        slot_names=[*model.slots, *model.affine_slots],
        base_id=model.id,
    )
    facts = {
        "bundle": str(out),
        "base": manifest.base_id,
        "base_fingerprint": manifest.fingerprint,
        "slots": len(manifest.weights),
        **({"largest": dict(manifest.program.largest)} if manifest.program else {}),
        "size": human_bytes(sum(record.size for record in manifest.files.values())),
        "largest_relative_error": dict(manifest.parity),
    }
    print_json(facts) if as_json else print_facts(facts)


def _print(facts: dict[str, Any], results: list[Result], as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "forecast": r.name,
            "values": r.values,
            "base_bytes": r.base_bytes,
            "adapter_bytes": r.adapter_bytes,
            "windows": r.errors.windows,
            "mse": r.errors.mse,
            "mae": r.errors.mae,
        }
        for r in results
    ]
    ours = results[0].errors
    steps = [
        {"step": i + 1, "mse": float(ours.mse_by_step[i]), "mae": float(ours.mae_by_step[i])}
        for i in range(len(ours.mse_by_step))
    ]
    if as_json:
        fit = results[0].fit
        curves = asdict(fit) if fit is not None else None
        print_json({**facts, "test": rows, "by_step": steps, "training": curves})
        return
    shown = {key: value for key, value in facts.items() if key != "verdict"}
    shown["file_bytes"] = human_bytes(facts["file_bytes"])
    shown["base_bytes"] = human_bytes(facts["base_bytes"])
    print_facts({key.replace("_", " "): value for key, value in shown.items()})
    is_part = any(r["windows"] != rows[0]["windows"] for r in rows)
    table = [
        [
            r["forecast"],
            r["values"],
            human_bytes(r["base_bytes"]),
            human_bytes(r["adapter_bytes"]),
            f"{r['mse']:.4f}",
            f"{r['mae']:.4f}",
            *([r["windows"]] if is_part else []),
        ]
        for r in rows
    ]
    heads = ["forecast", "values", "base", "adapter", "test MSE", "test MAE"]
    heads += ["windows"] if is_part else []
    print_table(heads, table, "errors on scaled data; bytes of the base, and of what was fitted")
    stride = max(1, -(-len(steps) // STEPS_SHOWN))
    some = steps[::-stride][::-1]  # the last step is among them
    table = [[s["step"], f"{s['mse']:.4f}", f"{s['mae']:.4f}"] for s in some]
    print_table(["steps ahead", "test MSE", "test MAE"], table, "of the adapter, by step")
    click.echo(facts["verdict"])


def _names(option: str, text: str | None) -> list[str]:
    """Return the names of a list with commas; none without the option."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not all(names):
        raise click.UsageError(f"{option} {text!r} has an empty name; separate names by one comma")
    return names
