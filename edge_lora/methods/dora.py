"""DoRA: LoRA for the direction of every output's weights, one trained number for their length.

    W' = (m / ||W + scale B A||) (W + scale B A)          norms of rows, held constant in backward
    y  = W x + (gain - 1) W x + gain scale B A dropout(x)          gain = m / norm

| symbol | here | init |
|---|---|---|
| A, B | ``a`` (rank, in_features), ``b`` (out_features, rank) | as LoRA |
| m | ``magnitude`` (out_features) | norms of the rows of W |
| scale | alpha / rank | |

The norm is computed from factors, so no array of the weight's size is ever made:

    ||W + s B A||^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

As in PEFT, an embedding has one length for each column, and its factors change places above.
Lowers to two forms that add up: LowRank with the gain in B, and RowScale of gain - 1.

Source: Liu et al. 2024, arXiv:2402.09353. Difference: W x is not computed a second time for the
dropped-out input; without dropout it is the same.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import Form, LowRank, RowScale
from edge_lora.methods.attached import Trained
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.branches import SideBranch, SideBranches
from edge_lora.methods.lora import LoraConfig
from edge_lora.slots import SlotKind

_SCRATCH_ENTRIES = 1 << 22  # of one block of rows in fp32, where the base is of half precision


class DoraBranch(SideBranch):
    """The factors and the magnitude of one slot.

    Attributes:
        magnitude: (out_features,) fp32; of an embedding (in_features,).
        squares: Of the rows (columns) of the base, their squared norms; not part of the state.
    """

    squares: Tensor

    def __init__(self, weight: SlotWeight, config: LoraConfig) -> None:
        scale = config.alpha / config.rank
        super().__init__(weight, config.rank, scale, config.dropout, config.seed)
        self.weight = [weight]  # in a list: it is the model's, not a parameter of this module
        self.is_embedding = weight.kind == "embedding"
        self.register_buffer("squares", squared_norms(self._base()), persistent=False)
        self.magnitude = nn.Parameter(self.squares.sqrt())

    def _base(self) -> Tensor:
        matrix = self.weight[0].matrix
        return matrix.t() if self.is_embedding else matrix

    def gain(self) -> Tensor:
        """Return what every row (of an embedding, column) is multiplied by."""
        a, b = self.a.detach(), self.b.detach()
        if self.is_embedding:
            a, b = b.t(), a.t()
        return self.magnitude / norms(self._base(), self.squares, a, b, self.scale)

    def combine(self, module: nn.Module, output: Tensor, branch: Tensor) -> Tensor:
        """Return gain * (W x + branch) + bias, stably for a gain near one."""
        gain, bias = self.gain(), getattr(module, "bias", None)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            ones = (1,) * len(module.kernel_size)
            gain, bias = gain.view(-1, *ones), None if bias is None else bias.view(-1, *ones)
        product = output if bias is None else output - bias
        return output + ((gain - 1) * product + gain * branch)

    @torch.no_grad()
    def forms(self) -> list[Form]:
        """Return a LowRank form with the gain in one factor, and the gain of the base."""
        gain, a, bt = self.gain(), self.a.detach(), self.b.t()
        if self.is_embedding:
            a = a * gain
        else:
            bt = bt * gain
        low_rank = LowRank(a.cpu().numpy(), bt.contiguous().cpu().numpy(), self.scale)
        change = (gain - 1).cpu().numpy()
        return [low_rank, RowScale(change, axis="col" if self.is_embedding else "row")]


class DoRA:
    """The method."""

    config_class: ClassVar[type] = LoraConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"linear", "embedding", "conv"})

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, SlotWeight], config: LoraConfig) -> Trained:  # noqa: ARG004
        """Hook a branch onto every slot."""
        tied = [
            name
            for name, weight in slots.items()
            if weight.kind == "embedding"
            and not all(isinstance(module, nn.Embedding) for module in weight.modules)
        ]
        if tied:
            title = "embeddings that are an output layer too cannot have a length for each column"
            raise UnsupportedError(f"{list_all(title, tied)}\nUse method 'lora' for them")
        return SideBranches(slots, lambda weight: DoraBranch(weight, config))


@torch.no_grad()
def squared_norms(weight: Tensor) -> Tensor:
    """Return the squared norms of the rows of ``weight`` (m, n), fp32 (m,)."""
    return torch.cat([torch.linalg.vector_norm(block, dim=1) for block in _blocks(weight)]).square()


@torch.no_grad()
def norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the norms of the rows of ``weight + scale * b @ a`` without forming it; 1 for a 0.

    Args:
        weight: (m, n), fp32, fp16 or bf16.
        squares: ``squared_norms(weight)``.
        a: (rank, n) fp32.
        b: (m, rank) fp32.
        scale: Of the product.

    Cost:
        2 * m * n * rank FLOP, scratch m * rank; and 16 MiB where the weight is not fp32.
    """
    with torch.autocast(weight.device.type, enabled=False):
        cross = torch.cat([block @ a.t() for block in _blocks(weight)])  # (m, rank)
        change = 2 * (cross * b).sum(1) + scale * ((b @ (a @ a.t())) * b).sum(1)
    lengths = (squares + scale * change).clamp(min=0).sqrt()
    return lengths.masked_fill(lengths == 0, 1.0)  # a row of zeros has no direction to keep


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    """Yield blocks of rows in fp32: all rows at once if that needs no copy."""
    if weight.dtype == torch.float32:
        yield weight
        return
    for block in torch.split(weight, max(1, _SCRATCH_ENTRIES // weight.shape[1])):
        yield block.float()
