"""Export to ExecuTorch: ``executorch/model.pte``, one method ``forward`` on XNNPACK."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from edge_lora.bundle_program import Program
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.export.causal_lm_static import plan_static_causal_lm
from edge_lora.export.executorch_inputs import MAX_RANK, with_slot_inputs
from edge_lora.export.executorch_lowering import Lowered, lower
from edge_lora.export.executorch_slots import Reader, Values, places, readers_of, refusal
from edge_lora.export.executorch_verify import verify_program
from edge_lora.export.int8_linear import in_8_bits, linears_to_quantise, quantised
from edge_lora.export.plan import Plan, plan_generic
from edge_lora.export.request import Exported, Request, require_causal_lm
from edge_lora.export.slot_forms import lora_input_names
from edge_lora.export.stages import Stages
from edge_lora.export.transposed_linear import as_plain_linear
from edge_lora.methods.base_slots import is_transformers_conv1d
from edge_lora.slots import Slot

logger = logging.getLogger(__name__)

PROGRAM_FILE = "executorch/model.pte"
PACKAGES = ("executorch",)
Linears = Mapping[str, torch.nn.Linear]


def export(request: Request, folder: Path, stages: Stages) -> Exported:
    """Write the program into ``folder`` and check it against torch.

    Raises:
        UnsupportedError: The model cannot be lowered, a slot cannot be changed there, or the
            program differs from torch.
    """
    _check(request)
    is_8_bit = request.program_weights == "int8-dynamic"
    linears = linears_to_quantise(request.model) if is_8_bit else {}
    branched = _branched(request)
    with stages("lower to ExecuTorch"):
        plan, lowered, cache_length = _plan_and_lower(request, linears, branched)
    with stages("find weights in the program"):
        readers = _readers(request, plan, lowered)
        names = _choose(request, readers)
        in_place = _slot_of_parameter(request, plan)
        slots = places(
            lowered.pte,
            {name: request.table[name] for name in names},
            {name: _values(request, linears, name) for name in names},
            readers,
            lowered.traced.state_dict,
            {in_place[name] for name in lowered.read_in_place if name in in_place},
        )
    pairs = {slot.name: lora_input_names(slot) for slot in branched}
    of_slots = {name for pair in pairs.values() for name in pair}
    order = tuple(spec.name for spec in lowered.inputs)
    with stages("verify against torch"):
        rounding = partial(in_8_bits, linears)
        error = verify_program(lowered.pte, plan, order, request.program_weights, rounding)
    path = folder / PROGRAM_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(lowered.pte)
    inputs = tuple(spec for spec in lowered.inputs if spec.name not in of_slots)
    sizes = {size for spec in inputs for size in spec.shape}
    program = Program(
        file=PROGRAM_FILE,
        inputs=inputs,
        input_order=order,
        outputs=lowered.outputs,
        slots={name: replace(p, lora_inputs=pairs.get(name)) for name, p in slots.items()},
        weights=request.program_weights,
        cache_length=cache_length,
        max_rank=MAX_RANK if pairs else 0,
        largest={name: n for name, n in lowered.largest.items() if name in sizes},
        canary=plan.config.get("canary", {}),
    )
    config = {key: value for key, value in plan.config.items() if key != "canary"}
    return Exported(names, error, config, {"program": program})


def _branched(request: Request) -> list[Slot]:
    """Return the slots that get inputs: of linear layers alone."""
    if request.slots != "inputs":
        return []
    return [
        request.table[name]
        for name in request.names
        if name in request.branched
        and all(_is_linear(module) for module in request.weights[name].modules)
    ]


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or is_transformers_conv1d(module)


def _check(request: Request) -> None:
    problems = []
    if request.sites:
        problems.append("it has no inputs for bottlenecks: leave out sites")
    if request.slots == "inputs" and set(request.slot_forms) != {"low_rank"}:
        problems.append("its slots take low_rank inputs only: leave out slot_forms")
    dtypes = {name: p.dtype for name, p in request.model.named_parameters()}
    other = sorted(name for name, dtype in dtypes.items() if dtype != torch.float32)
    if other:
        problems.append(
            f"{other[0]} and {len(other) - 1} more are {dtypes[other[0]]}, it takes fp32: "
            "call model.float() first"
        )
    if problems:
        raise UnsupportedError(list_all("export to ExecuTorch cannot do what is asked", problems))


def _plan_and_lower(
    request: Request, linears: Linears, branched: Sequence[Slot]
) -> tuple[Plan, Lowered, int]:
    """Return the plan, what it became, and the length of the cache inside."""
    weights = request.weights.values()
    transposed = [m for weight in weights if weight.is_transposed for m in weight.modules]
    layers = {slot.name: request.weights[slot.name].modules for slot in branched}

    def finish(plan: Plan, largest: Mapping[str, int]) -> tuple[Plan, Lowered]:
        plan = with_slot_inputs(plan, branched, layers) if branched else plan
        with in_8_bits(linears), as_plain_linear(transposed):
            return plan, lower(plan, {**largest, "rank": MAX_RANK})

    if request.task == "causal-lm":
        require_causal_lm(request)
        plan, length = plan_static_causal_lm(request.model, request.cache_length)
        return *finish(plan, {"seq": length}), length
    model, example, shapes = request.model, request.example_inputs or {}, request.dynamic_shapes
    plan = plan_generic(model, example, shapes)
    try:
        return *finish(plan, {}), 0
    except UnsupportedError:
        if shapes is not None or not any(plan.dynamic_shapes.values()):
            raise
    return *finish(plan_generic(model, example, dynamic_shapes={}), {}), 0  # every size is fixed


def _values(request: Request, linears: Linears, name: str) -> Values:
    """Return what the program holds of a slot."""
    weight = request.weights[name].tensor
    return Values(*quantised(weight)) if name.removesuffix(".weight") in linears else Values(weight)


def _slot_of_parameter(request: Request, plan: Plan) -> dict[str, str]:
    """Return the slot of each parameter of the traced module that has one."""
    return {
        f"{plan.weight_prefix}{name}": slot.name
        for slot in request.table.values()
        for name in (slot.name, *slot.aliases)
    }


def _readers(request: Request, plan: Plan, lowered: Lowered) -> dict[str, list[Reader]]:
    """Return what reads each slot; names of a tied weight count together."""
    slots = _slot_of_parameter(request, plan)
    found: dict[str, list[Reader]] = defaultdict(list)
    for parameter, readers in readers_of(lowered.traced).items():
        if parameter in slots:
            found[slots[parameter]] += readers
    return found


def _choose(request: Request, readers: Mapping[str, list[Reader]]) -> tuple[str, ...]:
    """Return the slots that this engine can change.

    Raises:
        UnsupportedError: If one that was asked for is not among them, or none is left.
    """
    twins: dict[str, list[str]] = defaultdict(list)
    for slot in request.table.values():
        twins[slot.sha256].append(slot.name)
    refused = {}
    for name in request.names:
        slot = request.table[name]
        others = [twin for twin in twins[slot.sha256] if twin != name]
        if reason := refusal(slot, readers.get(name, []), others):
            refused[name] = f"{name}: {reason}"
    chosen = tuple(name for name in request.names if name not in refused)
    if refused and (request.is_named or not chosen):
        title = "slots that an ExecuTorch program cannot change"
        raise UnsupportedError(
            f"{list_all(title, list(refused.values()))}\nLeave them out of slot_names"
        )
    if refused:
        logger.warning("%s", list_all("left out of the bundle", list(refused.values())))
    return chosen
