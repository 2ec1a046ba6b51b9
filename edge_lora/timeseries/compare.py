"""An adapter beside what it must beat, on the same windows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_lora import reference
from edge_lora.adapter import Adapter
from edge_lora.errors import UnknownNameError, UnsupportedError, list_all
from edge_lora.methods.attached import Attached
from edge_lora.methods.base_slots import find_others, find_weights
from edge_lora.timeseries import baselines as rules
from edge_lora.timeseries.bases import LinearForecaster, make_base, portable_name
from edge_lora.timeseries.forecaster import Forecaster
from edge_lora.timeseries.metrics import Errors, Predict, measure
from edge_lora.timeseries.rivals import RIVALS, train_rival
from edge_lora.timeseries.training import Recipe, fit, predictor, require_device
from edge_lora.timeseries.windows import Floats, Parts, Windows
from edge_lora.training import TrainReport

NO_BASE = "no base: low-rank linear"
FRACAST = "fracast"
COMPARISONS = (*RIVALS, FRACAST)
"""What can stand beside an adapter on request."""
NO_EFFECT = 1e-7  # of an adapter, on scaled data
FEW_WINDOWS = 256  # of fracast on a CPU, where one takes a good part of a second


@dataclass(frozen=True, eq=False)
class Result:
    """One row of the comparison.

    Attributes:
        name: Of what forecast.
        values: Numbers that were fitted.
        errors: On the test windows.
        fit: Curves, if it was trained.
        adapter: What was trained, if that is an adapter.
        base_bytes: Of the frozen weights in memory, fp32.
        adapter_bytes: Of what was fitted: the adapter's file, or fp32 weights.
    """

    name: str
    values: int
    errors: Errors
    fit: TrainReport | None = None
    adapter: Adapter | None = None
    base_bytes: int = 0
    adapter_bytes: int = 0


def trained(
    base: Forecaster, base_name: str, parts: Parts, recipe: Recipe, name: str, dtype: str = "F16"
) -> tuple[Adapter, Result]:
    """Train an adapter on ``base`` and measure what is stored; the base is clean again afterwards.

    Args:
        base: Its weights are not changed.
        base_name: What ``make_base`` knows it by.
        parts: Windows of its window and horizon.
        recipe: How to train.
        name: Of the adapter.
        dtype: Of the stored values.

    Raises:
        UnsupportedError: From ``fit``, or if no forecast is any different with the adapter.
    """
    some, _ = parts.validation.take(parts.validation.spread(FEW_WINDOWS))
    before = predictor(base)(some)
    attached, curves = fit(base, parts, recipe)
    values = attached.parameter_count
    adapter = lowered(attached, base, base_name, recipe, name, dtype)
    attached.detach()
    title = f"adapter ({recipe.method} on {portable_name(base_name)})"
    try:
        with wearing(base, adapter) as predict:
            _require_effect(before, predict(some), title)
            errors = measure(predict, parts.test)
    finally:
        base.cpu()
    sizes = bytes_of(base), file_bytes(adapter)
    return adapter, Result(title, values, errors, curves, adapter, *sizes)


def _require_effect(before: Floats, after: Floats, title: str) -> None:
    if np.allclose(after, before, rtol=0, atol=NO_EFFECT):
        raise UnsupportedError(
            f"training changed nothing: every forecast of the {title} is that of the base. "
            "Does the series ever change? If so, take another method or learning rate"
        )


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of all weights of a model in fp32."""
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def file_bytes(adapter: Adapter) -> int:
    """Return the bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        return adapter.save(Path(folder) / "adapter.safetensors").stat().st_size


def lowered(
    attached: Attached,
    base: Forecaster,
    base_name: str,
    recipe: Recipe,
    name: str,
    dtype: str = "F16",
) -> Adapter:
    """Return what was trained on ``base``, with its description in the provenance."""
    adapter = attached.lower(name, dtype)
    about = {
        "task": "forecast",
        "base": portable_name(base_name),
        "window": base.window,
        "horizon": base.horizon,
        "epochs": recipe.epochs,
        "lr": base.lr if recipe.lr is None else recipe.lr,
        "batch_size": recipe.batch_size or base.batch_size,
        "seed": recipe.seed,
        "device": recipe.device,
        "affine": bool(base.affine_slots),
    }
    return replace(
        adapter,
        base=replace(adapter.base, id=base.id),
        provenance={**adapter.provenance, "training": about},
    )


@contextmanager
def wearing(base: Forecaster, adapter: Adapter) -> Iterator[Predict]:
    """Put the adapter into the weights of ``base`` in the block; they come back after it."""
    weights = {**find_weights(base), **find_others(base)}
    kept = {name: weights[name].tensor.clone() for name in adapter.deltas}
    try:
        for name, delta in adapter.deltas.items():
            terms = [(form, adapter.alpha) for form in delta.forms]
            merged = reference.apply(kept[name].cpu().numpy(), terms)  # type: ignore[arg-type]
            weights[name].tensor.copy_(torch.from_numpy(merged))
        yield predictor(base)
    finally:
        for name, weight in kept.items():
            weights[name].tensor.copy_(weight)


def measure_adapter(base: Forecaster, adapter: Adapter, windows: Windows) -> Errors:
    """Return the errors of ``base`` with the adapter in its weights, which come back afterwards."""
    with wearing(base, adapter) as predict:
        return measure(predict, windows)


def baselines(parts: Parts, season: int, recipe: Recipe, with_no_base: bool) -> list[Result]:
    """Measure rules without parameters, the full linear map and, if asked, the no-base line.

    The no-base line is this project's default adapter on the ``linear`` base.
    """
    window, horizon = parts.train.window, parts.train.horizon
    full, values = rules.linear(parts)
    found = [
        Result("last value", 0, measure(rules.last_value(horizon), parts.test)),
        Result(f"seasonal ({season})", 0, measure(rules.seasonal(horizon, season), parts.test)),
        Result("full linear", values, measure(full, parts.test), adapter_bytes=4 * values),
    ]
    if with_no_base:
        plain = Recipe(epochs=recipe.epochs, seed=recipe.seed)
        _, line = trained(LinearForecaster(window, horizon), "linear", parts, plain, "no-base")
        found.append(replace(line, name=NO_BASE))
    return found


def check_comparisons(names: Sequence[str], window: int, horizon: int) -> None:
    """Refuse what cannot be compared with, before anything is trained.

    Raises:
        UnknownNameError: Names that are no comparison; lists the known ones.
        UnsupportedError: A window that is too short for one of them.
        EngineUnavailableError: A package that is not installed.
    """
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        raise UnknownNameError(
            f"nothing to compare with: {', '.join(unknown)}. Known: {', '.join(COMPARISONS)}"
        )
    short = [
        f"{name} needs a window of at least {RIVALS[name].least_window} rows, not {window}"
        for name in dict.fromkeys(names)
        if name in RIVALS and window < RIVALS[name].least_window
    ]
    if short:
        raise UnsupportedError(list_all("cannot compare", short))
    if FRACAST in names:
        make_base(FRACAST, window, horizon)


def comparisons(
    names: Sequence[str], parts: Parts, seed: int, device: str, epochs: int | None = None
) -> list[Result]:
    """Train and measure what is named, among ``COMPARISONS``; fracast is only measured.

    Args:
        names: Each counts once.
        parts: Windows.
        seed: Of whatever is trained.
        device: "cpu" or "cuda".
        epochs: Of whatever is trained; None for its own. Learning rates are its own.

    Raises:
        EdgeLoraError: See ``check_comparisons``.
    """
    check_comparisons(names, parts.test.window, parts.test.horizon)
    return [
        _fracast(parts, device) if name == FRACAST else _rival(name, parts, seed, device, epochs)
        for name in dict.fromkeys(names)
    ]


def _rival(name: str, parts: Parts, seed: int, device: str, epochs: int | None) -> Result:
    model, curves = train_rival(name, parts, seed, device, epochs)
    errors = measure(predictor(model), parts.test)
    size = bytes_of(model)
    return Result(name, size // 4, errors, curves, adapter_bytes=size)


def _fracast(parts: Parts, device: str) -> Result:
    """Measure fracast as it is; on a CPU on some windows only, and the name says so."""
    base = make_base("fracast", parts.test.window, parts.test.horizon)
    base.to(require_device(device))
    some = parts.test.spread(FEW_WINDOWS) if device == "cpu" else None
    errors = measure(predictor(base), parts.test, some)
    part = "" if errors.windows == len(parts.test) else f", {errors.windows} of the windows"
    return Result(f"fracast, untrained{part}", 0, errors, base_bytes=bytes_of(base))


def verdict(results: Sequence[Result]) -> str:
    """Say plainly what beats the first of ``results``; the no-base line comes first.

    Results on some of the windows only are left out: other windows may be easier.
    """
    ours = results[0]
    others = [r for r in results[1:] if r.errors.windows == ours.errors.windows]
    better = sorted((r for r in others if r.errors.mse <= ours.errors.mse), key=_mse)
    line = next((r for r in others if r.name == NO_BASE), None)
    if line is not None and line in better:
        return (
            f"The base does not help: without any base, a low-rank linear map of {line.values:,} "
            f"values reaches test MSE {line.errors.mse:.4f}, this adapter of {ours.values:,} "
            f"values {ours.errors.mse:.4f}."
        )
    if better:
        told = ", ".join(f"{r.name} ({r.errors.mse:.4f}, {r.values:,} values)" for r in better)
        return f"Test MSE {ours.errors.mse:.4f} with {ours.values:,} values. Not beaten: {told}."
    return f"Test MSE {ours.errors.mse:.4f} with {ours.values:,} values, the best of the table."


def _mse(result: Result) -> float:
    return result.errors.mse
