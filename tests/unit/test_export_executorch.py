"""Export to ExecuTorch: the program computes what torch computes, and its slots lie where it says.

Programs are run by ExecuTorch's own Python runtime, from bytes that the tests patch themselves.
"""

import hashlib
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from torch.nn import functional

from edge_lora.bundle import read_manifest, verify_files
from edge_lora.bundle_check import stored_weight, verify_fingerprint, verify_slots
from edge_lora.errors import EngineUnavailableError, UnsupportedError
from edge_lora.export import export_bundle

pytest.importorskip("executorch")
pytestmark = pytest.mark.torch

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Tied(torch.nn.Module):
    """An embedding whose weight is also the head's, a layer with a bias, a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(40, 24)
        self.up = torch.nn.Linear(24, 24)
        self.norm = torch.nn.LayerNorm(24)
        self.head = torch.nn.Linear(24, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.norm(torch.relu(self.up(self.table(ids)))))


def run(pte, *inputs):
    runtime = import_module("executorch.runtime").Runtime.get()
    program = runtime.load_program(bytes(pte))
    return program.load_method("forward").execute(list(inputs))[0]


def sha(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    model, out = Tied().eval(), tmp_path_factory.mktemp("tied") / "out"
    both = ("onnxruntime", "executorch")
    export_bundle(model, out, example_inputs={"ids": IDS}, engines=both, progress=False)
    return model, out, read_manifest(out)


def patched(out, program, slot, values):
    pte = bytearray((out / program.file).read_bytes())
    start = program.slots[slot].offset
    raw = values.numpy().astype(np.float32).tobytes()
    pte[start : start + len(raw)] = raw
    return pte


def test_the_program_computes_what_torch_computes_at_any_batch_size(tied):
    model, out, manifest = tied
    assert manifest.parity["executorch"] < 1e-5
    pte = (out / manifest.program.file).read_bytes()
    for batch in (1, 2, 16):
        ids = torch.randint(0, 40, (batch, 3), generator=torch.Generator().manual_seed(batch))
        torch.testing.assert_close(run(pte, ids), model(ids).detach())


def test_both_engines_share_one_slot_table(tied):
    _, out, manifest = tied
    assert set(manifest.stored) == set(manifest.program.slots) == {"table.weight", "up.weight"}
    assert manifest.slots["table.weight"].aliases == ("head.weight",)
    verify_files(out, manifest)
    verify_slots(out, manifest)
    assert verify_fingerprint(manifest)


def test_a_packed_weight_is_named_by_its_values_and_its_bias(tied):
    model, _, manifest = tied
    slots = manifest.program.slots
    assert slots["up.weight"].key == sha(model.up.weight) + sha(model.up.bias)
    assert not slots["up.weight"].is_read_in_place
    assert slots["table.weight"].key == sha(model.table.weight)
    assert slots["table.weight"].is_read_in_place


def test_writing_at_the_offset_of_a_linear_layer_changes_that_layer(tied):
    model, out, manifest = tied
    other = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    found = run(patched(out, manifest.program, "up.weight", other), IDS)
    hidden = functional.linear(model.table(IDS), other, model.up.bias)
    expected = model.head(model.norm(torch.relu(hidden)))
    torch.testing.assert_close(found, expected.detach())


def test_writing_at_the_offset_of_a_tied_embedding_changes_the_lookup_alone(tied):
    model, out, manifest = tied
    other = torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    found = run(patched(out, manifest.program, "table.weight", other), IDS)
    hidden = torch.relu(model.up(functional.embedding(IDS, other)))
    torch.testing.assert_close(found, model.head(model.norm(hidden)).detach())


def test_a_bundle_with_the_program_alone_holds_its_weights(tmp_path, capfd):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    manifest = export_bundle(
        model, tmp_path / "out", example_inputs={"input": x}, engines=("executorch",),
        progress=False,
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    assert manifest.stored == {}
    assert [spec.name for spec in manifest.program.inputs] == ["input"]
    assert manifest.program.inputs[0].shape == ("batch", 6)
    weight = stored_weight(tmp_path / "out", manifest, "1.weight")
    np.testing.assert_array_equal(weight, model[1].weight.detach())
    assert read_manifest(tmp_path / "out").program == manifest.program


class Twins(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.b.weight.data.copy_(self.a.weight)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(6, 6, 1)
        self.up = torch.nn.Linear(4, 6)

    def forward(self, x):
        return self.up(self.conv(x))


class Counting(torch.nn.Module):
    """Its buffer is a weight that forward itself changes."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 6)
        self.register_buffer("scale", torch.ones(6, 6))

    def forward(self, x):
        self.scale.add_(1)
        return functional.linear(self.up(x), self.scale)


X = {"x": torch.ones(2, 6)}
REFUSED = {
    "equal weights": (Twins(), X, {}, r"a\.weight: holds the same values as b\.weight"),
    "a convolution": (
        Mixed(), {"x": torch.ones(2, 6, 4)}, {"slot_names": ["conv"]},
        r"conv\.weight: is a convolution's",
    ),
    "a bias": (Mixed(), {"x": torch.ones(2, 6, 4)}, {"slot_names": ["up.bias"]}, "a bias or norm"),
    "a weight that forward changes": (Counting(), X, {}, "(?s)forward changes.*scale"),
    "sites": (Twins(), X, {"sites": ["a"]}, "no inputs for bottlenecks"),
    "half precision": (Twins().half(), {"x": torch.ones(2, 6).half()}, {}, "it takes fp32"),
    "gains": (Twins(), X, {"slots": "inputs", "slot_forms": ["row_scale"]}, "low_rank inputs only"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused(tmp_path, case):
    model, example, options, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=message):
        export_bundle(
            model, tmp_path / "out", example_inputs=example, engines=("executorch",),
            progress=False, **options,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_comes_with_the_next_command(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "edge_lora.export.executorch_part")
    monkeypatch.setitem(sys.modules, "edge_lora.export.executorch_lowering", None)
    with pytest.raises(EngineUnavailableError, match="pip install"):
        export_bundle(Twins(), tmp_path / "out", example_inputs=X, engines=("executorch",))
