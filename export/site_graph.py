"""Sites as optional inputs: a bottleneck beside a module, switched off by default.

Everything about the branch is chosen at run time: what it reads, its activations, its width. All of
it stands behind one ``If``, so an idle site costs one node; that is no more than a branch of width
zero with one fixed activation, which would need five nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import onnx_ir as ir

from edge_lora.bundle_sites import ACTIVATIONS, BundleSite, SiteInputs
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.export.onnx_passes import SlotPass
from edge_lora.export.site_markers import markers
from edge_lora.forms import VALUE_DTYPES
from edge_lora.slots import Slot

SWITCH = "bottlenecks.on"
_NODES = {
    "none": None,
    "relu": ("Relu", {}),
    "gelu": ("Gelu", {}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
}


def site_inputs(name: str) -> SiteInputs:
    """Return the names of a site's graph inputs."""
    names = {f.name: f"{name}.bottleneck.{f.name}" for f in fields(SiteInputs)}
    return SiteInputs(**{**names, "switch": SWITCH})


def add_sites(
    model: ir.Model, slots: Sequence[Slot], sites: Mapping[str, Slot]
) -> dict[str, BundleSite]:
    """Replace the markers of ``sites`` in ``model``; return what the manifest says of each.

    Raises:
        UnsupportedError: If the traced forward did not pass a site; lists all such sites.
    """
    marked = markers(model.graph)
    absent = [name for name in sites if name not in marked]
    if absent:
        raise UnsupportedError(list_all("sites that the traced forward does not pass", absent))
    add = AddSites(slots, sites)
    add(model)
    return add.found


class AddSites(SlotPass):
    """Replace every marker by its branch; ``found`` then says what the manifest says of each."""

    def __init__(self, slots: Sequence[Slot], sites: Mapping[str, Slot]) -> None:
        """Expect a marker for each of ``sites``; ``slots`` are weights that must stay."""
        super().__init__(slots)
        self.sites = sites
        self.found: dict[str, BundleSite] = {}

    def requires(self, model: ir.Model) -> None:
        """Raise PreconditionError unless every weight and every marker is there."""
        super().requires(model)
        if lost := [name for name in self.sites if name not in markers(model.graph)]:
            raise ir.passes.PreconditionError(f"sites without a marker: {lost}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the inputs and branches."""
        graph = model.graph
        marked = markers(graph)
        switch = _add_switch(graph) if marked else None
        for name, nodes in marked.items():
            assert switch is not None
            values = {**_add_inputs(graph, self.sites[name]), "switch": switch}
            for node in nodes:
                _replace(graph, node, values)
            self.found[name] = BundleSite(site_inputs(name))
        model.opset_imports.pop("edge_lora", None)
        return ir.passes.PassResult(model, modified=bool(marked))

    def ensures(self, model: ir.Model) -> None:
        """Raise PostconditionError if a weight is lost or a marker is left."""
        super().ensures(model)
        if left := markers(model.graph):
            raise ir.passes.PostconditionError(f"sites still marked: {list(left)}")


def _add_switch(graph: ir.Graph) -> ir.Value:
    """Return the condition of every branch: one number, which adapter files can hold."""
    number = _add_input(graph, SWITCH, np.zeros(1, np.int64), (1,))
    cast = ir.node("Cast", [number], {"to": ir.DataType.BOOL}, name=SWITCH)
    cast.outputs[0].name = f"{SWITCH}.bool"
    graph.insert_before(graph[0], cast)
    return cast.outputs[0]


def _add_inputs(graph: ir.Graph, slot: Slot) -> dict[str, ir.Value]:
    d_out, d_in = slot.shape
    dtype = VALUE_DTYPES[slot.dtype]
    rank = f"{slot.name}.rank"
    names = site_inputs(slot.name)
    units = np.zeros(len(ACTIVATIONS), np.int64)
    return {
        "down_in": _add_input(
            graph, names.down_in, np.zeros((d_in, 0), dtype), (d_in, f"{rank}_in")
        ),
        "down_out": _add_input(
            graph, names.down_out, np.zeros((d_out, 0), dtype), (d_out, f"{rank}_out")
        ),
        "down_bias": _add_input(graph, names.down_bias, np.zeros(0, dtype), (rank,)),
        "units": _add_input(graph, names.units, units, units.shape),
        "up": _add_input(graph, names.up, np.zeros((0, d_out), dtype), (rank, d_out)),
        "up_bias": _add_input(graph, names.up_bias, np.zeros(d_out, dtype), (d_out,)),
    }


def _add_input(
    graph: ir.Graph, name: str, default: np.ndarray, shape: tuple[int | str, ...]
) -> ir.Value:
    tensor = ir.tensor(default, name=name)
    value = ir.val(name, tensor.dtype, ir.Shape(shape))
    value.const_value = tensor
    graph.inputs.append(value)
    graph.initializers.add(value)
    return value


def _replace(graph: ir.Graph, marker: ir.Node, values: Mapping[str, ir.Value]) -> None:
    z, y = marker.inputs
    assert z is not None
    assert y is not None
    name, passed = marker.name or "", marker.outputs[0]
    branch = _branch(name, z, y, values)
    idle = ir.node("Identity", [y], name=f"{name}/idle")
    idle.outputs[0].name = f"{name}/idle"
    switch = ir.node(
        "If",
        [values["switch"]],
        {"then_branch": _graph(f"{name}/on", branch), "else_branch": _graph(f"{name}/off", [idle])},
        name=name,
    )
    result = switch.outputs[0]
    result.name, result.shape, result.type = passed.name, y.shape, y.type
    passed.name = f"{passed.name}.marker"
    graph.insert_before(marker, switch)
    passed.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(marker, safe=True)


def _graph(name: str, nodes: list[ir.Node]) -> ir.Graph:
    return ir.Graph([], nodes[-1].outputs, nodes=nodes, name=name)


def _branch(name: str, z: ir.Value, y: ir.Value, values: Mapping[str, ir.Value]) -> list[ir.Node]:
    """Return nodes that compute y + act(z @ down_in + y @ down_out + down_bias) @ up + up_bias."""
    nodes: list[ir.Node] = []

    def add(label: str, kind: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"{name}/{label}")  # type: ignore[arg-type]
        node.outputs[0].name = f"{name}/{label}"
        nodes.append(node)
        return node.outputs[0]

    from_z = add("down_in", "MatMul", [z, values["down_in"]])
    from_y = add("down_out", "MatMul", [y, values["down_out"]])
    down = add("down", "Add", [from_z, from_y])
    middle = add("down_bias", "Add", [down, values["down_bias"]])
    split = ir.node(
        "Split",
        [middle, values["units"]],
        {"axis": -1},
        num_outputs=len(ACTIVATIONS),
        name=f"{name}/split",
    )
    nodes.append(split)
    parts = []
    for act, part in zip(ACTIVATIONS, split.outputs, strict=True):
        part.name = f"{name}/{act}_in"
        kind = _NODES[act]
        parts.append(part if kind is None else add(act, kind[0], [part], **kind[1]))
    active = add("active", "Concat", parts, axis=-1)
    up = add("up", "MatMul", [active, values["up"]])
    biased = add("up_bias", "Add", [up, values["up_bias"]])
    add("out", "Add", [y, biased])
    return nodes
