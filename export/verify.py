"""Is the finished bundle what torch computes?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.export.plan import Case, Plan, flatten, run_module

# Largest relative error that is still the same model: rounding of fp32 through 30 layers is about
# 1e-5; a wrong mask or a lost scale is above 1e-2. One rounding is 2**-11 in fp16, 2**-8 in bf16.
TOLERANCE = {"F32": 1e-3, "F16": 1e-2, "BF16": 5e-2}


def verify_outputs(model_path: Path, plan: Plan, dtype: str) -> float:
    """Run the graph and the torch module on all of the plan's cases; return the largest error.

    The error of one output is relative: max|onnx - torch| / max|torch|.

    Args:
        model_path: The finished ``model.onnx``.
        plan: What was exported.
        dtype: safetensors name of the weights' dtype; sets the tolerance.

    Raises:
        UnsupportedError: If ONNX Runtime cannot load or run the graph, or an output differs by more
            than ``TOLERANCE``; lists every such output.
    """
    try:
        session = ort.InferenceSession(str(model_path), _options(), ["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedError(f"ONNX Runtime cannot load the exported graph: {error}") from error
    worst, problems = 0.0, []
    for case in plan.cases:
        shapes = {n: tuple(x.shape) for n, x in zip(plan.input_names, flatten(case), strict=True)}
        told = ", ".join(f"{n} {s}" for n, s in list(shapes.items())[:4])
        try:
            errors = _compare(session, plan, case)
        except Exception as error:
            raise UnsupportedError(
                f"ONNX Runtime cannot run the exported graph on {told}: {error}"
            ) from error
        for name, value in errors.items():
            worst = max(worst, value)
            if not value <= TOLERANCE[dtype]:
                problems.append(f"output {name!r} on {told}: relative error {value:.3g}")
    if problems:
        title = f"the exported graph differs from torch by more than {TOLERANCE[dtype]:g}"
        raise UnsupportedError(list_all(title, problems))
    return worst


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    return options


def _compare(session: ort.InferenceSession, plan: Plan, case: Case) -> dict[str, float]:
    feeds = {n: x.numpy() for n, x in zip(plan.input_names, flatten(case), strict=True)}
    expected = run_module(plan, case)
    found = session.run(list(plan.output_names), feeds)
    return {
        name: relative_error(array, expected[name].numpy())
        for name, array in zip(plan.output_names, found, strict=True)
    }


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
