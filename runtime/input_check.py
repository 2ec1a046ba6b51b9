"""Do a call's inputs fit the graph?"""

from __future__ import annotations

from collections.abc import Mapping

from edge_lora.bundle import TensorSpec
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.runtime.engines import Arrays


def check_inputs(inputs: Arrays, specs: Mapping[str, TensorSpec], *, partial: bool = False) -> None:
    """Raise UnsupportedError that lists every input that is unknown, missing or unfit.

    Args:
        inputs: Name -> array.
        specs: The graph's required inputs.
        partial: Whether others may follow, so that missing ones are no error.
    """
    missing = [] if partial else [name for name in specs if name not in inputs]
    problems = [f"input {name!r} is missing" for name in missing]
    for name, array in inputs.items():
        spec = specs.get(name)
        if spec is None:
            problems.append(f"no such input {name!r}; known: {', '.join(specs)}")
        elif array.dtype.name != spec.dtype:
            problems.append(f"input {name!r} is {array.dtype}, must be {spec.dtype}")
        elif array.ndim != len(spec.shape) or any(
            isinstance(want, int) and want != found
            for want, found in zip(spec.shape, array.shape, strict=True)
        ):
            problems.append(f"input {name!r} is {array.shape}, must be {spec.shape}")
    if problems:
        raise UnsupportedError(list_all("these inputs do not fit the graph", problems))
