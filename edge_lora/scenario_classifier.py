"""Which condition does a window come from? Some features of it, and a tiny network, in NumPy.

Features of one window (n rows), z being the window without its mean and spread:

* ``z`` folded at the season and averaged over all whole seasons: the shape of a season, which
  turns with the time of day at which the window ends;
* the last season of ``z``: what is different just now;
* the mean of ``z`` over each whole season, counted back from the end: the course over days;
* mean and log spread in the window's own unit, slope of ``z``, and its correlation with itself one
  season earlier.

The first three are averaged down to at most 48 numbers each. They are standardised by the training
windows and clipped, then go through one hidden layer of rectified units, or none, into a softmax.

Columns that are judged together share a condition, so their log-probabilities are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_lora.atomic import replacing
from edge_lora.errors import BundleError, list_all

Floats = NDArray[np.float32]
MOST_BINS = 48  # of each part
MOST_ROWS = 1 << 16  # of a window
MOST_BYTES = 4 << 20  # of a classifier's file
CLIP = 5.0  # standard deviations
_EPSILON = 1e-5  # of the spread, as the forecasters normalise


@dataclass(frozen=True)
class WindowFeatures:
    """What a classifier looks at; see the module.

    Attributes:
        window: Rows of a window.
        season: Rows of a season; one longer than the window counts as long as it.
    """

    KIND: ClassVar[str] = "season"
    window: int
    season: int

    @property
    def count(self) -> int:
        """How many features a window has."""
        season = min(self.season, self.window)
        bins = min(season, MOST_BINS)
        return 2 * bins + min(self.window // season, MOST_BINS) + 4

    def of(self, windows: NDArray[np.floating]) -> Floats:
        """Return the features (n, count) of windows (n, window)."""
        x = np.asarray(windows, np.float64)
        season = min(self.season, self.window)
        mean = x.mean(1, keepdims=True)
        centred = x - mean
        spread = np.sqrt((centred * centred).mean(1, keepdims=True) + _EPSILON)
        z = centred / spread
        seasons = self.window // season
        folded = z[:, -seasons * season :].reshape(len(z), seasons, season)
        ramp = np.linspace(-1.0, 1.0, self.window)
        slope = z @ ramp / self.window
        again = (z[:, season:] * z[:, :-season]).sum(1) / self.window
        parts = [
            _averaged(folded.mean(1)),
            _averaged(z[:, -season:]),
            _averaged(folded.mean(2)),
            mean,
            np.log(spread),
            slope[:, None],
            again[:, None],
        ]
        return np.concatenate(parts, 1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Classifier:
    """A small network from features to conditions.

    Attributes:
        features: What it looks at.
        mean: (count,) of the training windows' features.
        scale: (count,) their standard deviation, above 0.
        layers: One or two pairs of weight (in, out) and bias (out,).
    """

    features: WindowFeatures
    mean: Floats
    scale: Floats
    layers: tuple[tuple[Floats, Floats], ...]

    def standardised(self, features: Floats) -> Floats:
        """Return what the first layer sees of features (n, count)."""
        clipped: Floats = np.clip((features - self.mean) / self.scale, -CLIP, CLIP)
        return clipped

    def log_probabilities(self, windows: NDArray[np.floating]) -> Floats:
        """Return (n, conditions) for windows (n, window); NaN for one that is not finite."""
        hidden = self.standardised(self.features.of(windows))
        *first, (weight, bias) = self.layers
        for w, b in first:
            hidden = np.maximum(hidden @ w + b, 0)
        scores = hidden @ weight + bias
        scores = scores - scores.max(1, keepdims=True)
        logs: Floats = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return logs

    def probabilities(self, x: NDArray[np.floating]) -> Floats:
        """Return (batch, conditions) for ``x`` (batch, window) or (batch, window, channels).

        NaN for a window that is not finite, or has no channels.
        """
        channels = x[:, :, None] if x.ndim == 2 else x
        batch, rows, count = channels.shape
        windows = channels.transpose(0, 2, 1).reshape(batch * count, rows)
        with np.errstate(all="ignore"):  # what is not finite comes out as NaN
            logs = self.log_probabilities(windows)
            logs = logs.reshape(batch, count, logs.shape[1]).sum(1) / np.float32(count)
            powers = np.exp(logs - logs.max(1, keepdims=True))
            found: Floats = powers / powers.sum(1, keepdims=True)
        return found


def write_classifier(classifier: Classifier, path: Path) -> Path:
    """Write the arrays to one safetensors file, atomically."""
    from safetensors.numpy import save

    with replacing(path) as part:
        part.write_bytes(save({k: np.ascontiguousarray(v) for k, v in _arrays(classifier).items()}))
    return path


def read_classifier(path: Path, features: WindowFeatures, conditions: int) -> Classifier:
    """Read the arrays of a classifier.

    Raises:
        BundleError: If it is no such file, or does not fit the features and conditions; lists all.
    """
    from safetensors.numpy import load

    if path.stat().st_size > MOST_BYTES:
        raise BundleError(f"{path.name} has over {MOST_BYTES} bytes")
    try:
        found = load(path.read_bytes())
    except Exception as error:  # of a type of its own
        raise BundleError(f"{path.name} is not a safetensors file: {error}") from error
    problems = _problems(found, features.count, conditions)
    if problems:
        raise BundleError(list_all(f"{path.name} is no classifier of this set", problems))
    depth = len(found) // 2 - 1
    return Classifier(
        features,
        found["mean"],
        found["scale"],
        tuple((found[f"weight{i}"], found[f"bias{i}"]) for i in range(depth)),
    )


def _arrays(classifier: Classifier) -> dict[str, Floats]:
    arrays = {"mean": classifier.mean, "scale": classifier.scale}
    for i, (weight, bias) in enumerate(classifier.layers):
        arrays |= {f"weight{i}": weight, f"bias{i}": bias}
    return arrays


def _problems(found: dict[str, NDArray[np.float32]], count: int, conditions: int) -> list[str]:
    """Say what keeps arrays from being a classifier of so many features and conditions."""
    hidden = found["bias0"].shape[-1:] if "bias1" in found and "bias0" in found else ()
    sizes = [count, *hidden, conditions]
    wanted: dict[str, tuple[int, ...]] = {"mean": (count,), "scale": (count,)}
    for i, (inner, outer) in enumerate(pairwise(sizes)):
        wanted |= {f"weight{i}": (inner, outer), f"bias{i}": (outer,)}
    problems = [f"tensor {name!a:.60} is unknown" for name in sorted(found.keys() - wanted.keys())]
    for name, shape in wanted.items():
        array = found.get(name)
        if array is None:
            problems.append(f"tensor {name!r} is missing")
        elif array.dtype != np.float32 or array.shape != shape:
            problems.append(f"{name} is {array.dtype} {array.shape}, must be float32 {shape}")
        elif not np.isfinite(array).all():
            problems.append(f"{name} has values that are not finite")
        elif name == "scale" and not (array > np.float32(0)).all():
            problems.append("scale has values that are not above 0")
    return problems


def _averaged(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (n, at most MOST_BINS): means of runs of nearly equal length."""
    size = values.shape[1]
    if size <= MOST_BINS:
        return values
    edges = np.linspace(0, size, MOST_BINS + 1).astype(np.int64)
    sums: NDArray[np.float64] = np.add.reduceat(values, edges[:-1], 1) / np.diff(edges)
    return sums
