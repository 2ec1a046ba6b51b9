"""Export to ONNX Runtime: ``onnx/model.onnx`` with named slots, and ``onnx/weights.bin``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from edge_lora.bundle import StoredSlot, TensorSpec
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.export import onnx_passes
from edge_lora.export.causal_lm import plan_causal_lm
from edge_lora.export.foldable import require_read_at_run_time
from edge_lora.export.normalisation import FuseNormalisation
from edge_lora.export.onnx_graph import quiet, translate
from edge_lora.export.plan import Plan, plan_generic
from edge_lora.export.request import Exported, Request, require_causal_lm
from edge_lora.export.site_graph import add_sites
from edge_lora.export.site_markers import marking
from edge_lora.export.slot_forms import gain_input_name, lora_input_names
from edge_lora.export.slot_graph import AddSlotInputs
from edge_lora.export.stages import Stages
from edge_lora.export.unfoldable import HideValues, slots_to_hide
from edge_lora.export.verify import verify_outputs
from edge_lora.export.weights import write_weights
from edge_lora.slots import Slot

MODEL_FILE, WEIGHTS_FILE = "onnx/model.onnx", "onnx/weights.bin"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(request: Request, folder: Path, stages: Stages) -> Exported:
    """Write the graph and its weights into ``folder`` and check them against torch.

    Raises:
        UnsupportedError: The model cannot be traced, or its graph differs from torch.
    """
    with stages("trace and translate"):
        plan, graph = _plan_and_translate(request)
    with stages("simplify"):
        chosen = _run_passes(graph, plan, request)
        sites = {name: site.slot() for name, site in request.sites.items()}
        bundle_sites = add_sites(graph, chosen, sites)
        if request.slots == "inputs":
            branched = [slot for slot in chosen if slot.name in request.branched]
            AddSlotInputs(branched, request.slot_forms)(graph)
        weights = {name: weight.tensor for name, weight in request.weights.items()}
        hidden = slots_to_hide(graph.graph, chosen, request.table.values(), weights)
        HideValues(hidden)(graph)
    with stages("write weights"):
        stored = _write_graph(graph, folder, chosen)
    with stages("verify against torch"):
        dtypes = {slot.dtype for slot in request.table.values()} or {"F32"}
        error = verify_outputs(folder / MODEL_FILE, plan, max(dtypes, key=_coarseness))
    required = [v for v in graph.graph.inputs if v.name not in graph.graph.initializers]
    fields = {
        "stored": stored,
        "sites": bundle_sites,
        "inputs": tuple(_spec(value) for value in required),
        "outputs": tuple(_spec(value) for value in graph.graph.outputs),
    }
    return Exported(tuple(slot.name for slot in chosen), error, plan.config, fields)


def _plan_and_translate(request: Request) -> tuple[Plan, ir.Model]:
    model, example, shapes = request.model, request.example_inputs or {}, request.dynamic_shapes
    if request.task == "causal-lm":
        require_causal_lm(request)
        plan = marking(plan_causal_lm(model), request.sites)
        return plan, translate(plan)
    plan = marking(plan_generic(model, example, shapes), request.sites)
    try:
        return plan, translate(plan)
    except UnsupportedError:
        if shapes is not None or not any(plan.dynamic_shapes.values()):
            raise
    fixed = plan_generic(model, example, dynamic_shapes={})  # every size
    plan = marking(fixed, request.sites)
    return plan, translate(plan)


def _run_passes(graph: ir.Model, plan: Plan, request: Request) -> list[Slot]:
    """Rewrite ``graph`` in place; return the slots asked for that it really reads."""
    table, names, weights = request.table, request.names, request.weights
    transposed = {name for name, weight in weights.items() if weight.is_transposed}
    onnx_passes.NameWeights(plan.weight_prefix, table, transposed)(graph)
    present = graph.graph.initializers
    absent = [name for name in names if name not in present]
    if absent and request.is_named:
        raise UnsupportedError(list_all("slots that the traced forward does not read", absent))
    kept = [table[name] for name in names if name in present]
    # Weights that no adapter may change still keep their names and lose their transpositions,
    # but a convolution among them may absorb its batch normalisation.
    guarded = [
        slot
        for slot in table.values()
        if slot.name in present and (slot in kept or slot.kind != "conv")
    ]
    with quiet():
        onnx_passes.Simplify(guarded)(graph)
        FuseNormalisation(guarded)(graph)
    onnx_passes.FoldWeightTransposes(guarded)(graph)
    onnx_passes.Tidy(guarded, plan.weight_prefix)(graph)
    require_read_at_run_time(graph.graph, kept)
    return kept


def _write_graph(model: ir.Model, folder: Path, slots: Sequence[Slot]) -> dict[str, StoredSlot]:
    """Write model.onnx and weights.bin; return where each slot lies."""
    path = folder / MODEL_FILE
    path.parent.mkdir(parents=True)
    offsets = write_weights(model, {slot.name for slot in slots}, folder / WEIGHTS_FILE)
    ir.save(model, path)
    inputs = {value.name for value in model.graph.inputs}
    stored = {}
    for slot in slots:
        value = model.graph.initializers[slot.name]
        pair, gain = lora_input_names(slot), gain_input_name(slot)
        stored[slot.name] = StoredSlot(
            file=WEIGHTS_FILE,
            offset=offsets[slot.name],
            layout=value.meta[onnx_passes.LAYOUT],
            initializer=slot.name,
            operators=tuple(sorted({node.op_type for node, _ in value.uses()})),
            lora_inputs=pair if pair[0] in inputs else None,
            gain_input=gain if gain in inputs else None,
            is_input=slot.name in inputs,
        )
    return stored


def _coarseness(dtype: str) -> int:
    return ("F32", "F16", "BF16").index(dtype)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)
