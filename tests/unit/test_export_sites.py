"""Sites and slots of biases: what the exporter refuses, and what it leaves alone."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from edge_lora.bundle import read_manifest
from edge_lora.errors import UnknownNameError, UnsupportedError
from edge_lora.export import export_bundle

pytestmark = [pytest.mark.torch, pytest.mark.ort]
X = {"x": torch.ones(2, 6)}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = torch.nn.Linear(6, 8), torch.nn.LayerNorm(8)
        self.second = torch.nn.Linear(8, 3)
        self.unused = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.norm(torch.relu(self.first(x))))


def refuse(tmp_path, error, match, **options):
    with pytest.raises(error, match=match):
        export_bundle(Net(), tmp_path / "out", example_inputs=X, progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def export(tmp_path, **options):
    export_bundle(Net(), tmp_path / "out", example_inputs=X, progress=False, **options)
    return read_manifest(tmp_path / "out")


def test_a_pattern_without_a_site_suggests_close_names(tmp_path):
    refuse(tmp_path, UnknownNameError, "'frst'.*'first'", sites=["frst"])


def test_a_site_that_forward_does_not_pass_is_named(tmp_path):
    refuse(tmp_path, UnsupportedError, "(?s)does not pass:.*unused", sites=["unused", "first"])


def test_a_source_that_runs_later_is_refused(tmp_path):
    refuse(tmp_path, UnsupportedError, "source runs after its module", sites=["second->first"])


def test_an_unknown_slot_form_lists_the_known(tmp_path):
    refuse(
        tmp_path, UnknownNameError, "'sparse'. Known: low_rank, row_scale", slot_forms=["sparse"]
    )


def test_a_bias_that_forward_does_not_read_is_named(tmp_path):
    refuse(tmp_path, UnsupportedError, r"unused\.bias", slot_names=["unused.bias"])


def test_the_graph_is_plain_onnx_and_idle_sites_are_the_base(tmp_path):
    export(tmp_path, sites=["first", "norm", "norm->second"])
    model = onnx.load(tmp_path / "out/onnx/model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert [node.op_type for node in model.graph.node].count("If") == 3
    path = tmp_path / "out/onnx/model.onnx"
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    export_bundle(Net(), tmp_path / "plain", example_inputs=X, progress=False)
    path = tmp_path / "plain/onnx/model.onnx"
    plain = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,), (expected,) = session.run(None, {"x": x}), plain.run(None, {"x": x})
    assert found.tobytes() == expected.tobytes()


def test_a_site_after_unnamed_values_keeps_every_name_single(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 5))
    example = {"input": torch.ones(3, 24)}
    export_bundle(net, tmp_path / "out", example_inputs=example, sites=["2"], progress=False)
    assert list(read_manifest(tmp_path / "out").sites) == ["2"]


def test_sites_do_not_change_the_fingerprint_and_the_same_model_gives_the_same_bytes(tmp_path):
    plain = export(tmp_path)
    first = export(tmp_path, sites=["first"])
    second = export(tmp_path, sites=["first"])
    assert plain.fingerprint == first.fingerprint
    assert first.files == second.files
    assert first.slots["first"].kind == "site"


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*"], {"first.weight", "second.weight"}),
        (["second"], {"second.weight"}),
        (["*.bias"], {"first.bias", "norm.bias", "second.bias"}),
        (["norm"], {"norm.weight"}),
        (["first", "first.bias"], {"first.weight", "first.bias"}),
    ],
)
def test_biases_and_norms_are_slots_only_where_a_pattern_means_them(patterns, names, tmp_path):
    net = Net()
    del net.unused
    export_bundle(
        net, tmp_path / "out", example_inputs=X, slot_names=patterns, slots="inputs",
        progress=False,
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest.slots) == names
    assert manifest.base_slots == 2
    others = {name for name, slot in manifest.slots.items() if slot.kind == "other"}
    assert others == names - {"first.weight", "second.weight"}
    assert not any(manifest.stored[name].lora_inputs for name in others)
