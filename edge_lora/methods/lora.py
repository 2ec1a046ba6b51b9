"""LoRA and rsLoRA: a trained low-rank side branch of every linear layer.

    y = W x + scale * B A dropout(x)

| symbol | here | init |
|---|---|---|
| A | ``a`` (rank, in_features) | Kaiming uniform with a = sqrt(5), as PEFT |
| B | ``b`` (out_features, rank) | 0 |
| scale | alpha / rank (LoRA), alpha / sqrt(rank) (rsLoRA) | |

Both are fp32 whatever the base is; the branch is computed in fp32 outside autocast and rounded
once to the layer's output dtype. Lowers to LowRank. The modules stay as they are: the branch is a
forward hook.

Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError
from edge_lora.forms import Form, LowRank
from edge_lora.methods.attached import Trained, module_key, slot_seed
from edge_lora.methods.base_slots import SlotWeight
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
        problems = []
        if self.rank < 1:
            problems.append(f"rank is {self.rank!r}, must be at least 1")
        if not math.isfinite(self.alpha):
            problems.append(f"alpha is {self.alpha!r}, must be finite")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout!r}, must be in [0, 1)")
        if problems:
            raise UnsupportedError("; ".join(problems))


class SideBranch(nn.Module):
    """The factors of one slot.

    Attributes:
        a: (rank, in_features) fp32.
        b: (out_features, rank) fp32, zero at first.
    """

    def __init__(self, weight: SlotWeight, config: LoraConfig, scale: float) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        generator = torch.Generator().manual_seed(slot_seed(config.seed, weight.name))
        a = torch.empty(config.rank, in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        device = weight.parameter.device
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        self.name = weight.name
        self.scale = scale
        self.dropout = config.dropout
        self.handles = [module.register_forward_hook(self._add) for module in weight.modules]

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = F.dropout(inputs[0].to(self.a.dtype), self.dropout, module.training)
        branch = F.linear(F.linear(x, self.a), self.b) * self.scale
        return (output + branch).to(output.dtype)


class SideBranches(Trained):
    """The branches of all slots."""

    def __init__(self, slots: Mapping[str, SlotWeight], config: LoraConfig, scale: float) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {module_key(name): SideBranch(weight, config, scale) for name, weight in slots.items()}
        )

    def _each(self) -> list[SideBranch]:
        return [branch for branch in self.branches.values() if isinstance(branch, SideBranch)]

    def forms(self) -> dict[str, list[Form]]:
        """Return one LowRank form per slot."""
        return {
            branch.name: [
                LowRank(
                    branch.a.detach().float().cpu().numpy(),
                    branch.b.detach().float().cpu().t().contiguous().numpy(),
                    branch.scale,
                )
            ]
            for branch in self._each()
        }

    def restore(self) -> None:
        """Remove the hooks; the weights were never touched."""
        for branch in self._each():
            for handle in branch.handles:
                handle.remove()


class LoRA:
    """LoRA: the scale is alpha / rank."""

    config_class: ClassVar[type] = LoraConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"linear"})

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, SlotWeight], config: LoraConfig) -> Trained:  # noqa: ARG004
        """Hook a branch onto every slot."""
        return SideBranches(slots, config, config.alpha / config.rank)


class RsLoRA:
    """Rank-stabilised LoRA: the scale is alpha / sqrt(rank)."""

    config_class: ClassVar[type] = LoraConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"linear"})

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, SlotWeight], config: LoraConfig) -> Trained:  # noqa: ARG004
        """Hook a branch onto every slot."""
        return SideBranches(slots, config, config.alpha / math.sqrt(config.rank))
