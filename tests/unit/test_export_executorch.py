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


def patched(out, program, values, *starts):
    pte = bytearray((out / program.file).read_bytes())
    raw = values.numpy().tobytes()
    for start in starts:
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
    assert slots["table.weight"].packed_offset > slots["table.weight"].offset


def test_writing_at_the_offset_of_a_linear_layer_changes_that_layer(tied):
    model, out, manifest = tied
    other = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    found = run(
        patched(out, manifest.program, other, manifest.program.slots["up.weight"].offset), IDS
    )
    hidden = functional.linear(model.table(IDS), other, model.up.bias)
    expected = model.head(model.norm(torch.relu(hidden)))
    torch.testing.assert_close(found, expected.detach())


def test_a_tied_weight_lies_twice_for_the_lookup_and_for_the_head(tied):
    model, out, manifest = tied
    other = torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    place = manifest.program.slots["table.weight"]
    hidden = model.norm(torch.relu(model.up(functional.embedding(IDS, other))))
    lookup = run(patched(out, manifest.program, other, place.offset), IDS)
    torch.testing.assert_close(lookup, model.head(hidden).detach())
    both = run(patched(out, manifest.program, other, *place.offsets), IDS)
    torch.testing.assert_close(both, functional.linear(hidden, other).detach())


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


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory):
    model, out = Tied().eval(), tmp_path_factory.mktemp("8bit") / "out"
    weight = model.up.weight.detach().clone()
    manifest = export_bundle(
        model, out, example_inputs={"ids": IDS}, engines=("executorch",),
        program_weights="int8-dynamic", progress=False,
    )  # fmt: skip
    torch.testing.assert_close(model.up.weight.detach(), weight, rtol=0, atol=0)
    assert list(model.up._buffers) == []
    return model, out, manifest


def test_8_bit_weights_are_rounded_by_row(in_8_bits):
    model, out, manifest = in_8_bits
    assert read_manifest(out).program == manifest.program
    assert 1e-4 < manifest.parity["executorch"] < 0.05
    place = manifest.program.slots["up.weight"]
    assert (place.dtype, manifest.slots["up.weight"].dtype) == ("I8", "F32")
    verify_slots(out, manifest)
    rounded = torch.from_numpy(stored_weight(out, manifest, "up.weight"))
    step = model.up.weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - model.up.weight).abs() <= step * 0.5001).all()


def test_the_slot_table_is_that_of_the_fp32_base(in_8_bits, tied):
    _, _, manifest = in_8_bits
    assert dict(manifest.slots) == dict(tied[2].slots)
    assert manifest.fingerprint == tied[2].fingerprint


def test_a_tied_weight_stays_fp32(in_8_bits):
    place = in_8_bits[2].program.slots["table.weight"]
    assert (place.dtype, len(place.offsets)) == ("F32", 2)


def test_writing_codes_at_the_offset_of_an_8_bit_layer_changes_that_layer(in_8_bits):
    model, out, manifest = in_8_bits
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, (24, 24), generator=generator, dtype=torch.int8)
    place = manifest.program.slots["up.weight"]
    pte = patched(out, manifest.program, codes, place.offset)
    scales = np.frombuffer(pte, np.float32, 24, place.scales_offset).copy()
    weight = codes * torch.from_numpy(scales)[:, None]
    hidden = functional.linear(model.table(IDS), weight, model.up.bias)
    expected = model.head(model.norm(torch.relu(hidden))).detach()
    assert (run(pte, IDS) - expected).abs().max() < 0.05 * expected.abs().max()
    untouched = model(IDS).detach()
    assert (expected - untouched).abs().max() > 0.2 * expected.abs().max()


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


@pytest.fixture(scope="module")
def with_inputs(tmp_path_factory):
    model, out = Tied().eval(), tmp_path_factory.mktemp("inputs") / "out"
    manifest = export_bundle(
        model, out, example_inputs={"ids": IDS}, engines=("executorch",), slots="inputs",
        progress=False,
    )  # fmt: skip
    return model, out, manifest


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_fed_factors_are_what_merged_weights_give(with_inputs, rank):
    model, out, manifest = with_inputs
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(24, rank, generator=generator) / 5
    b = torch.randn(rank, 24, generator=generator) / 5
    feeds = {"ids": IDS, "up.lora_a": a, "up.lora_b": b}
    pte = (out / manifest.program.file).read_bytes()
    found = run(pte, *(feeds[name] for name in manifest.program.input_order))
    merged = model.up.weight + (a @ b).T
    hidden = functional.linear(model.table(IDS), merged, model.up.bias)
    expected = model.head(model.norm(torch.relu(hidden))).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_required_inputs_are_listed_as_inputs(with_inputs):
    _, out, manifest = with_inputs
    program = manifest.program
    assert [spec.name for spec in program.inputs] == ["ids"]
    assert program.slots["up.weight"].lora_inputs == ("up.lora_a", "up.lora_b")
    assert program.slots["table.weight"].lora_inputs is None
    assert program.max_rank == 64
    assert read_manifest(out).program == program


class Transposed(torch.nn.Module):
    """A layer of GPT-2, which stores (in, out)."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.up = Conv1D(10, 6)
        self.up.bias.data.normal_()

    def forward(self, x):
        return self.up(torch.relu(x))


def test_a_transposed_weight_lies_in_the_slots_own_shape(tmp_path):
    model = Transposed().eval()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    manifest = export_bundle(
        model, tmp_path / "out", example_inputs={"x": x}, engines=("executorch",), progress=False
    )
    assert manifest.parity["executorch"] < 1e-5
    assert list(model.up._buffers) == []
    place = manifest.program.slots["up.weight"]
    assert place.key == sha(model.up.weight.t()) + sha(model.up.bias)
    weight = stored_weight(tmp_path / "out", manifest, "up.weight")
    np.testing.assert_array_equal(weight, model.up.weight.t().detach())
