"""DyLoRA: LoRA trained at a rank drawn anew for every step, so that each prefix works.

    y = W x + alpha / k * B[:, :k] A[:k] dropout(x)          k uniform among ``ranks``

| symbol | here | init |
|---|---|---|
| A, B | ``a`` (rank, in_features), ``b`` (out_features, rank) | as LoRA |
| k | ``rank_of_step(seed, step)``, one for all slots | |

With ``frozen``, only the rows beyond the next smaller rank learn in a step: what smaller ranks need
is left alone. The rank follows from seed and step alone, so a resumed run draws the same, and so
does every process of a group. Lowers to LowRank with ``ranks``.

Source: Valipour et al. 2022, arXiv:2210.07558. Differences: any ascending list of ranks, uniform
only; with ``frozen`` and gaps between the ranks, the whole gap learns, not one row.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from edge_lora.methods.attached import Trained
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.branches import number_problems, refuse
from edge_lora.methods.nested import NestedBranch, NestedBranches, all_ranks, rank_problems
from edge_lora.slots import SlotKind


@dataclass(frozen=True)
class DyLoraConfig:
    """What can be set.

    Attributes:
        rank: The largest rank.
        ranks: What to serve, ascending up to rank; null for the powers of two below it, and it.
        alpha: Numerator of the scale alpha / k.
        frozen: Train only what the drawn rank has beyond the next smaller one.
        dropout: Probability of dropping an input of the branch while training, in [0, 1).
        seed: Of the init and of the drawn ranks.
    """

    rank: int = 8
    ranks: Sequence[int] | None = None
    alpha: float = 16.0
    frozen: bool = False
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        numbers = number_problems(self.rank, self.dropout, alpha=self.alpha)
        refuse([*numbers, *rank_problems(self.rank, self.ranks)])


def rank_of_step(ranks: Sequence[int], seed: int, step: int) -> int:
    """Return the rank to train at in a step: uniform, and always the same for the same step."""
    return random.Random(f"{seed}/{step}").choice(ranks)  # sha512 of the text, on any machine


class DyLoraBranch(NestedBranch):
    """The factors of one slot, cut at the rank of the step.

    Attributes:
        drawn: That rank; the largest before the first step.
    """

    def __init__(self, weight: SlotWeight, config: DyLoraConfig) -> None:
        ranks = all_ranks(config.rank, config.ranks)
        scales = tuple(config.alpha / k for k in ranks)
        super().__init__(weight, ranks, scales, config.dropout, config.seed)
        self.is_frozen = config.frozen
        self.drawn = ranks[-1]

    def training_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the prefix of the drawn rank; with ``frozen``, its older part is constant."""
        a, b, scale = self.prefix(self.drawn)
        if self.is_frozen:
            kept = max((k for k in self.ranks if k < self.drawn), default=0)
            a = torch.cat([a[:kept].detach(), a[kept:]])
            b = torch.cat([b[:, :kept].detach(), b[:, kept:]], dim=1)
        return a, b, scale


class DyLoraBranches(NestedBranches):
    """The branches of all slots, at one rank in each step."""

    def __init__(self, slots: Mapping[str, SlotWeight], config: DyLoraConfig) -> None:
        super().__init__(slots, lambda weight: DyLoraBranch(weight, config))
        self.seed = config.seed

    def before_step(self, step: int) -> None:
        """Draw the rank of this step."""
        for branch in self.nested:
            if isinstance(branch, DyLoraBranch):
                branch.drawn = rank_of_step(branch.ranks, self.seed, step)


class DyLoRA:
    """The method."""

    config_class: ClassVar[type] = DyLoraConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"linear", "embedding", "conv"})

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, SlotWeight], config: DyLoraConfig) -> Trained:  # noqa: ARG004
        """Hook a branch onto every slot."""
        return DyLoraBranches(slots, config)
