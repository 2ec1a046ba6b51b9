"""What to export: the module to trace, its named inputs and outputs, and how to check it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from edge_lora.errors import UnsupportedError

Task = Literal["causal-lm", "generic"]
Case = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything the translation needs to know about one model.

    Attributes:
        task: What the bundle is for.
        module: What is traced; in evaluation mode.
        example: Keyword arguments of ``module.forward``: tensors or lists of tensors.
        dynamic_shapes: Per argument, axis -> dimension name, as ``torch.export`` wants it.
        input_names: Names of the graph's inputs, in the order of the flattened example.
        output_names: Names of the graph's outputs, in the order of the flattened output.
        weight_prefix: What ``module`` puts before the names of the model's parameters.
        cases: Arguments on which the finished graph is compared with ``module``.
        config: What the manifest tells the runtime about the model.
        while_tracing: Makes the context in which ``module`` is traced, but not checked.
        state: Names of the buffers that ``forward`` changes and the next run reads.
        reference: What the finished program is compared with, if not ``module``.
    """

    task: Task
    module: torch.nn.Module
    example: Case
    dynamic_shapes: Mapping[str, Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    weight_prefix: str
    cases: tuple[Case, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    while_tracing: Callable[[], AbstractContextManager[None]] = nullcontext
    state: tuple[str, ...] = ()
    reference: torch.nn.Module | None = None


def flatten(arguments: Case) -> list[torch.Tensor]:
    """Return the tensors of keyword arguments in the order of the graph's inputs."""
    leaves = pytree.tree_leaves(dict(arguments))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def run_module(plan: Plan, arguments: Case) -> dict[str, torch.Tensor]:
    """Run what the engine must agree with; return its outputs by the graph's output names."""
    with torch.no_grad():
        output = (plan.reference or plan.module)(**arguments)
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
    return dict(zip(plan.output_names, leaves, strict=True))


def plan_generic(
    model: torch.nn.Module,
    example_inputs: Mapping[str, torch.Tensor],
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None,
) -> Plan:
    """Plan the export of any module from example inputs.

    Args:
        model: In evaluation mode.
        example_inputs: ``forward``'s argument names -> tensors.
        dynamic_shapes: Argument -> {axis: dimension name}. Default: axis 0 of every input that
            has the first input's size there is ``batch``.

    Raises:
        UnsupportedError: If an input is not a tensor, ``forward`` has no such argument, or the
            model does not run on the example.
    """
    _check_arguments(model, example_inputs)
    shapes = {name: dict((dynamic_shapes or {}).get(name, {})) for name in example_inputs}
    if dynamic_shapes is None:
        shapes = _batch_axes(example_inputs)
    example = {name: _widen(x, shapes[name]) for name, x in example_inputs.items()}
    try:
        with torch.no_grad():
            output = model(**example)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} does not run on the example inputs: {error}"
        ) from error
    canary = {
        name: {"values": x.flatten().tolist(), "shape": list(x.shape)}
        for name, x in example_inputs.items()
        if not x.is_floating_point()
    }
    return Plan(
        task="generic",
        module=model,
        example=example,
        dynamic_shapes=shapes,
        input_names=tuple(example),
        output_names=_output_names(output),
        weight_prefix="",
        cases=(
            dict(example_inputs),
            *([_doubled(example, shapes)] if any(shapes.values()) else []),
        ),
        config={"canary": canary} if canary else {},
    )


def _check_arguments(model: torch.nn.Module, example_inputs: Mapping[str, torch.Tensor]) -> None:
    problems = [
        f"{name} is a {type(x).__name__}, not a tensor"
        for name, x in example_inputs.items()
        if not isinstance(x, torch.Tensor)
    ]
    known = inspect.signature(model.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        problems += [
            f"forward has no argument {name!r}; it has: {', '.join(known)}"
            for name in example_inputs
            if name not in known
        ]
    if not example_inputs:
        problems.append("there are none; give forward's argument names and a tensor for each")
    if problems:
        raise UnsupportedError(f"example_inputs of {type(model).__name__}: {'; '.join(problems)}")


def _batch_axes(example_inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    batch = next((x.shape[0] for x in example_inputs.values() if x.ndim), None)
    return {
        name: {0: "batch"} if x.ndim and x.shape[0] == batch else {}
        for name, x in example_inputs.items()
    }


def _widen(x: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    """Repeat symbolic axes of size 1: the tracer would take a 1 for a constant."""
    for axis in axes:
        if x.shape[axis] == 1:
            x = torch.cat([x, x], dim=axis)
    return x


def _doubled(example: Case, shapes: Mapping[str, Mapping[int, str]]) -> dict[str, torch.Tensor]:
    doubled = dict(example)
    for name, axes in shapes.items():
        for axis in axes:
            doubled[name] = torch.cat([doubled[name], doubled[name]], dim=axis)
    return doubled


def _output_names(output: object) -> tuple[str, ...]:
    """Name outputs by their keys (``logits``, ``states.0``), or ``output_0``, ``output_1``, …."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    names = []
    for path, leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            continue
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        named = path and not parts[0].isdigit()
        names.append(".".join(parts) if named else "_".join(["output", *(parts or ["0"])]))
    if not names:
        raise UnsupportedError(
            f"the model returns {type(output).__name__}, which holds no tensor that can be named; "
            "return a tensor, a tuple or a dictionary of tensors"
        )
    return tuple(names)
