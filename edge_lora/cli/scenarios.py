"""``edge-lora train --task forecast --condition …``: a scenario set instead of one adapter."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_lora.adapter import Adapter
from edge_lora.cli.output import (
    human_bytes,
    print_facts,
    print_json,
    print_table,
    report,
    require_file_place,
    require_place,
)
from edge_lora.errors import BundleError, UnsupportedError, list_all
from edge_lora.scenarios import MANIFEST, read_scenarios

if TYPE_CHECKING:
    from edge_lora.timeseries.forecaster import Forecaster
    from edge_lora.timeseries.scenario_training import ScenarioReport
    from edge_lora.timeseries.series import Series
    from edge_lora.timeseries.training import Recipe
    from edge_lora.timeseries.windows import Parts

condition_option = click.option(
    "--condition",
    metavar="COLUMN|hour|weekday|weekend|month",
    help="Train one adapter per value of a column, or of the clock, and what picks one by the "
    "window alone; OUT is a folder.",
)


def require_out(out: Path, condition: str | None) -> None:
    """Raise UnsupportedError if an adapter, or a set of them, cannot be put at ``out``."""
    if condition is None:
        require_file_place(out)
        return
    require_place(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UnsupportedError(f"'{out}' is there already; give a folder that does not exist yet")


def train_set(
    base: Forecaster,
    base_name: str,
    series: Series,
    parts: Parts,
    condition: str,
    season: int,
    recipe: Recipe,
    out: Path,
    as_json: bool,
) -> None:
    """Train a set, put it at ``out`` in one step, and print what it is worth."""
    from edge_lora.timeseries.conditions import conditions_of
    from edge_lora.timeseries.scenario_training import train_scenarios, verdict

    conditions = conditions_of(series, condition)
    report(f"training on {len(parts.train):,} windows of {len(conditions.names)} conditions")
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        found = train_scenarios(base, base_name, parts, conditions, season, recipe, part)
        part.chmod(0o755)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    facts = {
        "set": str(out),
        "base": base_name,
        "method": recipe.method,
        "condition": condition,
        "adapters": sum(row.is_own for row in found.rows) + any(not r.is_own for r in found.rows),
        "conditions": len(found.rows),
        "values_each": found.values,
        "adapter_bytes": found.one_bytes,
        "set_bytes": found.set_bytes,
        "base_bytes": found.base_bytes,
        "split": parts.split,
        "test_windows": found.one.windows,
        "classifier_accuracy": found.accuracy,
        "classifier_accuracy_one_column": found.accuracy_alone,
        "commonest_condition_accuracy": found.commonest,
        "verdict": verdict(found),
    }
    _print(facts, found, as_json)


def is_set(path: Path) -> bool:
    """Whether ``path`` is the folder of a scenario set, sound or not."""
    return (path / MANIFEST).is_file()


def set_adapters(folder: Path) -> dict[Path, Adapter]:
    """Read and check a set; return its adapters by file."""
    found = read_scenarios(folder)
    files = {folder / condition.adapter.file: condition.name for condition in found.conditions}
    adapters = {path: Adapter.load(path) for path in files}
    problems = [
        f"the adapter of condition {files[path]!r} is of base {adapter.base.fingerprint[:12]}…, "
        f"the set of {found.fingerprint[:12]}…"
        for path, adapter in adapters.items()
        if adapter.base.fingerprint != found.fingerprint
    ]
    if problems:
        raise BundleError(list_all(f"scenario set '{folder}' is of several bases", problems))
    return adapters


def set_facts(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Describe a set, and its conditions one by one."""
    found = read_scenarios(folder)
    files = {condition.adapter.file: condition.adapter.size for condition in found.conditions}
    network = found.classifier
    facts = {
        "kind": "scenario set",
        "base": found.base_id,
        "base_fingerprint": found.fingerprint,
        "conditions": list(found.names),
        "default": found.default,
        "adapters": len(files),
        "input": found.input,
        "window": network.features.window,
        "season": network.features.season,
        "classifier_values": sum(weight.size + bias.size for weight, bias in network.layers),
        "adapter_bytes": sum(files.values()),
    }
    rows = [
        {"condition": c.name, "file": c.adapter.file, "bytes": c.adapter.size}
        for c in found.conditions
    ]
    return facts, rows


def _print(facts: dict[str, Any], found: ScenarioReport, as_json: bool) -> None:
    results = {
        "no adapter": found.none,
        "one adapter for all conditions": found.one,
        "set, true condition": found.oracle,
        "set, classifier's choice": found.chosen,
    }
    if as_json:
        test = [{"forecast": k, "mse": e.mse, "mae": e.mae} for k, e in results.items()]
        print_json({**facts, "test": test, "by_condition": [_row(row) for row in found.rows]})
        return
    shown = {key: value for key, value in facts.items() if key != "verdict"}
    shown |= {key: human_bytes(value) for key, value in facts.items() if key.endswith("_bytes")}
    shown |= {key: f"{value:.1%}" for key, value in facts.items() if "accuracy" in key}
    print_facts({key.replace("_", " "): value for key, value in shown.items()})
    table = [[name, f"{e.mse:.4f}", f"{e.mae:.4f}"] for name, e in results.items()]
    print_table(["forecast", "test MSE", "test MAE"], table, "errors on scaled data")
    heads = ["condition", "windows", "own adapter", "picked", "MSE, one", "MSE, own", "MAE, own"]
    print_table(heads, [_cells(row) for row in map(_row, found.rows)], "by condition")
    click.echo(facts["verdict"])


def _row(row: Any) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(row).items() if key not in ("one", "oracle")}
    for name in ("one", "oracle"):
        errors = getattr(row, name)
        facts[f"mse_{name}"] = errors.mse if errors else None
        facts[f"mae_{name}"] = errors.mae if errors else None
    return facts


def _cells(row: dict[str, Any]) -> list[str]:
    if row["picked"] is None:
        return [row["name"], "0", "yes" if row["is_own"] else "no", *["-"] * 4]
    numbers = [f"{row[key]:.4f}" for key in ("mse_one", "mse_oracle", "mae_oracle")]
    own = "yes" if row["is_own"] else "no"
    return [row["name"], str(row["windows"]), own, f"{row['picked']:.0%}", *numbers]
