"""Forecasting on ETTh1, 96 steps ahead: other models and frozen bases beside the default adapter.

Window 336, standard split, all test windows, best epoch by validation, one training loop for all.
Every row names the device it ran on. Without names, the rows that take minutes on a CPU are
measured; the others want a GPU.

    PYTHONPATH=. python bench/forecast_rivals.py PATH/ETTh1.csv [ROW …] [--device cuda]

A row that is not measured again keeps its figures in ``bench/results/forecast_rivals.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch

from bench.common import RESULTS, report
from edge_lora.runtime.bench.measure import device as processor
from edge_lora.timeseries.bases import make_base
from edge_lora.timeseries.compare import Result, comparisons, trained
from edge_lora.timeseries.series import read_series
from edge_lora.timeseries.training import Recipe
from edge_lora.timeseries.windows import Parts, cut

WINDOW, HORIZON, THREADS = 336, 96, 2
NAME = "forecast_rivals"


@dataclass(frozen=True)
class OnBase:
    """An adapter on a frozen base.

    Attributes:
        base: Its name.
        epochs: Passes over the training windows.
        lr: Peak learning rate; None for the base's own.
        affine: Whether the normalisation is trained too.
    """

    base: str
    epochs: int = 10
    lr: float | None = None
    affine: bool = False


ROWS: dict[str, OnBase | str] = {
    "default adapter, no base": OnBase("linear"),
    "the same, affine": OnBase("linear", affine=True),
    "DLinear": "dlinear",
    "RLinear": "rlinear",
    "PatchTST, small": "patchtst",
    "fracast, untrained": "fracast",
    "fracast, rsLoRA": OnBase("fracast", epochs=1),
    "One-for-All, random GPT-2": OnBase("gpt2-random", epochs=5),
    "One-for-All, random GPT-2, lr 1e-4": OnBase("gpt2-random", epochs=5, lr=1e-4),
    "compact, random GPT-2": OnBase("gpt2-compact", epochs=5),
    "compact, SmolLM2's first 2 layers": OnBase("smollm2:2", epochs=5),
}
QUICK = ("default adapter, no base", "the same, affine", "DLinear", "RLinear")


def measured(row: OnBase | str, parts: Parts, seed: int, device: str) -> Result:
    """Return one row's errors and sizes."""
    if isinstance(row, str):
        return comparisons([row], parts, seed, device)[0]
    base = make_base(row.base, parts.test.window, parts.test.horizon, row.affine)
    recipe = Recipe(epochs=row.epochs, lr=row.lr, seed=seed, device=device)
    return trained(base, row.base, parts, recipe, "etth1")[1]


def record(name: str, result: Result, seed: int, device: str) -> dict[str, Any]:
    """Return a result as a line of the table."""
    fit = result.fit
    where = torch.cuda.get_device_name() if device == "cuda" else str(processor()["processor"])
    return {
        "forecast": name,
        "seed": seed,
        "values": result.values,
        "base_bytes": result.base_bytes,
        "adapter_bytes": result.adapter_bytes,
        "validation_mse": fit.best_validation_loss if fit else None,
        "test_mse": result.errors.mse,
        "test_mae": result.errors.mae,
        "windows": result.errors.windows,
        "epochs": len(fit.validation_losses) if fit else 0,
        "seconds": round(fit.seconds, 1) if fit else 0.0,
        "device": where,
    }


def kept() -> list[dict[str, Any]]:
    """Return the rows of earlier runs."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def main(arguments: list[str]) -> int:
    """Measure the rows that are named, or all, and write the table; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", default=0, type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    torch.set_float32_matmul_precision("high")
    parts = cut(read_series(given.data), WINDOW, HORIZON)
    rows = {(row["forecast"], row["seed"]): row for row in kept()}
    for name in given.rows or QUICK:
        result = measured(ROWS[name], parts, given.seed, given.device)
        rows[name, given.seed] = record(name, result, given.seed, given.device)
        order = [key for name in ROWS for key in sorted(rows) if key[0] == name]
        report(NAME, [rows[key] for key in order], "ETTh1, 96 steps ahead; each row on its device.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
