"""From a planned torch module to a raw ONNX graph whose weights keep their torch names."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch

from edge_lora.errors import UnsupportedError
from edge_lora.export.plan import Plan
from edge_lora.export.site_markers import TRANSLATIONS

OPSET = 20  # LayerNormalization (17) and everything else we need; in ONNX Runtime since 1.17
_NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "onnxscript.optimizer")


def translate(plan: Plan) -> ir.Model:
    """Trace ``plan.module`` and return the unoptimised graph with its inputs and outputs named.

    Raises:
        UnsupportedError: If torch cannot trace the module or has no ONNX form of an operator.
    """
    try:
        with quiet(), torch.no_grad(), plan.while_tracing():
            program = torch.onnx.export(
                plan.module,
                kwargs=dict(plan.example),
                dynamic_shapes=dict(plan.dynamic_shapes),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                custom_translation_table=TRANSLATIONS,
            )
    except Exception as error:
        raise UnsupportedError(
            f"{_name(plan)} cannot be exported to ONNX: {_first_cause(error)}\n"
            "Make forward traceable by torch.export (no control flow that depends on values), "
            "or export a part of it"
        ) from error
    assert program is not None
    model = program.model
    _name_ends(plan, model.graph)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the tracer and translator print, warn and log: none of it is for users."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _name(plan: Plan) -> str:
    return type(getattr(plan.module, "base", plan.module)).__name__


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _name_ends(plan: Plan, graph: ir.Graph) -> None:
    for kind, values, names in (
        ("inputs", graph.inputs, plan.input_names),
        ("outputs", graph.outputs, plan.output_names),
    ):
        if len(values) != len(names):
            raise UnsupportedError(
                f"{_name(plan)} has {len(names)} {kind} in torch, but its graph has {len(values)}: "
                f"{[v.name for v in values]}. Leave out unused or repeated {kind}"
            )
    taken = {*plan.input_names, *plan.output_names}
    for node in graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_"
    for value, name in zip(graph.inputs, plan.input_names, strict=True):
        value.name = name
    seen: set[ir.Value] = set()
    for index, (value, name) in enumerate(zip(graph.outputs, plan.output_names, strict=True)):
        if value in seen or value.is_graph_input() or value.is_initializer():
            node = ir.node("Identity", [value], name=f"{name}/Identity")
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = value = node.outputs[0]
        value.name = name
        seen.add(value)
