"""``export_bundle``: a torch module becomes a folder that any ONNX Runtime can run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import onnx_ir as ir
import torch

from edge_lora.bundle import (
    MANIFEST,
    Manifest,
    StoredSlot,
    TensorSpec,
    hash_file,
    write_manifest,
)
from edge_lora.bundle_check import verify_slots
from edge_lora.errors import BundleError, UnknownNameError, UnsupportedError, list_all
from edge_lora.export import onnx_passes
from edge_lora.export.causal_lm import is_causal_lm, plan_causal_lm
from edge_lora.export.foldable import require_read_at_run_time
from edge_lora.export.onnx_graph import quiet, translate
from edge_lora.export.plan import Plan, Task, plan_generic
from edge_lora.export.site_graph import add_sites
from edge_lora.export.site_markers import marking
from edge_lora.export.slot_choice import choose_slots
from edge_lora.export.slot_graph import (
    SLOT_FORMS,
    AddSlotInputs,
    gain_input_name,
    lora_input_names,
)
from edge_lora.export.stages import Stages
from edge_lora.export.verify import verify_outputs
from edge_lora.export.weights import write_weights
from edge_lora.methods.base_slots import (
    SlotWeight,
    default_slots,
    find_others,
    find_weights,
    slot_of,
    slot_table,
)
from edge_lora.methods.sites import Site, match_sites
from edge_lora.slots import Slot, SlotTable

ENGINES = ("onnxruntime", "executorch")
SLOTS = ("none", "inputs")
MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER = "onnx/model.onnx", "onnx/weights.bin", "tokenizer"


class Tokenizer(Protocol):
    """What we need of a tokenizer of transformers."""

    def save_pretrained(self, save_directory: str, /) -> object: ...  # noqa: D102


def export_bundle(
    model: torch.nn.Module,
    out: str | Path,
    *,
    task: Task | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    engines: Sequence[str] = ("onnxruntime",),
    slots: Literal["none", "inputs"] = "none",
    slot_forms: Sequence[str] = ("low_rank",),
    slot_names: Sequence[str] | None = None,
    sites: Sequence[str] = (),
    base_id: str | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = True,
) -> Manifest:
    """Export ``model`` once, as a bundle whose slots adapters can change later.

    The bundle is checked against torch before it appears: a failed export leaves nothing behind.
    ``model`` is not changed.

    Args:
        model: On the CPU. A causal language model of transformers, or any module with
            ``example_inputs``.
        out: Folder to write: new, empty, or a bundle (which is replaced).
        task: Default: "generic" if there are ``example_inputs``, else "causal-lm".
        example_inputs: ``forward``'s argument names -> tensors; the names become the graph's.
        dynamic_shapes: Argument -> {axis: name} of sizes that may vary. Default: axis 0 is
            ``batch``, if the model can be traced so.
        engines: Only "onnxruntime" so far.
        slots: "none": adapters are fused into the weights. "inputs": every slot also gets optional
            inputs (in, rank) and (rank, out), so that an adapter can be fed for one call.
        slot_forms: What the inputs of a slot can carry. "row_scale" beside "low_rank" lets DoRA run
            unfused, and costs every run one more node at every slot.
        slot_names: Globs over weight names. Default: every linear layer; the output head only for
            fused adapters, without inputs. One that matches no weight may name biases and norms.
        sites: Globs over module names, ``"*.mlp"`` or ``"*.norm->*.mlp"`` (a branch that reads the
            input of another module), where adapters may put a bottleneck. Default: nowhere.
        base_id: Readable name of the base. Default: its config's name or its class.
        tokenizer: A fast tokenizer of transformers, stored beside the graph.
        progress: Show stages on stderr.

    Returns:
        The manifest that was written.

    Raises:
        UnsupportedError: The model cannot be traced or its graph differs from torch.
        UnknownNameError: Unknown engine, ``slots`` value, form, task or pattern; lists the known.
        BundleError: ``out`` is in the way.
    """
    out = Path(out)
    _check_choices(task, engines, slots, slot_forms)
    _check_out(out)
    task = task or ("generic" if example_inputs is not None else "causal-lm")
    stages = Stages(progress)
    if away := {str(p.device) for p in model.parameters() if p.device.type != "cpu"}:
        raise UnsupportedError(f"the model is on {', '.join(sorted(away))}. Call model.cpu() first")
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with stages("hash weights"):
            weights = find_weights(model)
            others = find_others(model)
            names = choose_slots(weights, others, slot_names)
            # A branch on the output head costs every token a pass over the vocabulary: if named.
            branched = names if slot_names is not None else default_slots(model, weights)
            table = slot_table(model, base_id or "")
            named = [slot_of(others[name]) for name in names if name in others]
            every = SlotTable([*table.values(), *named], table.base_id, table.fingerprint)
            found_sites = match_sites(model, sites) if sites else {}
        with stages("trace and translate"):
            plan, graph = _plan_and_translate(
                model, task, example_inputs, dynamic_shapes, found_sites
            )
        with stages("simplify"):
            chosen = _run_passes(
                graph, plan, every, weights, names, must_exist=slot_names is not None
            )
            site_slots = {name: site.slot() for name, site in found_sites.items()}
            bundle_sites = add_sites(graph, chosen, site_slots)
            if slots == "inputs":
                AddSlotInputs([s for s in chosen if s.name in branched], slot_forms)(graph)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            folder = Path(scratch) / "bundle"
            with stages("write weights"):
                stored = _write_graph(graph, folder, chosen)
                _write_tokenizer(tokenizer, folder)
            with stages("verify against torch"):
                dtypes = {slot.dtype for slot in table.values()} or {"F32"}
                error = verify_outputs(folder / MODEL_FILE, plan, max(dtypes, key=_coarseness))
            manifest = replace(
                _manifest(graph, plan, table, chosen, stored, error, folder),
                slots=SlotTable([*chosen, *site_slots.values()], table.base_id, table.fingerprint),
                sites=bundle_sites,
            )
            with stages("verify weights"):
                verify_slots(folder, manifest)
            write_manifest(folder, manifest)
            _move_into_place(folder, out)
    finally:
        for module in was_training:
            module.training = True
    return manifest


def _check_choices(
    task: str | None, engines: Sequence[str], slots: str, slot_forms: Sequence[str]
) -> None:
    problems = [
        f"unknown engine {engine!r}. Known: {', '.join(ENGINES)}"
        for engine in engines
        if engine not in ENGINES
    ]
    if not engines:
        problems.append(f"no engine. Known: {', '.join(ENGINES)}")
    if slots not in SLOTS:
        problems.append(f"unknown slots={slots!r}. Known: {', '.join(SLOTS)}")
    problems += [
        f"unknown slot form {form!r}. Known: {', '.join(SLOT_FORMS)}"
        for form in slot_forms
        if form not in SLOT_FORMS
    ]
    if task not in (None, "causal-lm", "generic"):
        problems.append(f"unknown task {task!r}. Known: causal-lm, generic")
    if problems:
        raise UnknownNameError("\n".join(problems))
    if "executorch" in engines:
        raise UnsupportedError(
            "export to executorch is not built yet. Use engines=('onnxruntime',)"
        )


def _check_out(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise BundleError(f"'{out}' is a file. Give a folder that does not exist yet")
    if any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise BundleError(
            f"'{out}' holds other files and is not a bundle. Give a new or empty folder"
        )


def _plan_and_translate(
    model: torch.nn.Module,
    task: Task,
    example_inputs: Mapping[str, torch.Tensor] | None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None,
    sites: Mapping[str, Site],
) -> tuple[Plan, ir.Model]:
    if task == "causal-lm":
        if example_inputs is not None or not is_causal_lm(model):
            raise UnsupportedError(
                f"{type(model).__name__} is not exported as causal-lm: that takes a causal "
                "language model of transformers and no example_inputs. For any other module pass "
                'task="generic" and example_inputs={"x": tensor}'
            )
        plan = marking(plan_causal_lm(model), sites)
        return plan, translate(plan)
    plan = marking(plan_generic(model, example_inputs or {}, dynamic_shapes), sites)
    try:
        return plan, translate(plan)
    except UnsupportedError:
        if dynamic_shapes is not None or not any(plan.dynamic_shapes.values()):
            raise
    fixed = plan_generic(model, example_inputs or {}, dynamic_shapes={})  # every size
    plan = marking(fixed, sites)
    return plan, translate(plan)


def _run_passes(
    graph: ir.Model,
    plan: Plan,
    table: SlotTable,
    weights: Mapping[str, SlotWeight],
    names: Sequence[str],
    *,
    must_exist: bool,
) -> list[Slot]:
    """Rewrite ``graph`` in place; return the slots among ``names`` that it really reads."""
    transposed = {name for name, weight in weights.items() if weight.is_transposed}
    onnx_passes.NameWeights(plan.weight_prefix, table, transposed)(graph)
    present = graph.graph.initializers
    absent = [name for name in names if name not in present]
    if absent and must_exist:
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
        )
    return stored


def _write_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    if tokenizer is None:
        return
    target = folder / TOKENIZER_FOLDER
    tokenizer.save_pretrained(str(target))
    if not (target / "tokenizer.json").is_file():
        raise UnsupportedError(
            f"{type(tokenizer).__name__} has no tokenizer.json: a fast tokenizer is needed"
        )


def _coarseness(dtype: str) -> int:
    return ("F32", "F16", "BF16").index(dtype)


def _manifest(
    model: ir.Model,
    plan: Plan,
    table: SlotTable,
    slots: Sequence[Slot],
    stored: Mapping[str, StoredSlot],
    error: float,
    folder: Path,
) -> Manifest:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    required = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    packages = ("edge-lora", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return Manifest(
        base_id=table.base_id,
        fingerprint=table.fingerprint,
        task=plan.task,
        slots=SlotTable(slots, table.base_id, table.fingerprint),
        stored=stored,
        inputs=tuple(_spec(value) for value in required),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
        files={path.relative_to(folder).as_posix(): hash_file(path) for path in files},
        parity={"onnxruntime": error},
        config=plan.config,
        base_slots=len(table),
        producer={name: version for name in packages if (version := _version(name))},
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _move_into_place(folder: Path, out: Path) -> None:
    """Put the finished bundle at ``out``; an older one there is moved aside first, then dropped."""
    if not out.exists():
        folder.rename(out)
        return
    aside = folder.with_name("replaced")
    out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside)
