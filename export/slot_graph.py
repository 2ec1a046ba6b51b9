"""Slots as optional inputs: a low-rank branch beside every weight, of rank 0 by default."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from edge_lora.export.onnx_passes import SlotPass
from edge_lora.export.slot_forms import gain_input_name, lora_input_names
from edge_lora.slots import Slot


class AddSlotInputs(SlotPass):
    """Make what reads each slot's weight compute ``gain * (x @ w) + (x @ a) @ b``.

    ``a`` (in, rank) and ``b`` (rank, out) are inputs with default values of rank 0, so that a run
    which does not feed them is the base. Every slot has a rank of its own. Weights read by
    anything but MatMul, Gemm, Gather and Conv (of one group) get no inputs.

    ``gain`` (out,) is there only with ``row_scale`` among the forms, since it costs a node at every
    slot; MatMul and Gemm have it. Its default is 1, and a bias is added after it.
    """

    def __init__(self, slots: Sequence[Slot], forms: Collection[str] = ("low_rank",)) -> None:
        """Add inputs at ``slots`` for ``forms``, of ``SLOT_FORMS``."""
        super().__init__(slots)
        self.forms = forms

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the inputs and branches."""
        modified = False
        for slot in self.slots:
            value = model.graph.initializers[slot.name]
            readers = _readers(value)
            if slot.kind == "other" or not readers:
                continue
            if not all(_has_branch(node, source) for node, source in readers):
                continue
            nodes = [node for node, _ in readers]
            if "low_rank" in self.forms:
                a, b = _add_inputs(model.graph, slot, value)
                for node in nodes:
                    _add_branch(model.graph, node, a, b)
            if "row_scale" in self.forms and {n.op_type for n in nodes} <= {"MatMul", "Gemm"}:
                gain = _add_gain(model.graph, slot, value)
                for node in nodes:
                    _scale_rows(model.graph, node, gain)
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
    if node.op_type == "Conv":
        return position == 1 and node.attributes.get_int("group", 1) == 1
    return False


def _add_inputs(graph: ir.Graph, slot: Slot, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    a_name, b_name = lora_input_names(slot)
    rank = f"{slot.name.removesuffix('.weight')}.rank"
    out_features, *rest = slot.shape
    a_shape: tuple[int | str, ...] = (*rest, rank)
    b_shape: tuple[int | str, ...] = (rank, out_features)
    if slot.kind == "conv":
        a_shape, b_shape = (rank, *rest), (out_features, rank, *(1 for _ in rest[1:]))
    return _optional_input(graph, a_name, weight, a_shape), _optional_input(
        graph, b_name, weight, b_shape
    )


def _add_gain(graph: ir.Graph, slot: Slot, weight: ir.Value) -> ir.Value:
    name = gain_input_name(slot)
    return _optional_input(graph, name, weight, (f"{name}.size",), default=np.ones(1))


def _optional_input(
    graph: ir.Graph,
    name: str,
    weight: ir.Value,
    shape: tuple[int | str, ...],
    default: np.ndarray | None = None,
) -> ir.Value:
    """Add an input of the dtype of ``weight``; by default its symbolic axes are empty."""
    assert weight.const_value is not None
    dtype = weight.const_value.dtype
    if default is None:
        default = np.zeros([n if isinstance(n, int) else 0 for n in shape])
    value = ir.val(name, dtype, ir.Shape(shape))
    value.const_value = ir.tensor(default.astype(dtype.numpy()), name=name)
    graph.inputs.append(value)
    graph.initializers.add(value)
    return value


def _add_branch(graph: ir.Graph, node: ir.Node, a: ir.Value, b: ir.Value) -> None:
    """Add the branch to the output y of ``node``.

    MatMul and Gemm: y + (x @ a) @ b. Gather: y + transpose(b)[ids] @ transpose(a). Conv: y +
    b * (a * x), where ``a`` is a kernel that moves as the weight does and ``b`` one of size 1.
    """
    name = node.name
    if node.op_type == "Gather":
        ids = node.inputs[1]
        columns = ir.node("Transpose", [b], {"perm": [1, 0]}, name=f"{name}/lora_b")
        down = ir.node("Gather", [columns.outputs[0], ids], {"axis": 0}, name=f"{name}/lora_gather")
        rows = ir.node("Transpose", [a], {"perm": [1, 0]}, name=f"{name}/lora_a")
        up = ir.node("MatMul", [down.outputs[0], rows.outputs[0]], name=f"{name}/lora_b_a")
        nodes = [columns, down, rows, up]
    elif node.op_type == "Conv":
        kept = {k: v for k, v in node.attributes.items() if k != "kernel_shape"}
        down = ir.node("Conv", [node.inputs[0], a], kept, name=f"{name}/lora_a")
        up = ir.node("Conv", [down.outputs[0], b], name=f"{name}/lora_b_a")
        nodes = [down, up]
    else:
        down = ir.node("MatMul", [node.inputs[0], a], name=f"{name}/lora_a")
        up = ir.node("MatMul", [down.outputs[0], b], name=f"{name}/lora_b_a")
        nodes = [down, up]
    total = ir.node("Add", [node.outputs[0], up.outputs[0]], name=f"{name}/lora_add")
    _take_over(graph, node, [*nodes, total])


def _scale_rows(graph: ir.Graph, node: ir.Node, gain: ir.Value) -> None:
    """Multiply the product of ``node`` by ``gain``; a Gemm adds its bias afterwards."""
    name = node.name
    scaled = ir.node("Mul", [node.outputs[0], gain], name=f"{name}/row_gain")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        _take_over(graph, node, [scaled])
        return
    node.replace_input_with(2, None)
    biased = ir.node("Add", [scaled.outputs[0], bias], name=f"{name}/bias")
    _take_over(graph, node, [scaled, biased])


def _take_over(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Insert ``nodes`` behind ``node``; what read its output reads that of the last of them."""
    output, result = node.outputs[0], nodes[-1].outputs[0]
    ours = {(n, i) for n in nodes for i, value in enumerate(n.inputs) if value is output}
    result.shape, result.type = output.shape, output.type
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    for reader, index in ours:
        reader.replace_input_with(index, output)
    if result.is_graph_output():
        output.name, result.name = f"{output.name}.base", output.name
    graph.insert_after(node, nodes)
