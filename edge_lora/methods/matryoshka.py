"""MatryoshkaLoRA: all ranks trained in every step, as one weighted low-rank product.

    training     y = W x + B diag(P) A dropout(x)          P_i = sum of s(k) over ranks k >= i
    otherwise    y = W x + s(k) B[:, :k] A[:k] x           for any k among ``ranks``

| symbol | here | init |
|---|---|---|
| A, B | ``a`` (rank, in_features), ``b`` (out_features, rank) | as LoRA |
| s(k) | alpha, alpha / k or alpha / sqrt(k), by ``scaling`` | |

The training forward is the sum of the outputs of all ranks, so it equals none that is deployed:
measure with the model in ``eval`` mode. Lowers to LowRank with ``ranks``, without P.

Source: the reference code of MatryoshkaLoRA, where alpha is 1; the sum is not divided by the
number of ranks, as in its "diag" branch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from edge_lora.methods.attached import Trained
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.branches import number_problems, refuse
from edge_lora.methods.nested import NestedBranch, NestedBranches, all_ranks, rank_problems
from edge_lora.slots import SlotKind

Scaling = Literal["one", "rank", "sqrt_rank"]
_DIVISORS: dict[Scaling, Callable[[int], float]] = {
    "one": lambda _: 1.0,
    "rank": float,
    "sqrt_rank": math.sqrt,
}


@dataclass(frozen=True)
class MatryoshkaConfig:
    """What can be set.

    Attributes:
        rank: The largest rank.
        ranks: What to serve, ascending up to rank; null for the powers of two below it, and it.
        alpha: Numerator of the scale at rank k.
        scaling: What divides it: one, rank (k) or sqrt_rank.
        dropout: Probability of dropping an input of the branch while training, in [0, 1).
        seed: Of the init of A; each slot derives its own.
    """

    rank: int = 8
    ranks: Sequence[int] | None = None
    alpha: float = 1.0
    scaling: Scaling = "one"
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        problems = number_problems(self.rank, self.dropout, alpha=self.alpha)
        problems += rank_problems(self.rank, self.ranks)
        if self.scaling not in get_args(Scaling):
            known = ", ".join(get_args(Scaling))
            problems.append(f"scaling is {self.scaling!r}, must be one of {known}")
        refuse(problems)


def row_weights(ranks: Sequence[int], rank_scale: Sequence[float]) -> Tensor:
    """Return P: how much each row counts in the sum over all ranks, (largest rank,) fp32.

    >>> row_weights((1, 2, 4), (1.0, 1.0, 1.0)).tolist()
    [3.0, 2.0, 1.0, 1.0]
    """
    weights = torch.zeros(ranks[-1])
    for rank, scale in zip(ranks, rank_scale, strict=True):
        weights[:rank] += scale
    return weights


class MatryoshkaBranch(NestedBranch):
    """The factors of one slot, with a weight for every row.

    Attributes:
        row_weights: P, (rank,); not part of the state.
    """

    row_weights: Tensor

    def __init__(self, weight: SlotWeight, config: MatryoshkaConfig) -> None:
        ranks = all_ranks(config.rank, config.ranks)
        scales = tuple(config.alpha / _DIVISORS[config.scaling](k) for k in ranks)
        super().__init__(weight, ranks, scales, config.dropout, config.seed)
        weights = row_weights(ranks, scales).to(weight.parameter.device)
        self.register_buffer("row_weights", weights, persistent=False)

    def training_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the product that is the sum over all ranks."""
        return self.a * self.row_weights[:, None], self.b, 1.0


class Matryoshka:
    """The method."""

    config_class: ClassVar[type] = MatryoshkaConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"linear", "embedding", "conv"})

    @staticmethod
    def attach(
        model: nn.Module,  # noqa: ARG004
        slots: Mapping[str, SlotWeight],
        config: MatryoshkaConfig,
    ) -> Trained:
        """Hook a branch onto every slot."""
        return NestedBranches(slots, lambda weight: MatryoshkaBranch(weight, config))
