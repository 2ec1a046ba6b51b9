"""From a planned torch module to an ExecuTorch program whose linear layers run in XNNPACK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from edge_lora.bundle import TensorSpec
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.export.executorch_quiet import native_log, quiet
from edge_lora.export.plan import Plan

with quiet(), native_log():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass

LARGEST_TIMES, LARGEST_LEAST = 8, 16
"""A symbolic size may grow to so many times the example's, and at least to so many."""


@dataclass(frozen=True, eq=False)
class Lowered:
    """A finished program.

    Attributes:
        pte: The file's bytes.
        traced: What was lowered.
        read_in_place: Names of the parameters, as ``traced`` calls them, that kernels outside
            XNNPACK read.
        inputs: In the method's order.
        outputs: In the method's order.
        largest: Upper bounds of the symbolic sizes of the plan's inputs, by name.
    """

    pte: bytes
    traced: ExportedProgram
    read_in_place: frozenset[str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    largest: Mapping[str, int]


def lower(plan: Plan, largest: Mapping[str, int]) -> Lowered:
    """Trace and lower ``plan.module``.

    Args:
        plan: What to export; its state, if any, is in the buffers named in ``plan.state``.
        largest: Upper bounds of symbolic sizes, by name; the others have one of the example's size.

    Raises:
        UnsupportedError: If torch cannot trace the module or ExecuTorch cannot lower it.
    """
    name = type(getattr(plan.module, "base", plan.module)).__name__
    try:
        with quiet(), torch.no_grad(), plan.while_tracing():
            traced = trace(plan, largest)
            edge = to_edge_transform_and_lower(
                traced,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            kept = edge.exported_program()
            _require_no_state(kept, plan)
            in_place = {
                kept.graph_signature.inputs_to_parameters[node.name]
                for node in kept.graph.find_nodes(op="placeholder")
                if node.name in kept.graph_signature.inputs_to_parameters and node.users
            }
            program = edge.to_executorch(
                ExecutorchBackendConfig(
                    # The caller's memory is used for inputs and outputs.
                    memory_planning_pass=MemoryPlanningPass(
                        alloc_graph_input=False, alloc_graph_output=False
                    ),
                    # A cache is written where it lies, not copied at every run.
                    run_reinplace_pass=bool(plan.state),
                )
            )
            pte = bytes(program.buffer)
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name} cannot be exported to ExecuTorch: {_first_cause(error)}\n"
            "Make forward traceable by torch.export (no control flow that depends on values), "
            "or export a part of it"
        ) from error
    inputs, outputs = _specs(plan, traced)
    return Lowered(pte, traced, frozenset(in_place), inputs, outputs, _bounds(plan, largest))


def trace(plan: Plan, largest: Mapping[str, int]) -> ExportedProgram:
    """Return ``plan.module`` as torch.export sees it, with an upper bound for every size."""
    bounds = _bounds(plan, largest)
    dims = {name: Dim(name, min=1, max=bound) for name, bound in bounds.items()}
    axes = [{axis: dims[name] for axis, name in given.axes.items()} for given in _givens(plan)]
    shapes = pytree.tree_unflatten(axes, pytree.tree_structure(dict(plan.example)))
    return torch.export.export(
        plan.module,
        (),
        dict(plan.example),
        dynamic_shapes=shapes,
        # Without it, sizes of which torch cannot prove what holds for all are refused.
        prefer_deferred_runtime_asserts_over_guards=bool(plan.state),
    )


def _bounds(plan: Plan, largest: Mapping[str, int]) -> dict[str, int]:
    """Return the upper bound of every symbolic size, by name."""
    sizes = {
        name: given.example.shape[axis]
        for given in reversed(_givens(plan))  # of one name, the first counts
        for axis, name in given.axes.items()
    }
    return {
        name: largest.get(name, max(LARGEST_TIMES * size, LARGEST_LEAST))
        for name, size in sizes.items()
    }


@dataclass(frozen=True, eq=False)
class _Given:
    """One tensor of a plan's example.

    Attributes:
        placeholder: What the tracer calls it: ``list_0``, ``dictionary_key``.
        name: What the graph calls it.
        example: The tensor.
        axes: Axis -> name of its size.
    """

    placeholder: str
    name: str
    example: torch.Tensor
    axes: Mapping[int, str]


def _givens(plan: Plan) -> list[_Given]:
    leaves, _ = pytree.tree_flatten_with_path(dict(plan.example))
    found = []
    for (path, tensor), name in zip(leaves, plan.input_names, strict=True):
        keys = [getattr(key, "idx", getattr(key, "key", None)) for key in path]
        axes: Any = plan.dynamic_shapes
        for key in keys:
            axes = axes[key]
        found.append(_Given("_".join(map(str, keys)), name, tensor, axes))
    return found


def _require_no_state(lowered: ExportedProgram, plan: Plan) -> None:
    """Refuse buffers that forward changes: XNNPACK takes them for constants, silently."""
    signature = lowered.graph_signature
    changed = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}
    if problems := sorted(changed - set(plan.state)):
        raise UnsupportedError(
            list_all("forward changes weights or buffers, which an engine keeps fixed", problems)
        )


def _specs(
    plan: Plan, traced: ExportedProgram
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    nodes = {node.name: node.meta.get("val") for node in traced.graph.nodes}
    names: dict[str, str] = {}
    called = {}
    for given in _givens(plan):
        called[given.placeholder] = given.name
        sizes = nodes[given.placeholder].shape
        names.update({str(sizes[axis]): name for axis, name in given.axes.items()})
    signature = traced.graph_signature
    return tuple(_spec(called[n], nodes[n], names) for n in signature.user_inputs), tuple(
        _spec(name, nodes[node], names)
        for name, node in zip(plan.output_names, signature.user_outputs, strict=True)
    )


def _spec(name: str, value: torch.Tensor, symbols: Mapping[str, str]) -> TensorSpec:
    shape = tuple(
        size if isinstance(size, int) else symbols.get(str(size), str(size)) for size in value.shape
    )
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape)


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
