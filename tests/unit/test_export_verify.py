"""The exporter's own checks must fail when they should."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edge_lora.bundle import read_manifest
from edge_lora.bundle_check import verify_fingerprint, verify_slots
from edge_lora.errors import BundleError, UnsupportedError
from edge_lora.export import export_bundle
from edge_lora.export.onnx_passes import LAYOUT, FoldWeightTransposes
from edge_lora.export.parity import relative_error
from edge_lora.export.plan import plan_generic
from edge_lora.export.verify import verify_outputs
from edge_lora.slots import Slot

pytestmark = [pytest.mark.torch, pytest.mark.ort]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)).eval()
    out = tmp_path_factory.mktemp("bundle") / "out"
    export_bundle(model, out, example_inputs={"input": torch.randn(2, 5, 6)}, progress=False)
    return model, out


def test_slot_bytes_that_differ_are_named(bundle, tmp_path):
    _, out = bundle
    manifest = read_manifest(out)
    verify_slots(out, manifest)
    (tmp_path / "onnx").mkdir()
    damaged = bytearray((out / "onnx/weights.bin").read_bytes())
    damaged[manifest.stored["1.weight"].offset] ^= 1
    (tmp_path / "onnx/weights.bin").write_bytes(damaged)
    with pytest.raises(BundleError, match=r"1\.weight") as caught:
        verify_slots(tmp_path, manifest)
    assert "0.weight" not in str(caught.value)


def test_the_fingerprint_is_that_of_the_slot_table(bundle):
    _, out = bundle
    assert verify_fingerprint(read_manifest(out))


def test_a_wrong_layout_is_caught(bundle):
    _, out = bundle
    manifest = read_manifest(out)
    place = manifest.stored["0.weight"]
    other = "oi" if place.layout == "io" else "io"
    stored = {**manifest.stored, "0.weight": dataclasses.replace(place, layout=other)}
    with pytest.raises(BundleError, match=r"0\.weight"):
        verify_slots(out, dataclasses.replace(manifest, stored=stored))


def test_an_output_that_differs_from_torch_is_named(bundle):
    model, out = bundle
    plan = plan_generic(model, {"input": torch.randn(2, 5, 6)}, None)
    assert verify_outputs(out / "onnx/model.onnx", plan, "F32") < 1e-5
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    try:
        with pytest.raises(UnsupportedError, match=r"output 'output_0' on input .*relative error"):
            verify_outputs(out / "onnx/model.onnx", plan, "F32")
    finally:
        with torch.no_grad():
            model[1].weight[0, 0] -= 1


def test_offsets_are_on_pages_and_small_tensors_inline(bundle):
    _, out = bundle
    manifest = read_manifest(out)
    assert all(place.offset % 4096 == 0 for place in manifest.stored.values())
    graph = ir.load(out / "onnx/model.onnx").graph
    external = {
        name
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert external == set(manifest.stored)


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0], [0.0], 0.0),
        ([[]], [[]], 0.0),
        ([np.nan], [1.0], np.inf),
        ([-np.inf, 1.0], [-np.inf, 1.0], 0.0),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_relative_error(found, expected, error):
    assert relative_error(np.array(found), np.array(expected)) == error


def test_a_pass_refuses_a_graph_without_the_weight():
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    fold = FoldWeightTransposes([Slot("w", (2, 3), "F32", "")])
    with pytest.raises(ir.passes.PreconditionError, match="w is not an initializer"):
        fold(model)


def test_a_weight_that_something_else_reads_keeps_its_transposition():
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((2, 3), np.float32)))
    weight.meta[LAYOUT] = "oi"
    turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
    other = ir.node("Neg", [weight])
    outputs = [turned.outputs[0], other.outputs[0]]
    graph = ir.Graph([], outputs, nodes=[turned, other], initializers=[weight])
    result = FoldWeightTransposes([Slot("w", (2, 3), "F32", "")])(ir.Model(graph, ir_version=10))
    assert not result.modified
    assert weight.meta[LAYOUT] == "oi"
