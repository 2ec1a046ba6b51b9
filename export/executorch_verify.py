"""Is the finished ExecuTorch program what torch computes?"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch

from edge_lora.bundle_program import ProgramWeights
from edge_lora.errors import UnsupportedError
from edge_lora.export.executorch_quiet import native_log, quiet
from edge_lora.export.parity import TOLERANCE, largest_error
from edge_lora.export.plan import Case, Plan, flatten

with quiet(), native_log():
    from executorch.runtime import Runtime

# In 8 bits, a last bit of difference may move a code; a wrong scale is over 1.
PROGRAM_TOLERANCE = {"fp32": TOLERANCE["F32"], "int8-dynamic": 0.1}


def verify_program(
    pte: bytes,
    plan: Plan,
    order: tuple[str, ...],
    weights: ProgramWeights,
    rounding: Callable[[], AbstractContextManager[None]],
) -> float:
    """Run the program and the torch module on all of the plan's cases.

    Args:
        pte: The program's file.
        plan: What was exported. A case continues from the state that the one before it left.
        order: The program's inputs by position.
        weights: How it holds its weights; sets the tolerance.
        rounding: Makes the context in which the module rounds as the program does.

    Returns:
        The largest error against the module in fp32, which is what rounding costs and not checked.

    Raises:
        UnsupportedError: If ExecuTorch cannot load or run the program, or an output differs by more
            than the tolerance; lists every such output.
    """
    with native_log() as log:
        try:
            # The method reads from the program's memory, which must outlive it.
            program = Runtime.get().load_program(pte)
            method = program.load_method("forward")
        except Exception as error:
            failure: Exception | None = error
        else:
            failure = None
    if failure is not None or method is None:
        raise UnsupportedError(
            f"ExecuTorch cannot load the exported program: {failure}. {' '.join(log[-3:])}"
        ) from failure

    def run(case: Case) -> dict[str, np.ndarray]:
        feeds = dict(zip(plan.input_names, flatten(case), strict=True))
        with native_log():
            found = method.execute([feeds[name].contiguous() for name in order])
        arrays = [x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in found]
        return dict(zip(plan.output_names, arrays, strict=True))

    with rounding():
        distance = largest_error(plan, "ExecuTorch", PROGRAM_TOLERANCE[weights], run)
    return distance if weights == "fp32" else largest_error(plan, "ExecuTorch", math.inf, run)
