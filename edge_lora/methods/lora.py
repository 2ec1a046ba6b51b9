"""LoRA and rsLoRA: a trained low-rank side branch of every slot.

    y = W x + scale * B A dropout(x)

| symbol | here | init |
|---|---|---|
| A | ``a`` (rank, in_features) | Kaiming uniform with a = sqrt(5), embeddings normal: as PEFT |
| B | ``b`` (out_features, rank) | 0 |
| scale | alpha / rank (LoRA), alpha / sqrt(rank) (rsLoRA) | |

Linear layers by default; embeddings and convolutions where they are named. Lowers to LowRank. The
branch of a grouped convolution is a change of its weight like any other, so it can be fused;
PEFT's reads all channels and cannot.

Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from edge_lora.methods.attached import Trained
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.branches import SideBranch, SideBranches, number_problems, refuse
from edge_lora.slots import SlotKind


@dataclass(frozen=True)
class LoraConfig:
    """What can be set.

    Attributes:
        rank: Rows of A.
        alpha: Numerator of the scale.
        dropout: Probability of dropping an input of the branch while training, in [0, 1).
        seed: Of the init of A; each slot derives its own.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        refuse(number_problems(self.rank, self.dropout, alpha=self.alpha))


class LoRA:
    """LoRA: the scale is alpha / rank."""

    config_class: ClassVar[type] = LoraConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"linear", "embedding", "conv"})

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, SlotWeight], config: LoraConfig) -> Trained:  # noqa: ARG004
        """Hook a branch onto every slot."""
        return _branches(slots, config, config.alpha / config.rank)


class RsLoRA:
    """Rank-stabilised LoRA: the scale is alpha / sqrt(rank)."""

    config_class: ClassVar[type] = LoraConfig
    kinds: ClassVar[frozenset[SlotKind]] = LoRA.kinds

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, SlotWeight], config: LoraConfig) -> Trained:  # noqa: ARG004
        """Hook a branch onto every slot."""
        return _branches(slots, config, config.alpha / math.sqrt(config.rank))


def _branches(slots: Mapping[str, SlotWeight], config: LoraConfig, scale: float) -> SideBranches:
    return SideBranches(
        slots, lambda weight: SideBranch(weight, config.rank, scale, config.dropout, config.seed)
    )
