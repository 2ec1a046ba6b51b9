"""Train a scenario set: one adapter per condition, and the classifier that picks one per window.

First one adapter learns from all windows. Then each condition's adapter goes on from there with
that condition's windows alone, more gently; so does, for a fair comparison, the one adapter with
all windows.
Where validation does not like a condition's own adapter better than the one for all, the set names
the one for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.adapter import Adapter
from edge_lora.scenarios import write_scenarios
from edge_lora.timeseries.compare import bytes_of, lowered, measure_adapter
from edge_lora.timeseries.condition_classifier import Picks, pick, train_classifier
from edge_lora.timeseries.conditions import Conditions, only, require_windows
from edge_lora.timeseries.forecaster import Forecaster
from edge_lora.timeseries.metrics import Errors, measure
from edge_lora.timeseries.training import Recipe, go_on, predictor, put_on
from edge_lora.timeseries.windows import Parts, Windows

SHARED = "adapter-all.safetensors"
SECOND_RATE = 0.3
"""Of the first round's learning rate: a tenth moved a condition too little, the whole rate forgot
what other conditions' windows had taught (both tried, on ETTh1 by hour and on two made-up modes).
"""


@dataclass(frozen=True, eq=False)
class ConditionRow:
    """The test windows of one condition.

    Attributes:
        name: Of the condition.
        windows: How many; without any, nothing else is known.
        is_own: Whether it has an adapter of its own.
        picked: Share of them that the classifier took for it.
        one: Errors with the one adapter for all conditions.
        oracle: Errors with the condition's adapter.
    """

    name: str
    windows: int
    is_own: bool
    picked: float | None = None
    one: Errors | None = None
    oracle: Errors | None = None


@dataclass(frozen=True, eq=False)
class ScenarioReport:
    """What a set is worth on the test windows.

    Attributes:
        none: Errors of the base alone.
        one: Of one adapter for all conditions, trained as long.
        oracle: Of the adapters of the true conditions.
        chosen: Of the adapters that the classifier picks, by all columns together.
        accuracy: Share of windows whose condition it picks, by all columns together.
        accuracy_alone: The same, by each column alone.
        commonest: What always naming the set's default, the commonest in training, would reach.
        values: Numbers trained for one adapter.
        one_bytes: File of one adapter.
        set_bytes: All files of the set.
        base_bytes: Of the base, fp32.
        rows: By condition.
    """

    none: Errors
    one: Errors
    oracle: Errors
    chosen: Errors
    accuracy: float
    accuracy_alone: float
    commonest: float
    values: int
    one_bytes: int
    set_bytes: int
    base_bytes: int
    rows: tuple[ConditionRow, ...]


@dataclass(frozen=True, eq=False)
class _Trained:
    one: Adapter
    own: dict[int, Adapter]  # condition -> its adapter, where validation likes that better
    values: int


def train_scenarios(
    base: Forecaster,
    base_name: str,
    parts: Parts,
    conditions: Conditions,
    season: int,
    recipe: Recipe,
    folder: Path,
) -> ScenarioReport:
    """Train a set, write it into a folder, and measure it.

    Args:
        base: Its weights are not changed.
        base_name: What ``make_base`` knows it by.
        parts: Windows of its window and horizon.
        conditions: Of the same series.
        season: In rows; the classifier folds windows at it.
        recipe: How to train every adapter: twice as many epochs in all.
        folder: An existing folder, written whole.

    Raises:
        SeriesError: Conditions with too few windows, all named.
    """
    require_windows(conditions, parts)
    found = _train_adapters(base, base_name, parts, conditions, recipe)
    classifier = train_classifier(parts, conditions, season, recipe.seed)
    files = []
    for i, name in enumerate(conditions.names):
        adapter = found.own.get(i, found.one)
        files.append((name, f"adapter-{i:02}.safetensors" if i in found.own else SHARED))
        adapter.save(folder / files[-1][1])
    counts = np.bincount(conditions.of(parts.train), minlength=len(conditions.names))
    default = conditions.names[int(counts.argmax())]
    manifest = write_scenarios(
        folder, files, classifier, (base.id, found.one.base.fingerprint), default
    )
    names = {manifest.name, "classifier.safetensors", *(file for _, file in files)}
    picks = pick(classifier, parts, parts.test)
    report = _measured(base, found, parts.test, conditions, picks, int(counts.argmax()))
    return replace(
        report,
        set_bytes=sum((folder / name).stat().st_size for name in names),
        one_bytes=min((folder / file).stat().st_size for _, file in files),
        base_bytes=bytes_of(base),
    )


def verdict(report: ScenarioReport) -> str:
    """Say plainly whether the set beats one adapter for all conditions."""
    one, oracle, chosen = report.one.mse, report.oracle.mse, report.chosen.mse
    if chosen < one:
        return (
            f"The set helps: test MSE {chosen:.4f} with the classifier's choice, {one:.4f} with "
            f"one adapter for all conditions ({1 - chosen / one:.1%} lower); "
            f"the true conditions give {oracle:.4f}."
        )
    why = "its adapters are no better even where they belong"
    if not any(row.is_own for row in report.rows):
        why = "validation likes no condition's own adapter better, so all share the one"
    elif oracle < one:
        why = f"its adapters would reach {oracle:.4f}, but the classifier picks too badly"
    return (
        f"The set does not help: one adapter for all conditions reaches test MSE {one:.4f} in "
        f"{report.one_bytes:,} bytes, the set {chosen:.4f} in {report.set_bytes:,} bytes: {why}."
    )


def _train_adapters(
    base: Forecaster, base_name: str, parts: Parts, conditions: Conditions, recipe: Recipe
) -> _Trained:
    attached = put_on(base, parts, recipe)
    try:
        go_on(attached, base, parts, recipe)
        start = attached.state_dict()
        rate = SECOND_RATE * (base.lr if recipe.lr is None else recipe.lr)
        recipe = replace(recipe, lr=rate)
        go_on(attached, base, parts, recipe)
        one = attached.state_dict()
        one_adapter = lowered(attached, base, base_name, recipe, "all")
        own = {}
        for i, name in enumerate(conditions.names):
            train, validation = (
                only(part, np.flatnonzero(conditions.of(part) == i))
                for part in (parts.train, parts.validation)
            )
            attached.load_state_dict(one)
            before = measure(predictor(base), validation).mse
            attached.load_state_dict(start)
            go_on(attached, base, replace(parts, train=train, validation=validation), recipe)
            if measure(predictor(base), validation).mse < before:
                own[i] = lowered(attached, base, base_name, recipe, name)
        return _Trained(one_adapter, own, attached.parameter_count)
    finally:
        attached.detach()
        base.cpu()


def _measured(
    base: Forecaster,
    found: _Trained,
    test: Windows,
    conditions: Conditions,
    picks: Picks,
    default: int,
) -> ScenarioReport:
    true = conditions.of(test)
    one = {i: _errors(base, found.one, test, true == i) for i in range(len(conditions.names))}
    oracle, chosen, rows = [], [], []
    for i, name in enumerate(conditions.names):
        adapter, own = found.own.get(i, found.one), true == i
        oracle.append(_errors(base, adapter, test, own) if i in found.own else one[i])
        chosen.append(_errors(base, adapter, test, picks.together == i))
        right = float((picks.together[own] == i).mean()) if own.any() else None
        count = int(own.sum())
        rows.append(ConditionRow(name, count, i in found.own, right, one[i], oracle[-1]))
    return ScenarioReport(
        none=measure(predictor(base), test),
        one=_together(list(one.values())),
        oracle=_together(oracle),
        chosen=_together(chosen),
        accuracy=float((picks.together == true).mean()),
        accuracy_alone=float((picks.alone == true).mean()),
        commonest=float((true == default).mean()),
        values=found.values,
        one_bytes=0,
        set_bytes=0,
        base_bytes=0,
        rows=tuple(rows),
    )


def _errors(
    base: Forecaster, adapter: Adapter, windows: Windows, chosen: NDArray[np.bool_]
) -> Errors | None:
    which = np.flatnonzero(chosen)
    return measure_adapter(base, adapter, only(windows, which)) if which.size else None


def _together(parts: Sequence[Errors | None]) -> Errors:
    """Return the errors over the windows of several parts."""
    known = [part for part in parts if part is not None]
    count = sum(part.windows for part in known)
    squared = sum(part.mse_by_step * part.windows for part in known) / count
    absolute = sum(part.mae_by_step * part.windows for part in known) / count
    return Errors(np.asarray(squared), np.asarray(absolute), count)
