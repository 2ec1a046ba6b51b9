"""Bi-AdaptFormer: a small network beside each MLP, of few bits or of fp32 (then AdaptFormer).

    y + scale * Q(up) dropout(act(Q(down) z))

| symbol | here | init |
|---|---|---|
| z | the site's input ("parallel") or its output y ("sequential") | |
| down | ``down`` (rank, width of z), fp32 shadow | Kaiming uniform with a = sqrt(5) |
| up | ``up`` (d_out, rank), fp32 shadow | normal of std 1e-3, cut at 2e-3; 0 without codes |
| Q | ``coded_weight.seen_through_codes``; nothing if ``bits`` is None | |

No biases. Lowers to Bottleneck, which runs beside the base. A classifier can be trained along with
it (Bi-Head): its weight is replaced by one of as many bits; its bias stays. Such an adapter is
fused there, so it runs as the active adapter of a session, not for one call alone.

Sites by default are the modules named ``mlp``. The paper reads the block's input before the norm:
``slots=["*.norm2->*.mlp"]``. A branch after the whole block is sequential at the block:
``slots=["blocks.*"], placement="sequential"``.

Source: Jie, Wang, Deng 2023, arXiv:2307.16867; Chen et al. 2022, AdaptFormer, arXiv:2205.13535.
Differences: any site, 8 bits, smaller groups; AdaptFormer's biases are left out as in the former.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edge_lora.codebook import Group
from edge_lora.errors import UnsupportedError
from edge_lora.forms import Activation, Bottleneck, Dense, Form, Values
from edge_lora.methods.attached import Trained, module_key, slot_seed
from edge_lora.methods.base_slots import SlotWeight, find_weights
from edge_lora.methods.bilora import coding_problems, small_normal
from edge_lora.methods.branches import number_problems, refuse
from edge_lora.methods.coded_weight import coded, seen_through_codes
from edge_lora.methods.sites import Site, input_of, output_of, with_output
from edge_lora.slots import SlotKind, match_names

Placement = Literal["parallel", "sequential"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class BiAdaptFormerConfig:
    """What can be set.

    Attributes:
        rank: Width of the middle.
        bits: Of one value: 1, 2, 4, 8, or null for fp32.
        group: What shares one mean and spread: "tensor", "row" or a number of values.
        scale: Multiplies the branch.
        act: none, relu, gelu (exact) or gelu_tanh.
        placement: "parallel" reads the site's input, "sequential" its output.
        dropout: Probability of dropping a value of the middle while training, in [0, 1).
        head: Glob of one linear slot to train in full, with as many bits; null for none.
        seed: Of the init; each site derives its own.
    """

    rank: int = 8
    bits: int | None = 1
    group: Group = "tensor"
    scale: float = 1.0
    act: Activation = "relu"
    placement: Placement = "parallel"
    dropout: float = 0.0
    head: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown names and impossible numbers."""
        problems = number_problems(self.rank, self.dropout, scale=self.scale)
        if self.bits is not None:
            problems += coding_problems(self.bits, self.group)
        for name, value, known in (
            ("act", self.act, get_args(Activation)),
            ("placement", self.placement, get_args(Placement)),
        ):
            if value not in known:
                problems.append(f"{name} is {value!r}, must be one of {', '.join(known)}")
        refuse(problems)


class Shadow(nn.Module):
    """A trained matrix, seen through its codes if it has any.

    Attributes:
        weight: fp32.
    """

    def __init__(self, weight: Tensor, bits: int | None, group: Group) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bits, self.group = bits, group

    def forward(self) -> Tensor:
        """Return what a forward multiplies."""
        if self.bits is None:
            return self.weight
        return seen_through_codes(self.weight, self.bits, self.group)

    def values(self) -> Values:
        """Return what a device multiplies: the same, to the bit."""
        if self.bits is None:
            array: Values = self.weight.detach().cpu().numpy()
            return array
        return coded(self.weight.detach(), self.bits, self.group)


