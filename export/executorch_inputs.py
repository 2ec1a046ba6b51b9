"""Slots as inputs of an ExecuTorch program: a low-rank branch beside linear layers.

A layer becomes ``linear(x) + (x @ a) @ b``. XNNPACK still computes the first part; the other two
products run outside it, since XNNPACK packs weights when the program loads. An input cannot be left
out, so an idle slot is fed zeros of rank 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edge_lora.export.plan import Case, Plan
from edge_lora.export.slot_forms import lora_input_names
from edge_lora.slots import Slot

MAX_RANK = 64
"""Largest rank of an adapter that is fed; memory is reserved for it."""
FACTORS, INPUTS = "factors", "inputs"
_CHECKED_RANKS = (1, 3, 2)  # of the slots in turn: each may have a rank of its own


class WithSlotInputs(torch.nn.Module):
    """A module with two more inputs for each of some of its linear layers."""

    def __init__(self, base: torch.nn.Module, layers: Sequence[Sequence[torch.nn.Module]]) -> None:
        """Hold ``base``; ``layers`` are, slot by slot, the modules in it that read the weight."""
        super().__init__()
        self.base = base
        self.layers = layers  # a plain sequence: they are modules of ``base`` already

    def forward(self, factors: list[Tensor], inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401
        """Return what ``base`` returns for ``inputs``.

        Args:
            factors: a (in, rank) and b (rank, out) of every slot in turn.
            inputs: Of ``base``.
        """
        pairs = zip(factors[::2], factors[1::2], strict=True)
        with contextlib.ExitStack() as hooks:
            for (a, b), modules in zip(pairs, self.layers, strict=True):
                for module in modules:
                    handle = module.register_forward_hook(_Branch(a, b))
                    hooks.callback(handle.remove)
            return self.base(**inputs)


class _Branch:
    """A forward hook that adds (x @ a) @ b to a layer's output."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def __call__(self, module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Return the sum; no size of the program depends on the rank but those of the products."""
        del module
        rows = args[0].reshape(-1, self.a.shape[0])
        return output + ((rows @ self.a) @ self.b).reshape(output.shape)


def with_slot_inputs(
    plan: Plan, slots: Sequence[Slot], layers: Mapping[str, Sequence[torch.nn.Module]]
) -> Plan:
    """Return the plan whose module takes factors for ``slots``.

    Args:
        plan: Of the module without them.
        slots: Linear layers only.
        layers: Slot -> the modules that read its weight.
    """
    modules = [tuple(layers[slot.name]) for slot in slots]
    names = tuple(name for slot in slots for name in lora_input_names(slot))
    ranks = [_CHECKED_RANKS[i % len(_CHECKED_RANKS)] for i in range(len(slots))]
    idle = [x for slot in slots for x in _factors(slot, 1, 0.0)]
    active = [x for s, rank in zip(slots, ranks, strict=True) for x in _factors(s, rank)]
    example = [x for slot in slots for x in _factors(slot, 2)]

    def case(number: int, inputs: Case) -> Case:
        return {FACTORS: active if number else idle, INPUTS: dict(inputs)}

    return replace(
        plan,
        module=WithSlotInputs(plan.module, modules).eval(),
        reference=WithSlotInputs(plan.reference or plan.module, modules).eval(),
        example={FACTORS: example, INPUTS: dict(plan.example)},
        dynamic_shapes={
            FACTORS: [{1: "rank"}, {0: "rank"}] * len(slots),
            INPUTS: dict(plan.dynamic_shapes),
        },
        input_names=(*names, *plan.input_names),
        weight_prefix=f"base.{plan.weight_prefix}",
        cases=(
            *(case(i % 3, inputs) for i, inputs in enumerate(plan.cases)),
            case(1, plan.cases[0]),  # a model of fixed sizes has but one
        ),
        state=tuple(f"base.{name}" for name in plan.state),
    )


def _factors(slot: Slot, rank: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a (in, rank) and b (rank, out) from a fixed seed, of outputs about ``size``."""
    generator = torch.Generator().manual_seed(rank)
    out_features, in_features = slot.shape
    a = torch.randn(in_features, rank, generator=generator) * in_features**-0.5
    return a, torch.randn(rank, out_features, generator=generator) * size * 0.1
