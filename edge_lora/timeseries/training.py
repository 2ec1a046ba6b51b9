"""Train a forecasting adapter on a base; keep the epoch that validation likes best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.methods import attach, find_weights, get_method
from edge_lora.methods.attached import Attached, slot_seed
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.branches import SideBranches
from edge_lora.slots import match_names
from edge_lora.timeseries.affine import with_affine
from edge_lora.timeseries.forecaster import Forecaster
from edge_lora.timeseries.metrics import Predict
from edge_lora.timeseries.windows import Floats, Parts, Windows
from edge_lora.training import TrainReport, train
from edge_lora.training.options import run_options

VALIDATION = 16  # times the batch size at most; no gradient is kept
Batch = dict[str, Tensor]
DEFAULTS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 16, "alpha": 16.0},
    "lora": {"rank": 16, "alpha": 64.0},
    "bilora": {"rank": 16, "scale": 4.0, "bits": 4, "group": 64},
}
"""Settings of methods that were tried here; others start from their own."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        method: See ``edge_lora.methods.list_methods``.
        settings: Its options; None for those that suit the base.
        epochs: Passes over all training windows; the rate decays to 0 over all of them.
        lr: Peak learning rate of AdamW; None for the base's own.
        weight_decay: Its decay.
        batch_size: Windows of a step; None for the base's own.
        seed: Of init and order.
        device: "cpu" or "cuda"; the base is moved there and back.
    """

    method: str = "rslora"
    settings: dict[str, Any] | None = None
    epochs: int = 10
    lr: float | None = None
    weight_decay: float = 0.0
    batch_size: int | None = None
    seed: int = 0
    device: str = "cpu"


class Shuffled:
    """The training windows in another order each epoch, as the training loop wants them."""

    def __init__(self, windows: Windows, size: int, seed: int) -> None:
        self.size = size
        self._windows, self._seed = windows, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of that epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._windows) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._windows))
        for first in range(0, len(order), self.size):
            yield _batch(*self._windows.take(order[first : first + self.size]))


def settings_for(base: Forecaster, method: str) -> dict[str, Any]:
    """Return the options of ``method`` that suit ``base``."""
    tried = DEFAULTS.get(method)
    if tried is None:
        return {}
    known = {field.name for field in fields(get_method(method).config_class)}
    return {key: value for key, value in {**tried, **base.settings}.items() if key in known}


def fit(base: Forecaster, parts: Parts, recipe: Recipe) -> tuple[Attached, TrainReport]:
    """Train an adapter on ``base`` in place.

    Args:
        base: From ``edge_lora.timeseries.bases``; its weights are not changed, but moved to the
            recipe's device.
        parts: Windows of the base's window and horizon.
        recipe: How.

    Returns:
        The model with the best epoch's adapter on, and the curves.

    Raises:
        UnsupportedError: A method that does not change weights, or cannot change those of this
            base, or a device that is not there.
    """
    attached = put_on(base, parts, recipe)
    return attached, go_on(attached, base, parts, recipe)


def put_on(base: Forecaster, parts: Parts, recipe: Recipe) -> Attached:
    """Return ``base`` with an untrained adapter on; see ``fit``."""
    if "site" in get_method(recipe.method).kinds:
        raise UnsupportedError(
            f"method {recipe.method!r} stands beside modules; a forecast changes weights. "
            "Use lora, rslora, bilora …"
        )
    if recipe.method == "dora":
        _require_lengths(base)
    base.to(require_device(recipe.device))
    settings = settings_for(base, recipe.method) if recipe.settings is None else recipe.settings
    options = run_options(recipe.method, recipe.seed, _batches(base, parts, recipe), recipe.device)
    attached = attach(base, recipe.method, base.slots, **{**options, **settings})
    _start(attached, base.nonzero_start, recipe.seed)
    return with_affine(attached, base) if base.affine_slots else attached


def _require_lengths(base: Forecaster) -> None:
    """Refuse weights with a row (of a table, a column) of zeros: DoRA keeps its length, which is 0.

    Raises:
        UnsupportedError: Names them.
    """
    weights = find_weights(base)
    zero = [
        f"{name}: {count} of length 0"
        for name in match_names(base.slots, list(weights))
        if (count := _count_zeros(weights[name]))
    ]
    if zero:
        title = f"method 'dora' scales rows, and on base {base.id!r} these are zero and stay so"
        raise UnsupportedError(f"{list_all(title, zero)}\nUse rslora, lora or bilora")


def _count_zeros(weight: SlotWeight) -> int:
    matrix = weight.matrix.t() if weight.kind == "embedding" else weight.matrix
    return int((matrix == 0).all(1).sum())


def go_on(attached: Attached, base: Forecaster, parts: Parts, recipe: Recipe) -> TrainReport:
    """Train from where the adapter is; it ends with the epoch that validation likes best."""
    lr = base.lr if recipe.lr is None else recipe.lr
    batches = _batches(base, parts, recipe)
    report = train_forecast(attached, batches, parts.validation, replace(recipe, lr=lr))
    base.eval()
    return report


def _batches(base: Forecaster, parts: Parts, recipe: Recipe) -> Shuffled:
    return Shuffled(parts.train, recipe.batch_size or base.batch_size, recipe.seed)


def train_forecast(
    attached: Attached, batches: Shuffled, validation: Windows, recipe: Recipe
) -> TrainReport:
    """Train what ``attached`` has attached, by mean squared error; the best epoch stays.

    Args:
        attached: On the recipe's device.
        batches: Training windows.
        validation: Windows to choose the epoch by.
        recipe: How; its learning rate is not None.
    """
    assert recipe.lr is not None
    return train(
        attached,
        batches,
        steps=recipe.epochs * len(batches),
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        schedule="cosine",
        loss=_loss,
        validation=_even_batches(validation, VALIDATION * batches.size),
        validate_every=len(batches),
        seed=recipe.seed,
        cpu=recipe.device == "cpu",
    )


def require_device(device: str) -> str:
    """Return ``device`` if it is there.

    Raises:
        UnsupportedError: If it is not, or is none that forecasts are trained on.
    """
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        there = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise UnsupportedError(f"no device {device!r} here. There is: {there}")
    return device


def pick_device(device: str | None) -> str:
    """Return ``device``, or without one cuda where there is one; see ``require_device``."""
    return require_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _start(attached: Attached, slots: Sequence[str], seed: int) -> None:
    """Give low-rank branches of absent layers a first value, of the spread of ``nn.Linear``'s."""
    if not isinstance(attached.trained, SideBranches):
        return
    for branch in attached.trained.each():
        if branch.name in slots:
            generator = torch.Generator().manual_seed(slot_seed(seed, f"{branch.name} b"))
            spread = 1 / (abs(branch.scale) * math.sqrt(branch.b.shape[1]))
            with torch.no_grad():
                branch.b.copy_(torch.randn(branch.b.shape, generator=generator) * spread)


def predictor(model: nn.Module) -> Predict:
    """Return ``model`` as a function of windows of one channel, on the device where it is."""
    device = next(model.parameters()).device
    most = VALIDATION * getattr(model, "batch_size", Forecaster.batch_size)

    def predict(x: Floats) -> Floats:
        batches = torch.split(torch.from_numpy(x)[:, :, None], most)
        with torch.no_grad():
            y: Floats = torch.cat([model(b.to(device))[:, :, 0].cpu() for b in batches]).numpy()
        return y

    return predict


def _batch(x: Floats, y: Floats) -> Batch:
    return {"x": torch.from_numpy(x)[:, :, None], "y": torch.from_numpy(y)[:, :, None]}


def _even_batches(windows: Windows, most: int) -> list[Batch]:
    """Return batches equal to within one window, so that their mean is the error."""
    count = -(-len(windows) // most)
    return [
        _batch(*windows.take(which)) for which in np.array_split(np.arange(len(windows)), count)
    ]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])
