"""Branches whose first rows work alone: what DyLoRA and MatryoshkaLoRA share.

One adapter serves every rank k of an ascending list: the first k rows of A and columns of B, at a
scale of their own. While training (``module.training``) a method says what the forward multiplies;
otherwise it is the prefix that ``use_rank`` chose, as a device would run it. Lowers to LowRank with
``ranks`` and ``rank_scale``.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from edge_lora.errors import UnsupportedError
from edge_lora.forms import Form, LowRank
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.branches import SideBranch, SideBranches


def all_ranks(rank: int, ranks: Sequence[int] | None) -> tuple[int, ...]:
    """Return the ranks to serve: those given, or the powers of two below ``rank``, and ``rank``.

    >>> all_ranks(6, None)
    (1, 2, 4, 6)
    """
    if ranks is not None:
        return tuple(ranks)
    return (*(2**i for i in range(rank.bit_length()) if 2**i < rank), rank)


def rank_problems(rank: int, ranks: Sequence[int] | None) -> list[str]:
    """Return what is impossible about the list of ranks."""
    if ranks is None:
        return []
    is_list = isinstance(ranks, list | tuple) and all(type(k) is int for k in ranks)
    if is_list and [*ranks[-1:]] == [rank] and all(a < b for a, b in pairwise((0, *ranks))):
        return []
    return [f"ranks is {ranks!r}, must ascend from at least 1 to {rank}, the rank"]


class NestedBranch(SideBranch):
    """The factors of one slot, and which of their rows count.

    Attributes:
        ranks: What it serves, ascending.
        rank_scale: The scale at each.
        used: The rank of a forward that does not train.
    """

    def __init__(
        self,
        weight: SlotWeight,
        ranks: tuple[int, ...],
        rank_scale: tuple[float, ...],
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__(weight, ranks[-1], rank_scale[-1], dropout, seed)
        self.ranks, self.rank_scale = ranks, rank_scale
        self.used = ranks[-1]

    def factors(self, training: bool) -> tuple[Tensor, Tensor, float]:
        """Return what this forward multiplies."""
        return self.training_factors() if training else self.prefix(self.used)

    def training_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return what a forward multiplies while training."""
        raise NotImplementedError

    def prefix(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """Return the smaller adapter of that rank."""
        return self.a[:rank], self.b[:, :rank], self.rank_scale[self.ranks.index(rank)]

    def forms(self) -> list[Form]:
        """Return one LowRank form that can be cut."""
        a, bt = self.a.detach().cpu(), self.b.detach().t().contiguous().cpu()
        return [LowRank(a.numpy(), bt.numpy(), self.scale, self.ranks, self.rank_scale)]


class NestedBranches(SideBranches):
    """The branches of all slots."""

    def __init__(
        self, slots: Mapping[str, SlotWeight], make: Callable[[SlotWeight], NestedBranch]
    ) -> None:
        super().__init__(slots, make)
        self.nested = [branch for branch in self.each() if isinstance(branch, NestedBranch)]

    def use_rank(self, rank: int) -> None:
        """Let forwards that do not train run at ``rank``, to see how good each rank is.

        Raises:
            UnsupportedError: If it is none of the ranks that are trained.
        """
        ranks = self.nested[0].ranks
        if rank not in ranks:
            known = ", ".join(map(str, ranks))
            raise UnsupportedError(f"rank {rank} is not among the ranks in training: {known}")
        for branch in self.nested:
            branch.used = rank
