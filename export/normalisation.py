"""Graph pass: one fused node for most steps of a normalisation over the window.

    m = ReduceMean(x);  d = x - m;  spread = Sqrt(ReduceMean(d * d) + epsilon);  y = d / spread

Networks that normalise each window write this out, and mostly need mean and spread again at their
end. ``LayerNormalization`` gives y, the mean and 1 / spread in one pass over memory. It works on
the last axis only, so others are moved there; the engine pushes such moves past what follows.

Engines may take the spread as the mean of squares less the square of the mean, which is noise, or
NaN, for values far from zero (air pressure in Pa). So the window's first value is taken out before
and given back to the mean: of n values none is further than sqrt(n) spreads from their mean, which
leaves n roundings at worst, and it costs far less than a mean of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from edge_lora.export.onnx_passes import SlotPass


@dataclass(frozen=True, eq=False)
class _Found:
    """One written-out normalisation of ``rank`` axes, over the one of ``size`` at ``axis``."""

    x: ir.Value
    mean: ir.Value
    spread: ir.Value
    y: ir.Value
    rank: int
    axis: int
    size: int
    epsilon: float


class FuseNormalisation(SlotPass):
    """Replace every written-out normalisation over one axis of fixed size."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse all of them."""
        matches = [found for node in model.graph if (found := _match(node)) is not None]
        for found in matches:
            _fuse(model.graph, found)
        if matches:
            common_passes.RemoveUnusedNodesPass()(model)
            RewritePass([rules.transpose_transpose_rule, rules.no_op_transpose_rule])(model)
            common_passes.IdentityEliminationPass()(model)
            common_passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(matches))


def _match(node: ir.Node) -> _Found | None:
    """Return what ``node`` is the last step of, or None."""
    centred, spread = _inputs(node, "Div")
    x, mean = _inputs(_producer(centred), "Sub")
    variance, epsilon = _inputs(_producer(_inputs(_producer(spread), "Sqrt", 1)[0]), "Add")
    squares, axes = _inputs(_producer(variance), "ReduceMean")
    mean_of, mean_axes = _inputs(_producer(mean), "ReduceMean")
    if x is None or mean is None or spread is None or x.shape is None:
        return None
    axis, small = _number(mean_axes), _number(epsilon, len(x.shape))
    if (
        axis is None
        or small is None
        or _number(axes) != axis
        or mean_of is not x
        or _inputs(_producer(squares), "Mul") != (centred, centred)
        or not all(_keeps_dims(value) for value in (mean, variance))
        or any(value.is_graph_output() for value in (mean, spread, node.outputs[0]))
    ):
        return None
    axis = int(axis) % len(x.shape)
    size = x.shape[axis]
    if x.dtype != ir.DataType.FLOAT or not isinstance(size, int):
        return None
    return _Found(x, mean, spread, node.outputs[0], len(x.shape), axis, size, small)


def _inputs(
    node: ir.Node | None, operator: str, count: int = 2
) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the ``count`` inputs of a node that is an ``operator``; else None for each."""
    if node is None or node.op_type != operator or len(node.inputs) != count:
        return None, None
    return node.inputs[0], node.inputs[count - 1]


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _number(value: ir.Value | None, most_axes: int = 1) -> float | None:
    """Return the one number that a constant of at most so many axes holds."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or len(tensor.shape) > most_axes:
        return None
    return float(tensor.numpy().item())


def _keeps_dims(value: ir.Value | None) -> bool:
    node = _producer(value)
    attribute = None if node is None else node.attributes.get("keepdims")
    return attribute is None or attribute.as_int() == 1


def _fuse(graph: ir.Graph, found: _Found) -> None:
    """Put the fused node and its moves where the mean was taken."""
    order = list(range(found.rank))
    order[found.axis], order[-1] = order[-1], order[found.axis]
    ones = _constant(graph, f"ones_{found.size}", np.ones(found.size, np.float32))
    zero = _constant(graph, "first", np.zeros(1, np.int64))
    moved = ir.node("Transpose", [found.x], {"perm": order})
    first = ir.node("Gather", [moved.outputs[0], zero], {"axis": found.rank - 1})
    near = ir.node("Sub", [moved.outputs[0], first.outputs[0]])
    fused = ir.node(
        "LayerNormalization",
        [near.outputs[0], ones],
        {"axis": -1, "epsilon": found.epsilon},
        num_outputs=3,
    )
    spread = ir.node("Reciprocal", [fused.outputs[2]])
    mean = ir.node("Add", [fused.outputs[1], first.outputs[0]])
    results = (fused.outputs[0], mean.outputs[0], spread.outputs[0])
    back = [ir.node("Transpose", [value], {"perm": order}) for value in results]
    start = found.mean.producer()
    assert start is not None
    nodes = [moved, first, near, fused, spread, mean, *back]
    for node in nodes:
        node.metadata_props.update(start.metadata_props)
    graph.insert_before(start, nodes)
    for old, node in zip((found.y, found.mean, found.spread), back, strict=True):
        new = node.outputs[0]
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)


def _constant(
    graph: ir.Graph, name: str, array: NDArray[np.float32] | NDArray[np.int64]
) -> ir.Value:
    """Add a constant to the graph, under a name of its own that begins with ``name``."""
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.initializers.add(value)
    return value
