"""A slot that the engine reads only while it loads is refused."""

import numpy as np
import pytest
import torch

from edge_lora import Adapter, BaseIdentity, Delta, Dense
from edge_lora.bundle import read_manifest
from edge_lora.errors import UnsupportedError
from edge_lora.export import export_bundle
from edge_lora.runtime import open_bundle

pytestmark = [pytest.mark.torch, pytest.mark.ort]
EXAMPLE = {"x": torch.ones(2, 4, 6)}


class Positions(torch.nn.Module):
    """Adds a learned row to each of four places; ``fixed``: which ones does not depend on x."""

    def __init__(self, fixed):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.fixed = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 3), fixed

    def forward(self, x):
        places = torch.arange(4)[None]
        if not self.fixed:
            places = places + (x[:, :, 0] > 0).long()
        return self.head(x + self.table(places))


def test_a_table_that_is_looked_up_at_fixed_places_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=r"(?s)table\.weight: Gather.*constants only"):
        export_bundle(
            Positions(True),
            tmp_path / "out",
            example_inputs=EXAMPLE,
            slot_names=["table", "head"],
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []


def test_without_that_slot_the_model_exports(tmp_path):
    out = tmp_path / "out"
    export_bundle(Positions(True), out, example_inputs=EXAMPLE, progress=False)
    assert list(read_manifest(out).slots) == ["head.weight"]


def test_a_table_that_is_looked_up_where_an_input_says_is_switched(tmp_path):
    out = tmp_path / "out"
    model = Positions(False)
    export_bundle(model, out, example_inputs=EXAMPLE, slot_names=["table", "head"], progress=False)
    slot = read_manifest(out).slots["table.weight"]
    new = np.random.default_rng(0).standard_normal(slot.shape).astype(np.float32)
    delta = Delta(slot.shape, "F32", (Dense(new, mode="set"),), slot.slot_hash)
    base = BaseIdentity(read_manifest(out).fingerprint)
    path = Adapter("new", "test", base, {slot.name: delta}).save(tmp_path / "new.safetensors")
    x = torch.randn(2, 4, 6)
    with open_bundle(out) as session:
        session.load_adapter(path)
        session.set_adapter("new")
        (found,) = session.run({"x": x.numpy()}).values()
    with torch.no_grad():
        model.table.weight.copy_(torch.from_numpy(new))
        np.testing.assert_allclose(found, model(x).numpy(), atol=1e-5)
