"""Is the finished ONNX graph what torch computes?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge_lora.errors import UnsupportedError
from edge_lora.export.parity import TOLERANCE, largest_error
from edge_lora.export.plan import Case, Plan, flatten


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

    def run(case: Case) -> dict[str, np.ndarray]:
        feeds = {n: x.numpy() for n, x in zip(plan.input_names, flatten(case), strict=True)}
        found = session.run(list(plan.output_names), feeds)
        return dict(zip(plan.output_names, found, strict=True))

    return largest_error(plan, "ONNX Runtime", TOLERANCE[dtype], run)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    return options
