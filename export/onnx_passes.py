"""Graph passes: each one checks what it needs before and what it promises after.

Between them they turn the translator's raw graph into one that is small and fast, while every
slot's weight stays an initializer of its own under its torch name. Its ``value.meta["layout"]``
says how it is stored: "oi" in the slot's shape, "io" transposed.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from edge_lora.slots import Slot, SlotTable

LAYOUT = "layout"

# All of onnxscript's default rules that can fire on what torch emits, but for the one that pairs
# slices: it compares every node with every other, 30 s for a language model of 30 layers.
_RULES = (
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)
_ROUNDS = 2  # a rewritten graph may hold new constants; a third round changes nothing we met


class SlotPass(ir.passes.InPlacePass):
    """A pass that must keep every slot's weight: one initializer, under its torch name."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__()
        self.slots = slots

    def requires(self, model: ir.Model) -> None:
        """Raise PreconditionError unless every slot's weight is there."""
        if problems := missing_weights(model.graph, self.slots):
            raise ir.passes.PreconditionError("; ".join(problems))

    def ensures(self, model: ir.Model) -> None:
        """Raise PostconditionError unless every slot's weight is there."""
        if problems := missing_weights(model.graph, self.slots):
            raise ir.passes.PostconditionError("; ".join(problems))


def missing_weights(graph: ir.Graph, slots: Sequence[Slot]) -> list[str]:
    """Return one line for every slot whose weight is not an initializer of the right shape."""
    problems = []
    for slot in slots:
        value = graph.initializers.get(slot.name)
        if value is None or value.const_value is None:
            problems.append(f"{slot.name} is not an initializer")
            continue
        shape = tuple(value.const_value.shape.numpy())
        stored = slot.shape if value.meta[LAYOUT] == "oi" else slot.shape[::-1]
        if shape != stored:
            problems.append(f"{slot.name} is {shape}, expected {stored}")
    return problems


class NameWeights(ir.passes.InPlacePass):
    """Give weights their torch names (tied ones the canonical) and note how each is stored."""

    def __init__(self, prefix: str, table: SlotTable, transposed: Collection[str]) -> None:
        """Take ``prefix`` off names; ``transposed`` slots are stored (in, out) by torch."""
        super().__init__()
        self.prefix = prefix
        self.table = table
        self.transposed = transposed

    def requires(self, model: ir.Model) -> None:
        """Raise PreconditionError unless the translator kept the tensors of all initializers."""
        lost = [n for n, value in model.graph.initializers.items() if value.const_value is None]
        if lost:
            raise ir.passes.PreconditionError(f"initializers without values: {lost}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename initializers; those of slots get a layout."""
        initializers = model.graph.initializers
        values = list(initializers.items())
        initializers.clear()
        for old, value in values:
            name = old.removeprefix(self.prefix)
            slot = self.table.get(name)
            value.name = slot.name if slot else name
            if slot:
                value.meta[LAYOUT] = "io" if slot.name in self.transposed else "oi"
            initializers.add(value)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Raise PostconditionError if a slot in the graph has another shape than in torch."""
        present = [slot for slot in self.table.values() if slot.name in model.graph.initializers]
        if problems := missing_weights(model.graph, present):
            raise ir.passes.PostconditionError("; ".join(problems))


class Simplify(SlotPass):
    """Fold constants, drop what does nothing, merge what is the same.

    The optimiser sees slot weights as inputs, so that it cannot fold, merge or rename them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Optimise around the slots."""
        graph = model.graph
        values = [graph.initializers.pop(slot.name) for slot in self.slots]
        tensors = [value.const_value for value in values]
        for value in values:
            value.const_value = None
            graph.inputs.append(value)
        try:
            _optimize(model)
        finally:
            for value, tensor in zip(values, tensors, strict=True):
                graph.inputs.remove(value)
                value.const_value = tensor
                graph.initializers.add(value)
        return ir.passes.PassResult(model, modified=True)


def _optimize(model: ir.Model) -> None:
    common_passes.InlinePass()(model)
    for _ in range(_ROUNDS):
        fold_constants_ir(model, onnx_shape_inference=True)
        RewritePass(_RULES)(model)
        common_passes.RemoveUnusedNodesPass()(model)
    for cleanup in (
        common_passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common_passes.RemoveUnusedOpsetsPass(),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.LiftSubgraphInitializersToMainGraphPass(),
        common_passes.DeduplicateInitializersPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
    ):
        cleanup(model)


class FoldWeightTransposes(SlotPass):
    """Store a weight transposed where all that reads it is a transposition.

    ``x @ transpose(w)`` becomes ``x @ w`` with ``w`` stored (in, out). A weight that something else
    reads as well (a tied embedding) stays as it is: ONNX Runtime folds that one itself.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every transposition that can be folded."""
        modified = False
        for slot in self.slots:
            value = model.graph.initializers[slot.name]
            readers = [node for node, _ in value.uses()]
            if readers and all(_swaps_two_axes(node, len(slot.shape)) for node in readers):
                _fold(model.graph, value, readers)
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Raise PostconditionError if a weight is lost or only read through a transposition."""
        super().ensures(model)
        for slot in self.slots:
            readers = [node for node, _ in model.graph.initializers[slot.name].uses()]
            if readers and all(_swaps_two_axes(node, len(slot.shape)) for node in readers):
                raise ir.passes.PostconditionError(f"{slot.name} is still behind a Transpose")


def _swaps_two_axes(node: ir.Node, rank: int) -> bool:
    if node.op_type != "Transpose" or rank != 2:
        return False
    permutation = node.attributes.get("perm")
    return permutation is None or list(permutation.as_ints()) == [1, 0]


def _fold(graph: ir.Graph, value: ir.Value, readers: list[ir.Node]) -> None:
    tensor = value.const_value
    assert tensor is not None
    shape = ir.Shape(reversed(tensor.shape.numpy()))
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().T)),
        tensor.dtype,
        shape,
        name=value.name,
    )
    value.shape = shape
    value.meta[LAYOUT] = "oi" if value.meta[LAYOUT] == "io" else "io"
    for node in readers:
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)


class Tidy(SlotPass):
    """Name nodes after the modules they come from and drop the translator's bulky notes."""

    def __init__(self, slots: Sequence[Slot], prefix: str) -> None:
        super().__init__(slots)
        self.prefix = prefix

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename, strip, drop unused initializers, and sort initializers by name."""
        seen: Counter[str] = Counter()
        for node in model.graph:
            name = "/".join(filter(None, [_module_of(node, self.prefix), node.op_type]))
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        common_passes.ClearMetadataAndDocStringPass()(model)
        common_passes.RemoveUnusedNodesPass()(model)
        values = sorted(model.graph.initializers.values(), key=lambda value: value.name or "")
        model.graph.initializers.clear()
        for value in values:
            value.metadata_props.clear()
            model.graph.initializers.add(value)
        model.metadata_props.clear()
        model.doc_string = model.graph.doc_string = None
        model.graph.name = "base"
        model.producer_name, model.producer_version = "edge-lora", None
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Raise PostconditionError if a weight is lost or two nodes share a name."""
        super().ensures(model)
        names = [node.name for node in model.graph]
        if len(set(names)) != len(names):
            raise ir.passes.PostconditionError("two nodes share a name")


def _module_of(node: ir.Node, prefix: str) -> str:
    """Return the dotted path of the module whose forward made ``node``; empty if unknown."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (SyntaxError, ValueError):
        return ""
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path == prefix.rstrip(".") else str(path).removeprefix(prefix)
