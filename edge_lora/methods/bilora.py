"""Bi-LoRA: LoRA whose factors have 1, 2, 4 or 8 bits, trained through the codes.

    y = W x + scale * Q(B) Q(A) dropout(x)

| symbol | here | init |
|---|---|---|
| A | ``a`` (rank, in_features), fp32 shadow | Kaiming uniform with a = sqrt(5) |
| B | ``b`` (out_features, rank), fp32 shadow | normal of std 1e-3, cut at 2e-3 |
| Q | ``coded_weight.seen_through_codes`` | |

B cannot start at zero: its spread would be zero, and so would everything that it decodes to. So the
adapted model starts near the base, not at it. Lowers to LowRank with coded factors: the codes and
statistics of the last forward, never coded again by whoever reads them.

Source: Jie, Wang, Deng 2023, arXiv:2307.16867, which adapts q and v, with scale from
{0.01, 0.1, 1, 10, 100} by task, dropout 0.1, one group per matrix and decay 1e-4. Differences: any
linear slot (embeddings and convolutions too), 8 bits, smaller groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from edge_lora.codebook import BITS, Group
from edge_lora.forms import Form, LowRank
from edge_lora.methods.attached import Trained
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.branches import SideBranch, SideBranches, number_problems, refuse
from edge_lora.methods.coded_weight import coded, seen_through_codes
from edge_lora.slots import SlotKind

INITIAL_STD = 1e-3
"""Of the matrix that would be zero without codes; cut at twice that."""


@dataclass(frozen=True)
class BiLoraConfig:
    """What can be set.

    Attributes:
        rank: Rows of A.
        bits: Of one value: 1, 2, 4 or 8.
        group: What shares one mean and spread: "tensor", "row" (of A, and of B transposed) or a
            number of values.
        scale: Multiplies the branch: LoRA's alpha / rank.
        dropout: Probability of dropping an input of the branch while training, in [0, 1).
        seed: Of the init; each slot derives its own.
    """

    rank: int = 8
    bits: int = 1
    group: Group = "tensor"
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        numbers = number_problems(self.rank, self.dropout, scale=self.scale)
        refuse([*numbers, *coding_problems(self.bits, self.group)])


class CodedBranch(SideBranch):
    """The shadow factors of one slot, seen through their codes."""

    def __init__(self, weight: SlotWeight, config: BiLoraConfig) -> None:
        super().__init__(weight, config.rank, config.scale, config.dropout, config.seed)
        self.bits, self.group = config.bits, config.group

    def initial_b(self, out_features: int, rank: int, generator: torch.Generator) -> Tensor:
        """Return B at first: small, but with a spread."""
        return small_normal(out_features, rank, generator)

    def factors(self, training: bool) -> tuple[Tensor, Tensor, float]:  # noqa: ARG002
        """Return the decoded A and B."""
        a = seen_through_codes(self.a, self.bits, self.group)
        bt = seen_through_codes(self.b.t(), self.bits, self.group)
        return a, bt.t(), self.scale

    def forms(self) -> list[Form]:
        """Return one LowRank form of codes."""
        a, bt = (coded(m.detach(), self.bits, self.group) for m in (self.a, self.b.t()))
        return [LowRank(a, bt, self.scale)]


class BiLoRA:
    """The method."""

    config_class: ClassVar[type] = BiLoraConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"linear", "embedding", "conv"})

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, SlotWeight], config: BiLoraConfig) -> Trained:  # noqa: ARG004
        """Hook a branch onto every slot."""
        return SideBranches(slots, lambda weight: CodedBranch(weight, config))


def small_normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return (rows, columns) normal values, small, but with a spread that can be coded."""
    values = torch.empty(rows, columns)
    cut = 2 * INITIAL_STD
    return nn.init.trunc_normal_(values, std=INITIAL_STD, a=-cut, b=cut, generator=generator)


def coding_problems(bits: int, group: Group) -> list[str]:
    """Return what is impossible about bits and group."""
    problems = []
    if bits not in BITS or isinstance(bits, bool):
        problems.append(f"bits is {bits!r}, must be one of {', '.join(map(str, BITS))}")
    if group not in ("tensor", "row") and (type(group) is not int or group < 1):
        problems.append(f"group is {group!r}, must be 'tensor', 'row' or a number from 1")
    return problems
