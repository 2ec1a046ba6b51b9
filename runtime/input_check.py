"""Do a call's inputs fit the graph?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import TensorSpec
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.runtime.engines import Arrays

NO_BOUNDS: Mapping[str, int] = {}


def check_inputs(
    inputs: Arrays,
    specs: Mapping[str, TensorSpec],
    largest: Mapping[str, int] = NO_BOUNDS,
    *,
    partial: bool = False,
) -> None:
    """Raise UnsupportedError that lists every input that is unknown, missing or unfit.

    Args:
        inputs: Name -> array.
        specs: The graph's required inputs.
        largest: Name of a symbolic size -> the most that the engine takes.
        partial: Whether others may follow, so that missing ones are no error.
    """
    if inputs.keys() == specs.keys() and all(
        _fits(inputs[name], specs[name], largest) for name in inputs
    ):
        return  # the usual case, within two microseconds
    missing = [] if partial else [name for name in specs if name not in inputs]
    problems = [f"input {name!r} is missing" for name in missing]
    for name, array in inputs.items():
        spec = specs.get(name)
        if spec is None:
            problems.append(f"no such input {name!r}; known: {', '.join(specs)}")
        elif _dtype_name(array.dtype) != spec.dtype:
            problems.append(f"input {name!r} is {array.dtype}, must be {spec.dtype}")
        elif not _fits(array, spec, NO_BOUNDS):
            problems.append(f"input {name!r} is {array.shape}, must be {spec.shape}")
        else:
            problems += [
                f"input {name!r} is {array.shape}: {size} may be at most {largest[size]}"
                for size, found in zip(spec.shape, array.shape, strict=True)
                if isinstance(size, str) and found > largest.get(size, found)
            ]
    if problems:
        raise UnsupportedError(list_all("these inputs do not fit the graph", problems))


def _fits(array: NDArray[np.generic], spec: TensorSpec, largest: Mapping[str, int]) -> bool:
    if len(array.shape) != len(spec.shape) or _dtype_name(array.dtype) != spec.dtype:
        return False
    for want, found in zip(spec.shape, array.shape, strict=True):
        if isinstance(want, str):
            if want in largest and found > largest[want]:
                return False
        elif want != found:
            return False
    return True


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype[np.generic]) -> str:
    """Return ``dtype.name``, which NumPy puts together anew each time it is asked."""
    return dtype.name if dtype.isnative else dtype.str
