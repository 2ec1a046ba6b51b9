"""Slots as optional inputs: a low-rank branch beside every weight, of rank 0 by default."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_lora.export.onnx_passes import SlotPass
from edge_lora.slots import Slot


def lora_input_names(slot: Slot) -> tuple[str, str]:
    """Return the names of a slot's two inputs.

    >>> lora_input_names(Slot("q.weight", (2, 3), "F32", ""))
    ('q.lora_a', 'q.lora_b')
    """
    module = slot.name.removesuffix(".weight")
    return f"{module}.lora_a", f"{module}.lora_b"


class AddSlotInputs(SlotPass):
    """Add ``(x @ a) @ b`` to what reads each slot's weight.

    ``a`` (in, rank) and ``b`` (rank, out) are inputs with default values of rank 0, so that a run
    which does not feed them is the base. Every slot has a rank of its own. Weights read by
    anything but MatMul, Gemm and Gather get no inputs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the inputs and branches."""
        modified = False
        for slot in self.slots:
            value = model.graph.initializers[slot.name]
            readers = _readers(value)
            if (
                slot.kind != "other"
                and readers
                and all(_has_branch(node, source) for node, source in readers)
            ):
                a, b = _add_inputs(model.graph, slot, value)
                for node, _ in readers:
                    _add_branch(model.graph, node, a, b)
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Raise PostconditionError if a weight is lost or a slot has one input of two."""
        super().ensures(model)
        inputs = {value.name for value in model.graph.inputs}
        for slot in self.slots:
            a, b = lora_input_names(slot)
            if (a in inputs) != (b in inputs) or (a in inputs) != (a in model.graph.initializers):
                raise ir.passes.PostconditionError(
                    f"{slot.name}: inputs {a} and {b} are incomplete"
                )


def _readers(weight: ir.Value) -> list[tuple[ir.Node, ir.Value]]:
    """Return what computes with ``weight``, seen through transpositions, and the value it reads."""
    found = []
    for node, _ in weight.uses():
        if node.op_type == "Transpose":
            found += [(reader, node.outputs[0]) for reader, _ in node.outputs[0].uses()]
        else:
            found.append((node, weight))
    return found


def _has_branch(node: ir.Node, source: ir.Value) -> bool:
    """Whether we know how to add a low-rank branch beside ``node``."""
    position = list(node.inputs).index(source)
    if node.op_type == "MatMul":
        return position == 1
    if node.op_type == "Gemm":
        plain = all(node.attributes.get_float(k, 1.0) == 1.0 for k in ("alpha", "beta"))
        return position == 1 and plain and node.attributes.get_int("transA", 0) == 0
    if node.op_type == "Gather":
        return position == 0 and node.attributes.get_int("axis", 0) == 0
    return False


def _add_inputs(graph: ir.Graph, slot: Slot, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    assert weight.const_value is not None
    dtype = weight.const_value.dtype
    out_features, in_features = slot.shape
    a_name, b_name = lora_input_names(slot)
    rank = f"{slot.name.removesuffix('.weight')}.rank"
    pair = []
    for name, shape, empty in (
        (a_name, (in_features, rank), (in_features, 0)),
        (b_name, (rank, out_features), (0, out_features)),
    ):
        value = ir.val(name, dtype, ir.Shape(shape))
        value.const_value = ir.tensor(np.zeros(empty, dtype.numpy()), name=name)
        graph.inputs.append(value)
        graph.initializers.add(value)
        pair.append(value)
    return pair[0], pair[1]


def _add_branch(graph: ir.Graph, node: ir.Node, a: ir.Value, b: ir.Value) -> None:
    """Add the branch to the output y of ``node``.

    MatMul and Gemm: y + (x @ a) @ b. Gather: y + transpose(b)[ids] @ transpose(a).
    """
    name = node.name
    output = node.outputs[0]
    if node.op_type == "Gather":
        ids = node.inputs[1]
        columns = ir.node("Transpose", [b], {"perm": [1, 0]}, name=f"{name}/lora_b")
        down = ir.node("Gather", [columns.outputs[0], ids], {"axis": 0}, name=f"{name}/lora_gather")
        rows = ir.node("Transpose", [a], {"perm": [1, 0]}, name=f"{name}/lora_a")
        nodes, factor = [columns, down, rows], rows.outputs[0]
    else:
        down = ir.node("MatMul", [node.inputs[0], a], name=f"{name}/lora_a")
        nodes, factor = [down], b
    up = ir.node("MatMul", [down.outputs[0], factor], name=f"{name}/lora_b_a")
    total = ir.node("Add", [output, up.outputs[0]], name=f"{name}/lora_add")
    total.outputs[0].shape, total.outputs[0].type = output.shape, output.type
    output.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
    if total.outputs[0].is_graph_output():
        output.name, total.outputs[0].name = f"{output.name}.base", output.name
    graph.insert_after(node, [*nodes, up, total])
