"""Train the classifier of a scenario set on the windows of a series, in the file's own units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_lora.scenario_classifier import Classifier, Floats, WindowFeatures
from edge_lora.timeseries.conditions import Conditions
from edge_lora.timeseries.windows import Parts, Windows

HIDDEN = (0, 32)
"""Widths tried; 0 is a plain softmax."""
MOST_TRAINING, MOST_VALIDATION = 16_384, 8_192  # windows looked at, drawn at random
STEPS, CHECK_EVERY = 300, 10  # of full batches
LEARNING_RATE, DECAY = 1e-2, 1e-3
_ROWS = 1024  # judged at once


@dataclass(frozen=True, eq=False)
class Picks:
    """What a classifier made of all windows of a part.

    Attributes:
        together: (windows,) conditions, by all columns together, as a session judges a batch.
        alone: (windows,) conditions, by each column alone.
    """

    together: NDArray[np.int64]
    alone: NDArray[np.int64]


def train_classifier(parts: Parts, conditions: Conditions, season: int, seed: int) -> Classifier:
    """Train one network of each width; validation picks the width and when to stop."""
    features = WindowFeatures(parts.train.window, season)
    rng = np.random.default_rng(seed)
    x, y = _sample(parts, parts.train, conditions, MOST_TRAINING, features, rng)
    mean, scale = x.mean(0), x.std(0) + np.float32(1e-6)
    blank = Classifier(features, mean, scale, ())
    train = torch.from_numpy(blank.standardised(x)), torch.from_numpy(y)
    x, y = _sample(parts, parts.validation, conditions, MOST_VALIDATION, features, rng)
    validation = torch.from_numpy(blank.standardised(x)), torch.from_numpy(y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trained = [_fit(train, validation, width, len(conditions.names)) for width in HIDDEN]
    _, layers = min(trained, key=lambda found: found[0])
    return Classifier(features, mean, scale, layers)


def pick(classifier: Classifier, parts: Parts, windows: Windows) -> Picks:
    """Judge every window of a part."""
    channels = windows.values.shape[1]
    together, alone = [], []
    for first in range(0, windows.starts, _ROWS):
        count = min(_ROWS, windows.starts - first)
        which = np.arange(first * channels, (first + count) * channels)
        raw = _raw(parts, windows, which)
        together.append(
            classifier.probabilities(raw.reshape(count, channels, -1).transpose(0, 2, 1)).argmax(1)
        )
        alone.append(classifier.probabilities(raw).argmax(1))
    return Picks(np.repeat(np.concatenate(together), channels), np.concatenate(alone))


def _raw(parts: Parts, windows: Windows, which: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the inputs (n, window) of windows in the unit of their column."""
    x, _ = windows.take(which)
    channel = which % windows.values.shape[1]
    raw: NDArray[np.float64] = (
        x.astype(np.float64) * parts.scale[channel, None] + parts.mean[channel, None]
    )
    return raw


def _sample(
    parts: Parts,
    windows: Windows,
    conditions: Conditions,
    most: int,
    features: WindowFeatures,
    rng: np.random.Generator,
) -> tuple[Floats, NDArray[np.int64]]:
    """Return features and conditions of at most so many windows."""
    count = min(most, len(windows))
    which = np.sort(rng.choice(len(windows), count, replace=False))
    chunks = [_raw(parts, windows, which[i : i + _ROWS]) for i in range(0, count, _ROWS)]
    return np.concatenate([features.of(raw) for raw in chunks]), conditions.of(windows)[which]


def _fit(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], width: int, conditions: int
) -> tuple[float, tuple[tuple[Floats, Floats], ...]]:
    """Return the lowest validation loss, and the layers that reached it."""
    inputs = train[0].shape[1]
    sizes = [(inputs, width), (width, conditions)] if width else [(inputs, conditions)]
    linears = [nn.Linear(*size) for size in sizes]
    network = nn.Sequential(linears[0], *(m for one in linears[1:] for m in (nn.ReLU(), one)))
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=DECAY)
    best, layers = float("inf"), _layers(linears)
    for step in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(train[0]), train[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            with torch.no_grad():
                loss = float(nn.functional.cross_entropy(network(validation[0]), validation[1]))
            if loss < best:
                best, layers = loss, _layers(linears)
    return best, layers


def _layers(linears: list[nn.Linear]) -> tuple[tuple[Floats, Floats], ...]:
    return tuple(
        (one.weight.detach().numpy().T.copy(), one.bias.detach().numpy().copy()) for one in linears
    )
