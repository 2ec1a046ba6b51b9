"""Is what an engine computes what torch computes?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.export.plan import Case, Plan, flatten, run_module

# Largest relative error that is still the same model: rounding of fp32 through 30 layers is about
# 1e-5; a wrong mask or a lost scale is above 1e-2. One rounding is 2**-11 in fp16, 2**-8 in bf16.
TOLERANCE = {"F32": 1e-3, "F16": 1e-2, "BF16": 5e-2}

Outputs = Mapping[str, np.ndarray]


def largest_error(
    plan: Plan, engine: str, tolerance: float, run: Callable[[Case], Outputs]
) -> float:
    """Run an engine and torch on all of the plan's cases; return the largest error.

    The error of one output is relative: max|engine - torch| / max|torch|.

    Args:
        plan: What was exported.
        engine: Readable name of the engine.
        tolerance: Largest error that is no mistake.
        run: Returns the engine's outputs by name.

    Raises:
        UnsupportedError: If the engine cannot run a case, or an output differs by more than
            ``tolerance``; lists every such output.
    """
    worst, problems = 0.0, []
    for case in plan.cases:
        told = _told(plan, case)
        try:
            found = run(case)
        except Exception as error:
            raise UnsupportedError(
                f"{engine} cannot run the exported graph on {told}: {error}"
            ) from error
        expected = run_module(plan, case)
        for name in plan.output_names:
            value = relative_error(found[name], expected[name].numpy())
            worst = max(worst, value)
            if not value <= tolerance:
                problems.append(f"output {name!r} on {told}: relative error {value:.3g}")
    if problems:
        title = f"the exported graph in {engine} differs from torch by more than {tolerance:g}"
        raise UnsupportedError(list_all(title, problems))
    return worst


def _told(plan: Plan, case: Case) -> str:
    shapes = {n: tuple(x.shape) for n, x in zip(plan.input_names, flatten(case), strict=True)}
    return ", ".join(f"{n} {s}" for n, s in list(shapes.items())[:4])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return max|found - expected| / max|expected|; infinite if shapes differ or a NaN appears.

    >>> relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    0.5
    """
    if found.shape != expected.shape:
        return float("inf")
    if not found.size:
        return 0.0
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    a, b = a[np.isfinite(b)], b[np.isfinite(b)]
    scale = np.abs(b).max(initial=0.0)
    return float(np.abs(a - b).max(initial=0.0) / (scale or 1.0))
