"""Where sites are in the graph: a marker that the tracer keeps, so that nobody has to guess.

While the model is traced, a hook on every site's module passes what the branch will read and the
module's output through a custom operator. It comes out of the translator as one node, which
``site_graph`` replaces by the branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError
from edge_lora.export.plan import Plan
from edge_lora.methods.sites import Site, input_of, output_of, with_output

DOMAIN, MARKER = "edge_lora", "Site"
_SCHEMA = onnx.defs.OpSchema(
    MARKER,
    DOMAIN,
    1,
    inputs=[onnx.defs.OpSchema.FormalParameter(name, "T") for name in ("z", "y")],
    outputs=[onnx.defs.OpSchema.FormalParameter("out", "T")],
    type_constraints=[("T", [f"tensor({t})" for t in ("float", "float16", "bfloat16")], "")],
    attributes=[onnx.defs.OpSchema.Attribute("name", onnx.defs.OpSchema.AttrType.STRING)],
)
_OPERATOR = values.Op(values.Opset(DOMAIN, 1), MARKER, _SCHEMA)


@torch.library.custom_op("edge_lora::site", mutates_args=())
def _mark(z: Tensor, y: Tensor, name: str) -> Tensor:
    """Return y; the tracer keeps the call."""
    del z, name
    return y.clone()


@_mark.register_fake
def _(z: Tensor, y: Tensor, name: str) -> Tensor:
    del z, name
    return torch.empty_like(y)


def _translated(z: Any, y: Any, name: str) -> Any:  # noqa: ANN401  (tensors of the translator)
    return _OPERATOR(z, y, name=name)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.edge_lora.site.default: _translated
}
"""For ``torch.onnx.export(custom_translation_table=…)``."""


def marking(plan: Plan, sites: Mapping[str, Site]) -> Plan:
    """Return the plan that also marks ``sites`` while it is traced."""

    @contextlib.contextmanager
    def tracing() -> Iterator[None]:
        with plan.while_tracing(), marked(sites):
            yield

    return replace(plan, while_tracing=tracing) if sites else plan


@contextlib.contextmanager
def marked(sites: Mapping[str, Site]) -> Iterator[None]:
    """Mark every site in what runs inside the block."""
    read: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for site in sites.values():
            if not site.is_plain:
                handle = site.source.register_forward_pre_hook(
                    _keeper(site, read), with_kwargs=True
                )
                hooks.callback(handle.remove)
            marker = _marker(site, read)
            handle = site.module.register_forward_hook(marker, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _keeper(site: Site, read: dict[str, Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        del module
        read[site.name] = input_of(args, kwargs)

    return keep


def _marker(site: Site, read: dict[str, Tensor]) -> Callable[..., Any]:
    def mark(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401
        del module
        z = input_of(args, kwargs) if site.is_plain else read.get(site.name)
        if z is None:
            raise UnsupportedError(f"site {site.name!r}: its source runs after its module")
        y = output_of(output)
        site.check(z, y)
        return with_output(output, _mark(z, y, site.name))

    return mark


def markers(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """Return the marker nodes of a graph, by the name of their site."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph:
        if (node.domain, node.op_type) == (DOMAIN, MARKER):
            found.setdefault(node.attributes["name"].as_string(), []).append(node)
    return found
