"""Slots whose values an engine must not know while it loads the graph.

ONNX Runtime drops a ``Mul`` by 1 and an ``Add`` of 0, and turns a vector around to be rid of a
transposition: a change of such a weight then reaches none of its readers, or some. And equal
matrices may share one packed block, slots or not, or have blocks that cannot be told apart. Nothing
of this happens to an initializer that is a graph input as well, since callers may replace it at any
run (https://github.com/onnx/onnx/blob/main/docs/IR.md#graphs). It costs a matrix its packing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from edge_lora.export.onnx_passes import SlotPass
from edge_lora.slots import Slot

_PRODUCTS = {"MatMul", "Gemm"}


class HideValues(SlotPass):
    """Make the weights of slots optional inputs, whose values are the defaults."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the inputs behind all others."""
        values = [model.graph.initializers[slot.name] for slot in self.slots]
        model.graph.inputs.extend(values)
        return ir.passes.PassResult(model, modified=bool(values))


def slots_to_hide(
    graph: ir.Graph,
    chosen: Iterable[Slot],
    table: Iterable[Slot],
    weights: Mapping[str, Tensor],
) -> list[Slot]:
    """Return those of ``chosen`` that an engine could fold, or mistake for another weight.

    Args:
        graph: Finished.
        chosen: The bundle's slots.
        table: All slots of the model.
        weights: The values of those in ``table`` that are not of kind "other".
    """
    present = [slot for slot in table if slot.name in graph.initializers]
    twins = Counter(slot.sha256 for slot in present)
    named = {slot.name: weights[slot.name].numpy() for slot in present if slot.kind != "other"}
    strangers = _matrices_beside(graph, named)
    uniform = Counter(_uniform_value(weight) for weight in [*named.values(), *strangers])

    def is_alike(slot: Slot) -> bool:
        weight = named[slot.name]
        value = _uniform_value(weight)
        return (
            twins[slot.sha256] > 1
            or (value is not None and uniform[value] > 1)
            or any(_are_equal(weight, other) for other in strangers)
        )

    return [
        slot
        for slot in chosen
        if slot.dtype == "F32"
        and (slot.kind == "other" or (_is_factor(graph, slot) and is_alike(slot)))
    ]


def _matrices_beside(graph: ir.Graph, names: Collection[str]) -> list[np.ndarray]:
    """Return the values of matrices that are none of ``names``."""
    return [
        value.const_value.numpy()
        for name, value in graph.initializers.items()
        if name not in names and value.const_value is not None and len(value.const_value.shape) == 2
    ]


def _are_equal(weight: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(weight, other) or np.array_equal(weight, other.T)


def _is_factor(graph: ir.Graph, slot: Slot) -> bool:
    return {node.op_type for node, _ in graph.initializers[slot.name].uses()} <= _PRODUCTS


def _uniform_value(weight: np.ndarray) -> float | None:
    """Return the value that all of a matrix has, so that its block looks like others; or None."""
    if not weight.size:  # as of a slot without rows
        return None
    first = weight.flat[0]
    is_uniform = weight.flat[-1] == first and bool((weight == first).all())
    return float(first) if is_uniform else None