class SiteBranch(nn.Module):
    """The network of one site."""

    def __init__(self, site: Site, config: BiAdaptFormerConfig) -> None:
        super().__init__()
        d_out, d_in = site.shape
        width = d_in if config.placement == "parallel" else d_out
        generator = torch.Generator().manual_seed(slot_seed(config.seed, site.name))
        down = torch.empty(config.rank, width)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros(d_out, config.rank)
        if config.bits is not None:
            up = small_normal(d_out, config.rank, generator)
        device = next(site.module.parameters()).device
        self.down = Shadow(down.to(device), config.bits, config.group)
        self.up = Shadow(up.to(device), config.bits, config.group)
        self.site, self.config = [site], config  # in a list: its modules are not this one's
        self._z: Tensor | None = None
        self.handles = [site.module.register_forward_hook(self._add, with_kwargs=True)]
        if not site.is_plain:
            keep = site.source.register_forward_pre_hook(self._keep, with_kwargs=True)
            self.handles.append(keep)

    def forward(self, z: Tensor, training: bool) -> Tensor:
        """Return the scaled branch for ``z``, (…, width of z), as (…, d_out) fp32."""
        middle = F.linear(z.to(self.down.weight.dtype), self.down())
        middle = F.dropout(_ACTIVATIONS[self.config.act](middle), self.config.dropout, training)
        return F.linear(middle, self.up()) * self.config.scale

    def form(self) -> Bottleneck:
        """Return the device's form of it."""
        config = self.config
        down, up = self.down.values(), self.up.values()
        return Bottleneck(down, up, config.scale, config.act, config.placement)

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._z = input_of(args, kwargs)

    def _add(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        site, y = self.site[0], output_of(output)
        z = input_of(args, kwargs) if site.is_plain else self._z
        self._z = None
        if z is None:
            raise UnsupportedError(
                f"site {site.name!r}: its source did not run before it. Swap the two names"
            )
        site.check(z, y)
        branch = self(y if self.config.placement == "sequential" else z, module.training)
        return with_output(output, (y + branch).to(y.dtype))


class Head(nn.Module):
    """A linear layer whose whole weight is trained; the layer's own stays as it is."""

    def __init__(self, slot: SlotWeight, config: BiAdaptFormerConfig) -> None:
        super().__init__()
        weight = slot.tensor.to(torch.float32, copy=True).contiguous()
        self.shadow = Shadow(weight, config.bits, config.group)
        self.name = slot.name
        self.handles = [module.register_forward_hook(self._replace) for module in slot.modules]

    def form(self) -> Dense:
        """Return the device's form of it."""
        return Dense(self.shadow.values(), mode="set")

    def _replace(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = module.bias.float() if isinstance(module.bias, Tensor) else None
        return F.linear(inputs[0].float(), self.shadow(), bias).to(output.dtype)


class SiteBranches(Trained):
    """The networks of all sites, and perhaps a head."""

    def __init__(
        self, sites: Mapping[str, Site], head: SlotWeight | None, config: BiAdaptFormerConfig
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {module_key(name): SiteBranch(site, config) for name, site in sites.items()}
        )
        self.head = None if head is None else Head(head, config)

    def _each(self) -> list[SiteBranch]:
        return [branch for branch in self.branches.values() if isinstance(branch, SiteBranch)]

    def forms(self) -> dict[str, list[Form]]:
        """Return one Bottleneck per site, and a Dense form of the head."""
        forms: dict[str, list[Form]] = {b.site[0].name: [b.form()] for b in self._each()}
        if self.head is not None:
            forms[self.head.name] = [self.head.form()]
        return forms

    def restore(self) -> None:
        """Remove the hooks; no weight was touched."""
        handles = [handle for branch in self._each() for handle in branch.handles]
        for handle in [*handles, *(self.head.handles if self.head is not None else [])]:
            handle.remove()


class BiAdaptFormer:
    """The method."""

    config_class: ClassVar[type] = BiAdaptFormerConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"site"})

    @staticmethod
    def attach(model: nn.Module, sites: Mapping[str, Site], config: BiAdaptFormerConfig) -> Trained:
        """Hook a network onto every site."""
        if config.placement == "sequential" and not all(s.is_plain for s in sites.values()):
            raise UnsupportedError(
                "a sequential branch reads the output of its own module: name sites without '->'"
            )
        head = None if config.head is None else _find_head(model, config.head)
        return SiteBranches(sites, head, config)


def _find_head(model: nn.Module, pattern: str) -> SlotWeight:
    linear = {n: weight for n, weight in find_weights(model).items() if weight.kind == "linear"}
    names = match_names([pattern], list(linear))
    if len(names) != 1:
        raise UnsupportedError(
            f"head {pattern!r} matches {len(names)} linear slots, must be one: {', '.join(names)}"
        )
    return linear[names[0]]
