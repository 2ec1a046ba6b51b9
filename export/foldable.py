"""Slots that an engine would compute with once, when it loads the graph, and never read again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.slots import Slot


def require_read_at_run_time(graph: ir.Graph, slots: Sequence[Slot]) -> None:
    """Raise UnsupportedError for slots that meet nothing but constants somewhere.

    A table of positions that is looked up at fixed places is one: the engine does the lookup while
    it loads, and an adapter on the table would change nothing.
    """
    varying = set(graph.inputs)
    for node in graph:  # in the order of computation
        if not varying.isdisjoint(node.inputs):
            varying.update(node.outputs)
    problems = [
        f"{slot.name}: {node.op_type} {node.name or ''} reads it with constants only"
        for slot in slots
        for node in _readers(graph.initializers[slot.name])
        if varying.isdisjoint(node.inputs)
    ]
    if problems:
        raise UnsupportedError(
            f"{list_all('slots that would be folded away', problems)}\n"
            "Leave them out of slot_names, or make the other operand depend on an input"
        )


def _readers(weight: ir.Value) -> Iterator[ir.Node]:
    """Yield what computes with a weight, seen through transpositions."""
    for node, _ in weight.uses():
        if node.op_type == "Transpose":
            yield from _readers(node.outputs[0])
        else:
            yield node
