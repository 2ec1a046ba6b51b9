"""``export_bundle``: a torch module becomes a folder that the engines on a device can run."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import torch

from edge_lora.bundle import MANIFEST, Manifest, hash_file, read_manifest, write_manifest
from edge_lora.bundle_check import verify_slots
from edge_lora.bundle_program import ProgramWeights
from edge_lora.errors import (
    BundleError,
    EngineUnavailableError,
    UnknownNameError,
    UnsupportedError,
    list_all,
)
from edge_lora.export.plan import Task
from edge_lora.export.request import EngineExporter, Exported, Request
from edge_lora.export.slot_choice import choose_slots
from edge_lora.export.slot_forms import SLOT_FORMS
from edge_lora.export.stages import Stages
from edge_lora.methods.base_slots import (
    default_slots,
    find_others,
    find_weights,
    slot_of,
    slot_table,
)
from edge_lora.methods.sites import match_sites
from edge_lora.slots import SlotTable

ENGINES = {
    "onnxruntime": "edge_lora.export.onnx_part",
    "executorch": "edge_lora.export.executorch_part",
}
INSTALL = {
    "onnxruntime": "pip install 'edge-lora[export]'",
    "executorch": "pip install 'edge-lora[export-executorch]'",
}
SLOTS = ("none", "inputs")
TOKENIZER_FOLDER = "tokenizer"
_PACKAGES = ("edge-lora", "torch", "transformers")


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
    program_weights: ProgramWeights = "fp32",
    cache_length: int | None = None,
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
            ``batch``, if the model can be traced so. An ExecuTorch program takes up to 8 times the
            size in ``example_inputs``, and at least 16, for which it reserves memory.
        engines: "onnxruntime", "executorch", or both over one slot table.
        slots: "none": adapters are fused into the weights. "inputs": every slot also gets optional
            inputs (in, rank) and (rank, out), so that an adapter can be fed for one call.
        slot_forms: What the inputs of a slot can carry. "row_scale" beside "low_rank" lets DoRA run
            unfused, and costs every run one more node at every slot.
        slot_names: Globs over weight names. Default: every linear layer; the output head only for
            fused adapters, without inputs. One that matches no weight may name biases and norms.
        sites: Globs over module names, ``"*.mlp"`` or ``"*.norm->*.mlp"`` (a branch that reads the
            input of another module), where adapters may put a bottleneck. Default: nowhere.
        program_weights: Of an ExecuTorch program. "int8-dynamic": linear layers in 8 bits with a
            scale per row; activations are quantised at every run. Tied weights stay fp32.
        cache_length: Positions of the KV cache inside an ExecuTorch program: prompt and answer
            together. Default: the model's context, at most 1024.
        base_id: Readable name of the base. Default: its config's name or its class.
        tokenizer: A fast tokenizer of transformers, stored beside the graph.
        progress: Show stages on stderr.

    Returns:
        The manifest that was written.

    Raises:
        UnsupportedError: The model cannot be traced, its graph differs from torch, or an engine
            cannot do what is asked.
        EngineUnavailableError: An engine's packages are not installed.
        UnknownNameError: Unknown engine, ``slots`` value, form, task or pattern; lists the known.
        BundleError: ``out`` is in the way.
    """
    out = Path(out)
    _check_choices(task, engines, slots, slot_forms, program_weights)
    _check_out(out)
    parts = {name: _exporter(name) for name in ENGINES if name in engines}
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
            table = slot_table(model, base_id or "")
            named = [slot_of(others[name]) for name in names if name in others]
        request = Request(
            model=model,
            task=task,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            weights=weights,
            table=SlotTable([*table.values(), *named], table.base_id, table.fingerprint),
            names=names,
            is_named=slot_names is not None,
            slots=slots,
            # A branch on the output head costs every token a pass over the vocabulary: if named.
            branched=names if slot_names is not None else default_slots(model, weights),
            slot_forms=slot_forms,
            sites=match_sites(model, sites) if sites else {},
            program_weights=program_weights,
            cache_length=cache_length,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            folder = Path(scratch) / "bundle"
            folder.mkdir()
            exported = _export(request, parts, folder, stages)
            _write_tokenizer(tokenizer, folder)
            manifest = _manifest(request, table, exported, folder, parts)
            with stages("verify weights"):
                verify_slots(folder, manifest)
            write_manifest(folder, manifest)
            _require_readable(folder)
            _move_into_place(folder, out)
    finally:
        for module in was_training:
            module.training = True
    return manifest


def _check_choices(
    task: str | None,
    engines: Sequence[str],
    slots: str,
    slot_forms: Sequence[str],
    program_weights: str,
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
    known = get_args(ProgramWeights)
    if program_weights not in known:
        problems.append(f"unknown program_weights={program_weights!r}. Known: {', '.join(known)}")
    if task not in (None, "causal-lm", "generic"):
        problems.append(f"unknown task {task!r}. Known: causal-lm, generic")
    if problems:
        raise UnknownNameError("\n".join(problems))


def _check_out(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise BundleError(f"'{out}' is a file. Give a folder that does not exist yet")
    if any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise BundleError(
            f"'{out}' holds other files and is not a bundle. Give a new or empty folder"
        )


def _exporter(engine: str) -> EngineExporter:
    """Return the module that exports to ``engine``; its packages are imported only here."""
    try:
        module = importlib.import_module(ENGINES[engine])
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(
            f"export to {engine} is not installed ({error.name} is missing). "
            f"Install it with: {INSTALL[engine]}"
        ) from error
    return cast("EngineExporter", module)


def _export(
    request: Request, parts: Mapping[str, EngineExporter], folder: Path, stages: Stages
) -> dict[str, Exported]:
    """Export to each engine; every one gets the same slots, those that all of them can change."""
    exported: dict[str, Exported] = {}
    for name in sorted(parts):  # executorch, which can change fewer slots, comes first
        exported[name] = parts[name].export(request, folder, stages)
        request = replace(request, names=exported[name].slots)
    for name, result in exported.items():
        if lost := set(result.slots) - set(request.names):
            raise UnsupportedError(
                list_all(f"slots that {name} has and another engine has not", sorted(lost))
            )
    return exported


def _manifest(
    request: Request,
    table: SlotTable,
    exported: Mapping[str, Exported],
    folder: Path,
    parts: Mapping[str, EngineExporter],
) -> Manifest:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    packages = [package for part in parts.values() for package in part.PACKAGES]
    slots = [request.table[name] for name in next(iter(exported.values())).slots]
    sites = [site.slot() for site in request.sites.values()]
    empty = Manifest(
        base_id=table.base_id,
        fingerprint=table.fingerprint,
        task=request.task,
        slots=SlotTable([*slots, *sites], table.base_id, table.fingerprint),
        stored={},
        inputs=(),
        outputs=(),
        files={path.relative_to(folder).as_posix(): hash_file(path) for path in files},
        parity={name: result.error for name, result in exported.items()},
        base_slots=len(table),
        producer={name: version for name in (*_PACKAGES, *packages) if (version := _version(name))},
    )
    for result in exported.values():
        config = {**empty.config, **result.config}
        empty = replace(empty, config=config, **result.fields)
    return empty


def _require_readable(folder: Path) -> None:
    """Refuse a bundle that its readers would refuse."""
    try:
        read_manifest(folder)
    except BundleError as error:
        raise UnsupportedError(
            f"this model makes a bundle that cannot be opened: {error}\n"
            "Leave the slots that are named here out of slot_names"
        ) from error


def _write_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    if tokenizer is None:
        return
    target = folder / TOKENIZER_FOLDER
    tokenizer.save_pretrained(str(target))
    if not (target / "tokenizer.json").is_file():
        raise UnsupportedError(
            f"{type(tokenizer).__name__} has no tokenizer.json: a fast tokenizer is needed"
        )


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
