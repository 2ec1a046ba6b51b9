"""What the exporter refuses, with one clear message and nothing left behind."""

import pytest
import torch

from edge_lora.bundle import MANIFEST, read_manifest, verify_files
from edge_lora.errors import BundleError, UnknownNameError, UnsupportedError
from edge_lora.export import export_bundle

pytestmark = [pytest.mark.torch, pytest.mark.ort]


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(6, 8)
        self.down = torch.nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Branching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 6)

    def forward(self, x):
        return self.up(x) if float(x.sum()) > 0 else x


X = {"x": torch.ones(2, 6)}


def refuse(tmp_path, error, match, model=None, **options):
    with pytest.raises(error, match=match):
        export_bundle(model or Mlp(), tmp_path / "out", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_engine_and_slots_are_listed_together(tmp_path):
    options = {"engines": ("tflite",), "slots": "maybe", "example_inputs": X}
    refuse(
        tmp_path, UnknownNameError, "(?s)tflite.*onnxruntime, executorch.*maybe.*none", **options
    )


def test_a_pattern_without_a_slot_suggests_close_names(tmp_path):
    refuse(tmp_path, UnknownNameError, "'*.dwn'.*'down'", example_inputs=X, slot_names=["*.dwn"])


def test_a_model_that_does_not_trace_is_named(tmp_path):
    message = "(?s)Branching cannot be exported to ONNX.*control flow"
    refuse(tmp_path, UnsupportedError, message, model=Branching(), example_inputs=X)


def test_an_unknown_argument_is_named_with_the_known_ones(tmp_path):
    refuse(tmp_path, UnsupportedError, "no argument 'y'; it has: x", example_inputs={"y": X["x"]})


def test_inputs_that_the_model_cannot_take_are_refused(tmp_path):
    inputs = {"x": torch.ones(2, 5)}
    refuse(tmp_path, UnsupportedError, "does not run on the example", example_inputs=inputs)


def test_a_model_on_another_device_is_refused(tmp_path):
    refuse(tmp_path, UnsupportedError, "is on meta", model=Mlp().to("meta"), example_inputs=X)


def test_a_plain_module_is_no_language_model(tmp_path):
    refuse(tmp_path, UnsupportedError, "Mlp is not exported as causal-lm.*example_inputs")


def test_a_model_without_linear_layers_asks_for_names(tmp_path):
    model = torch.nn.Conv1d(2, 2, 1)
    inputs = {"input": torch.ones(1, 2, 3)}
    refuse(tmp_path, UnknownNameError, "no linear layer", model=model, example_inputs=inputs)


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(BundleError, match="holds other files"):
        export_bundle(Mlp(), tmp_path, example_inputs=X, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(BundleError, match="is a file"):
        export_bundle(Mlp(), tmp_path / "thesis.txt", example_inputs=X, progress=False)


def test_a_bundle_is_replaced_and_the_same_model_gives_the_same_bytes(tmp_path):
    first = export_bundle(Mlp(), tmp_path / "out", example_inputs=X, progress=False)
    (tmp_path / "out" / "stale.txt").write_text("")
    second = export_bundle(Mlp(), tmp_path / "out", example_inputs=X, progress=False)
    assert first.files == second.files
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MANIFEST, "onnx"]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    found = read_manifest(tmp_path / "out")
    assert found.stored == second.stored
    assert found.inputs == second.inputs
    verify_files(tmp_path / "out", found)


def test_the_model_is_left_as_it_was(tmp_path):
    model = Mlp().train()
    model.up.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_bundle(model, tmp_path / "out", example_inputs=X, progress=False)
    assert (model.training, model.up.training, model.down.training) == (True, False, True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_stages_go_to_stderr_only_when_asked(tmp_path, capfd):
    export_bundle(Mlp(), tmp_path / "a", example_inputs=X, progress=False)
    assert capfd.readouterr() == ("", "")
    export_bundle(Mlp(), tmp_path / "b", example_inputs=X)
    out, err = capfd.readouterr()
    assert out == ""
    assert "trace and translate" in err
