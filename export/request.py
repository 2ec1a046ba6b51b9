"""What ``export_bundle`` asks of an engine's exporter, and what it gets back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from edge_lora.bundle_program import ProgramWeights
from edge_lora.errors import UnsupportedError
from edge_lora.export.causal_lm import is_causal_lm
from edge_lora.export.plan import Task
from edge_lora.export.stages import Stages
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.sites import Site
from edge_lora.slots import SlotTable


@dataclass(frozen=True, eq=False)
class Request:
    """One export, checked as far as it can be without an engine.

    Attributes:
        model: In evaluation mode.
        task: What the bundle is for.
        example_inputs: Of a generic model.
        dynamic_shapes: As the user gave them.
        weights: Every slot weight of the model, by name.
        table: Every slot that may be asked for, with its hash.
        names: The slots to put into the bundle.
        is_named: Whether the user named them: each must then be possible.
        slots: "none" or "inputs".
        branched: With "inputs": the slots that get some.
        slot_forms: With "inputs": what they carry.
        sites: Name -> where a bottleneck may go.
        program_weights: How an ExecuTorch program holds the weights of linear layers.
        cache_length: Positions of its KV cache; None: the engine's choice.
    """

    model: torch.nn.Module
    task: Task
    example_inputs: Mapping[str, torch.Tensor] | None
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None
    weights: Mapping[str, SlotWeight]
    table: SlotTable
    names: Sequence[str]
    is_named: bool
    slots: Literal["none", "inputs"]
    branched: Sequence[str]
    slot_forms: Sequence[str]
    sites: Mapping[str, Site]
    program_weights: ProgramWeights
    cache_length: int | None


@dataclass(frozen=True, eq=False)
class Exported:
    """What an engine's exporter wrote.

    Attributes:
        slots: The names among the request's that this engine can change.
        error: Largest relative error against torch.
        config: What the runtime must know of the model.
        fields: The engine's own fields of the manifest.
    """

    slots: tuple[str, ...]
    error: float
    config: Mapping[str, Any]
    fields: Mapping[str, Any]


class EngineExporter(Protocol):
    """A module that exports to one engine."""

    PACKAGES: Sequence[str]

    def export(self, request: Request, folder: Path, stages: Stages) -> Exported:
        """Write the engine's files into ``folder`` and check them against torch."""


def require_causal_lm(request: Request) -> None:
    """Raise UnsupportedError unless the model can be exported as a causal language model."""
    if request.example_inputs is not None or not is_causal_lm(request.model):
        raise UnsupportedError(
            f"{type(request.model).__name__} is not exported as causal-lm: that takes a causal "
            "language model of transformers and no example_inputs. For any other module pass "
            'task="generic" and example_inputs={"x": tensor}'
        )
