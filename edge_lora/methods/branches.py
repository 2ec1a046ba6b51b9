"""Low-rank side branches: what every method of the LoRA family hooks onto its slots.

    y = W x + scale * B A dropout(x)

A is (rank, in_features), B (out_features, rank), where a convolution's slot is read as
(out_channels, the rest flattened) and an embedding's as it is, (rows, width): an embedding looks
its rows up in B. Both are fp32 whatever the base is; the branch is computed in fp32 outside
autocast and rounded once to the layer's output dtype. The modules stay as they are: a branch is a
forward hook. A module that shares its weight with others (a tied head) gets the branch like them.

A method subclasses ``SideBranch`` and says what it trains and which factors a forward multiplies.
"""

import math
from collections.abc import Callable, Mapping
from types import UnionType

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import Form, LowRank
from edge_lora.methods.attached import Trained, module_key, slot_seed
from edge_lora.methods.base_slots import SlotWeight, is_transformers_conv1d


class SideBranch(nn.Module):
    """The factors of one slot.

    Attributes:
        a: (rank, in_features) fp32, Kaiming uniform at first; of an embedding normal, as PEFT.
        b: (out_features, rank) fp32, zero at first.
        scale: Multiplies the branch.
    """

    def __init__(
        self, weight: SlotWeight, rank: int, scale: float, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        out_features, in_features = weight.matrix.shape
        generator = torch.Generator().manual_seed(slot_seed(seed, weight.name))
        a = torch.empty(rank, in_features)
        if weight.kind == "embedding":
            nn.init.normal_(a, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        device = weight.parameter.device
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(self.initial_b(out_features, rank, generator).to(device))
        self.name = weight.name
        self.scale = scale
        self.dropout = dropout
        self.handles = [module.register_forward_hook(self._add) for module in weight.modules]

    def initial_b(self, out_features: int, rank: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return B at first: zero, so that the adapted model starts as the base."""
        return torch.zeros(out_features, rank)

    def factors(self, training: bool) -> tuple[Tensor, Tensor, float]:  # noqa: ARG002
        """Return A, B and the scale of this forward."""
        return self.a, self.b, self.scale

    def combine(self, module: nn.Module, output: Tensor, branch: Tensor) -> Tensor:  # noqa: ARG002
        """Return the layer's new output from its own and the scaled branch's."""
        return output + branch

    def forms(self) -> list[Form]:
        """Return what was trained as forms of the slot."""
        bt = self.b.detach().t().contiguous()
        return [LowRank(self.a.detach().cpu().numpy(), bt.cpu().numpy(), self.scale)]

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b, scale = self.factors(module.training)
        dropout = self.dropout if module.training else 0.0
        branch = low_rank_output(module, inputs[0], a, b, dropout) * scale
        return self.combine(module, output, branch).to(output.dtype)


class SideBranches(Trained):
    """The branches of all slots."""

    def __init__(
        self, slots: Mapping[str, SlotWeight], make: Callable[[SlotWeight], SideBranch]
    ) -> None:
        super().__init__()
        _refuse_what_has_no_delta(slots)
        self.branches = nn.ModuleDict({module_key(n): make(weight) for n, weight in slots.items()})

    def each(self) -> list[SideBranch]:
        """Return the branches in the order of the slots."""
        return [branch for branch in self.branches.values() if isinstance(branch, SideBranch)]

    def forms(self) -> dict[str, list[Form]]:
        """Return the forms of every slot."""
        return {branch.name: branch.forms() for branch in self.each()}

    def restore(self) -> None:
        """Remove the hooks; the weights were never touched."""
        for branch in self.each():
            for handle in branch.handles:
                handle.remove()


def low_rank_output(
    module: nn.Module, x: Tensor, a: Tensor, b: Tensor, dropout: float = 0.0
) -> Tensor:
    """Return what ``module`` would give for ``x`` if its weight were ``b @ a``, without a bias.

    Args:
        module: Linear, transformers' Conv1D, Embedding, Conv1d or Conv2d.
        x: Its input; ids of an embedding.
        a: (rank, in_features), in_features of a convolution being in_channels / groups * kernel.
        b: (out_features, rank).
        dropout: Probability of dropping an input (never an id).
    """
    if isinstance(module, nn.Embedding):
        return F.embedding(x, b, module.padding_idx) @ a
    x = F.dropout(x.to(a.dtype), dropout, dropout > 0)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        rank, window = len(a), tuple(module.weight.shape[1:])
        ones = (1,) * len(module.kernel_size)
        kernel = a.view(rank, *window).repeat(module.groups, *ones, 1)  # the same A for each group
        h = module._conv_forward(x, kernel, None)  # (n, groups * rank, …), as the module slides
        product = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
        return product(h, b.view(*b.shape, *ones), groups=module.groups)
    return F.linear(F.linear(x, a), b)


def number_problems(rank: int, dropout: float, **finite: float) -> list[str]:
    """Return what is impossible among the numbers that most configs share."""
    problems = []
    if not _is_number(rank, int) or rank < 1:
        problems.append(f"rank is {rank!r}, must be at least 1")
    problems += [
        f"{name} is {value!r}, must be finite"
        for name, value in finite.items()
        if not _is_number(value, int | float) or not math.isfinite(value)
    ]
    if not _is_number(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"dropout is {dropout!r}, must be in [0, 1)")
    return problems


def _is_number(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def refuse(problems: list[str]) -> None:
    """Raise UnsupportedError with all problems, if there are any."""
    if problems:
        raise UnsupportedError("; ".join(problems))


def _refuse_what_has_no_delta(slots: Mapping[str, SlotWeight]) -> None:
    """Refuse modules whose output is not linear in the weight, or that are unknown."""
    problems = []
    for name, weight in slots.items():
        for module in weight.modules:
            if isinstance(module, nn.Embedding):
                if module.max_norm is not None:
                    problems.append(f"{name}: an embedding with max_norm rewrites its own rows")
            elif not (
                isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
                or is_transformers_conv1d(module)
            ):
                problems.append(f"{name}: read by a {type(module).__name__}")
    if problems:
        raise UnsupportedError(list_all("slots that a low-rank branch cannot follow", problems))
