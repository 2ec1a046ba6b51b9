"""The sites of a torch model: modules whose output a bottleneck is added to.

The exporter and the training methods both call ``match_sites``, so that they agree on names and
shapes. The name of a site is its module's; the branch reads that module's input, unless the name
is ``from->module``: then it reads the input of another module that ran before. So Bi-AdaptFormer,
which reads the block's x before the norm, stands at ``blocks.3.norm2->blocks.3.mlp``.

Widths are read from the weights: d_in is what the first linear layer inside the source takes, d_out
what the last one inside the module gives (a norm: the length of its weight). The first forward
checks them.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edge_lora.errors import ShapeError, UnknownNameError, UnsupportedError, list_all
from edge_lora.methods.base_slots import DTYPE_NAMES, is_transformers_conv1d
from edge_lora.slots import Slot, match_names

ARROW = "->"


@dataclass(frozen=True, eq=False)
class Site:
    """Where a bottleneck can stand.

    Attributes:
        name: The module's name, or ``from->module``.
        module: Its output gets the branch added.
        source: Its input is what a parallel branch reads; ``module`` itself for a plain name.
        shape: (d_out, d_in): width of the output of ``module``, of the input of ``source``.
    """

    name: str
    module: nn.Module
    source: nn.Module
    shape: tuple[int, int]

    @property
    def is_plain(self) -> bool:
        """Whether the branch reads the input of the module that it is added to."""
        return self.source is self.module

    def slot(self) -> Slot:
        """Return the site as a slot; its dtype is that of the module's first weight."""
        parameter = next(self.module.parameters())
        if parameter.dtype not in DTYPE_NAMES:
            raise UnsupportedError(f"{self.name} is {parameter.dtype}, must be fp32, fp16 or bf16")
        return Slot(self.name, self.shape, DTYPE_NAMES[parameter.dtype], "", "site")

    def check(self, z: Tensor, y: Tensor) -> None:
        """Raise ShapeError if input ``z`` or output ``y`` has not the width that was read off."""
        found = (y.shape[-1], z.shape[-1])
        if found != self.shape:
            raise ShapeError(
                f"site {self.name!r}: output and input are {found} wide, its linear layers say "
                f"{self.shape}. Choose a module whose first and last linear layers are its ends"
            )


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a module call reads: its first tensor argument."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ShapeError("a module at a site was called without a tensor")


def output_of(output: Any) -> Tensor:  # noqa: ANN401  (what a module returned)
    """Return the tensor that a branch is added to: the output, or the first of several."""
    first: Tensor = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise ShapeError(f"a module at a site returned {type(first).__name__}, not a tensor")
    return first


def with_output(output: Any, y: Tensor) -> Any:  # noqa: ANN401
    """Return what a module returned, with ``y`` in place of ``output_of``."""
    if isinstance(output, tuple) and hasattr(output, "_replace"):  # a NamedTuple
        return type(output)(y, *output[1:])
    if isinstance(output, tuple | list):
        return type(output)([y, *output[1:]])
    return y


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Return every plain site of ``model`` by name, in the model's order; reads no data."""
    sites = {}
    for name, module in _modules(model).items():
        d_out, d_in = _width(module, -1), _width(module, 0)
        if d_out is not None and d_in is not None:
            sites[name] = Site(name, module, module, (d_out, d_in))
    return sites


def match_sites(model: nn.Module, patterns: Sequence[str]) -> dict[str, Site]:
    """Return the sites that match any pattern, in the model's order.

    Args:
        model: Any torch module.
        patterns: Shell globs over module names, ``"*.mlp"``, or two of them with an arrow,
            ``"*.norm2->*.mlp"``: they pair modules of one parent; two names without a star pair in
            any place.

    Raises:
        UnknownNameError: If a pattern matches nothing, or a source has no known input width.
    """
    plain = find_sites(model)
    wanted = [pattern for pattern in patterns if ARROW not in pattern]
    sites = [plain[name] for name in match_names(wanted, list(plain))] if wanted else []
    problems = []
    for pattern in patterns:
        if ARROW in pattern:
            pairs = _pairs(model, pattern)
            problems += [] if pairs else [f"{pattern!r} pairs no two modules of one parent"]
            sites += pairs
    if problems:
        raise UnknownNameError(list_all("no sites found", problems))
    order = {id(module): i for i, module in enumerate(model.modules())}
    unique = {site.name: site for site in sites}
    return {s.name: s for s in sorted(unique.values(), key=lambda s: order[id(s.module)])}


def default_sites(model: nn.Module) -> dict[str, Site]:
    """Return the sites that are adapted when the caller names none: modules named ``mlp``."""
    return {n: site for n, site in find_sites(model).items() if n.rsplit(".", 1)[-1] == "mlp"}


def _pairs(model: nn.Module, pattern: str) -> list[Site]:
    left, right = (part.strip() for part in pattern.split(ARROW, 1))
    modules = _modules(model)
    sources = fnmatch.filter(modules, left)
    anywhere = left in modules and right in modules
    pairs = []
    for name in fnmatch.filter(modules, right):
        for source in sources:
            if source == name or not (anywhere or _parent(source) == _parent(name)):
                continue
            d_out, d_in = _width(modules[name], -1), _width(modules[source], 0)
            if d_out is not None and d_in is not None:
                site_name = f"{source}{ARROW}{name}"
                pairs.append(Site(site_name, modules[name], modules[source], (d_out, d_in)))
    return pairs


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    lists = (nn.ModuleList, nn.ModuleDict)  # these are never called
    return {n: m for n, m in model.named_modules() if n and not isinstance(m, lists)}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _width(module: nn.Module, end: int) -> int | None:
    """Return the width of the input (``end`` 0) or the output (``end`` -1), if it can be seen."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear) or is_transformers_conv1d(m)]
    if linears:
        out_in = tuple(linears[end].get_parameter("weight").shape)
        out_in = out_in[::-1] if is_transformers_conv1d(linears[end]) else out_in
        return out_in[0 if end else 1]
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 1 else None
