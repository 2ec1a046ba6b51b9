"""One small run whose output tells whether weights took effect."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import Manifest, TensorSpec
from edge_lora.runtime.engines import Arrays

_SEED = 20240613
_SIZE = 2  # of every symbolic dimension


def canary_feeds(manifest: Manifest) -> dict[str, NDArray[np.generic]]:
    """Return inputs for the graph: what the exporter stored, and drawn values for the rest."""
    stored = manifest.config.get("canary", {})
    rng = np.random.default_rng(_SEED)
    feeds = {}
    for spec in manifest.inputs:
        if spec.name in stored:
            feeds[spec.name] = np.asarray(stored[spec.name]["values"], spec.dtype).reshape(
                stored[spec.name]["shape"]
            )
        else:
            feeds[spec.name] = _draw(spec, rng)
    return feeds


def _draw(spec: TensorSpec, rng: np.random.Generator) -> NDArray[np.generic]:
    shape = tuple(d if isinstance(d, int) else _SIZE for d in spec.shape)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)


def same(a: Arrays, b: Arrays) -> bool:
    """Whether two runs gave the same outputs, to the bit."""
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def finite(outputs: Mapping[str, NDArray[np.generic]]) -> bool:
    """Whether every floating output is finite."""
    return all(
        np.isfinite(v).all() for v in outputs.values() if np.issubdtype(v.dtype, np.floating)
    )
