"""Train a forecasting adapter on a base; keep the epoch that validation likes best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError
from edge_lora.methods import attach, get_method
from edge_lora.methods.attached import Attached
from edge_lora.timeseries.forecaster import Forecaster
from edge_lora.timeseries.metrics import Predict
from edge_lora.timeseries.windows import Floats, Parts, Windows
from edge_lora.training import TrainReport, train
from edge_lora.training.options import run_options

VALIDATION_BATCH = 4096  # at most; equal to within one window, so that their mean is the error
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
        settings: Its options.
        epochs: Passes over all training windows; the rate decays to 0 over all of them.
        lr: Peak learning rate of AdamW; None for the base's own.
        weight_decay: Its decay.
        batch_size: Windows of a step.
        seed: Of init and order.
    """

    method: str = "rslora"
    settings: dict[str, Any] = field(default_factory=lambda: dict(DEFAULTS["rslora"]))
    epochs: int = 10
    lr: float | None = None
    weight_decay: float = 0.0
    batch_size: int = 256
    seed: int = 0


class _Shuffled:
    """The training windows in another order each epoch, as the training loop wants them."""

    def __init__(self, windows: Windows, size: int, seed: int) -> None:
        self._windows, self._size, self._seed = windows, size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._windows) // self._size)

    def __iter__(self) -> Iterator[Batch]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._windows))
        for first in range(0, len(order), self._size):
            yield _batch(*self._windows.take(order[first : first + self._size]))


def fit(base: Forecaster, parts: Parts, recipe: Recipe) -> tuple[Attached, TrainReport]:
    """Train an adapter on ``base`` in place.

    Args:
        base: From ``edge_lora.timeseries.bases``; its weights are not changed.
        parts: Windows of the base's window and horizon.
        recipe: How.

    Returns:
        The model with the best epoch's adapter on, and the curves.

    Raises:
        UnsupportedError: A method that does not change weights.
    """
    attached = put_on(base, parts, recipe)
    return attached, go_on(attached, base, parts, recipe)


def put_on(base: Forecaster, parts: Parts, recipe: Recipe) -> Attached:
    """Return ``base`` with an untrained adapter on; see ``fit``."""
    batches = _Shuffled(parts.train, recipe.batch_size, recipe.seed)
    options = run_options(recipe.method, recipe.seed, batches)
    if "site" in get_method(recipe.method).kinds:
        raise UnsupportedError(
            f"method {recipe.method!r} stands beside modules; a forecast changes weights. "
            "Use lora, rslora, bilora …"
        )
    return attach(base, recipe.method, base.slots, **{**options, **recipe.settings})


def go_on(attached: Attached, base: Forecaster, parts: Parts, recipe: Recipe) -> TrainReport:
    """Train from where the adapter is; it ends with the epoch that validation likes best."""
    batches = _Shuffled(parts.train, recipe.batch_size, recipe.seed)
    report = train(
        attached,
        batches,
        steps=recipe.epochs * len(batches),
        lr=base.lr if recipe.lr is None else recipe.lr,
        weight_decay=recipe.weight_decay,
        schedule="cosine",
        loss=_loss,
        validation=_even_batches(parts.validation),
        validate_every=len(batches),
        seed=recipe.seed,
        cpu=True,
    )
    base.eval()
    return report


def predictor(model: nn.Module) -> Predict:
    """Return ``model`` as a function of windows of one channel."""

    def predict(x: Floats) -> Floats:
        with torch.no_grad():
            y: Floats = model(torch.from_numpy(x)[:, :, None])[:, :, 0].numpy()
        return y

    return predict


def _batch(x: Floats, y: Floats) -> Batch:
    return {"x": torch.from_numpy(x)[:, :, None], "y": torch.from_numpy(y)[:, :, None]}


def _even_batches(windows: Windows) -> list[Batch]:
    count = -(-len(windows) // VALIDATION_BATCH)
    return [
        _batch(*windows.take(which)) for which in np.array_split(np.arange(len(windows)), count)
    ]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])
