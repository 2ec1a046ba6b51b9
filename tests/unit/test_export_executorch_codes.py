"""Layers whose 8-bit codes are equal and whose weights are not; bundles that readers refuse."""

import numpy as np
import pytest
import torch

from edge_lora import bundle
from edge_lora.bundle import read_manifest
from edge_lora.errors import BundleError, UnsupportedError
from edge_lora.export import export_bundle
from edge_lora.export.int8_linear import linears_to_quantise, quantised

pytest.importorskip("executorch")
pytestmark = pytest.mark.torch

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


class Doubled(torch.nn.Module):
    """``b`` is twice ``a``, so that their codes are equal and their scales are not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (torch.nn.Linear(32, 32, bias=False) for _ in range(2))
        self.c = torch.nn.Linear(32, 8)
        self.b.weight.data.copy_(2 * self.a.weight)

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x))))


def export(model, out, **options):
    return export_bundle(
        model, out, example_inputs={"x": X}, engines=("executorch",),
        program_weights="int8-dynamic", progress=False, **options,
    )  # fmt: skip


def test_different_weights_of_equal_codes_stay_fp32(caplog):
    model = Doubled()
    codes = [quantised(layer.weight.detach())[0] for layer in (model.a, model.b)]
    assert torch.equal(*codes)
    assert list(linears_to_quantise(model)) == ["c"]
    assert "  a\n  b" in caplog.text


def test_equal_weights_are_quantised_since_one_packed_weight_is_right_for_both():
    model = Doubled()
    model.b.weight.data.copy_(model.a.weight)
    assert list(linears_to_quantise(model)) == ["a", "b", "c"]


@pytest.mark.parametrize("names", [None, ["c.weight"]], ids=["slots", "no slots"])
def test_the_program_packs_both_rightly(tmp_path, names):
    pytest.importorskip("edge_lora_executorch")
    from edge_lora.runtime import open_bundle

    model = Doubled().eval()
    export(model, tmp_path / "out", slot_names=names)
    places = read_manifest(tmp_path / "out").program.slots
    assert {name: place.dtype for name, place in places.items()} == {
        **({} if names else {"a.weight": "F32", "b.weight": "F32"}),
        "c.weight": "I8",
    }
    expected = model(X).detach().numpy()
    with open_bundle(tmp_path / "out", engine="executorch", threads=1, route="packed") as session:
        (found,) = session.run({"x": X.numpy()}).values()
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_a_bundle_that_readers_refuse_does_not_appear(tmp_path, monkeypatch):
    def refuse(raw):
        raise BundleError("slot a.weight: is odd")

    monkeypatch.setattr(bundle, "_parse", refuse)
    with pytest.raises(UnsupportedError, match=r"(?s)cannot be opened.*slot a\.weight: is odd"):
        export(Doubled().eval(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
