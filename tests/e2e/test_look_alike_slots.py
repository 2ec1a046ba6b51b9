"""Slots that an engine would fold, copy or mistake for others are switched as torch would."""

import copy

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, Dense
from edge_lora.errors import BundleError
from edge_lora.runtime import open_bundle

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from edge_lora.export import export_bundle, onnx_part  # noqa: E402

ROUTES = ["packed", "unpacked", "reload"]


class Neutral(torch.nn.Module):
    """A gain of 1 and a bias of 0: an optimiser would drop both."""

    slots = ("up", "down", "gain", "bias")

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.down(torch.tanh(self.up(x) * self.gain + self.bias))


class Turned(torch.nn.Module):
    """A parameter read by two nodes behind transpositions: an optimiser would turn a copy."""

    slots = ("up", "gain")

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.gain = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        y = self.up(x[:, None].expand(-1, 8, -1) + torch.arange(8.0)[:, None])
        added = torch.tanh(y.transpose(1, 2) + self.gain)
        scaled = torch.sigmoid(y.transpose(1, 2) * self.gain)
        return self.down((added + scaled).transpose(1, 2))


class Twins(torch.nn.Module):
    """Three equal layers, of which one is a slot."""

    def __init__(self, slot):
        super().__init__()
        self.slots = (slot,)
        self.a = torch.nn.Linear(8, 8)
        self.b, self.c = copy.deepcopy(self.a), copy.deepcopy(self.a)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Beside(torch.nn.Module):
    """A layer and a bare parameter with the same values, which is not found as a layer's weight."""

    slots = ("a",)

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(8, 8, bias=False)
        self.copy = torch.nn.Parameter(self.a.weight.detach().clone())

    def forward(self, x):
        return torch.tanh(torch.nn.functional.linear(torch.tanh(self.a(x)), self.copy))


class Zeros(torch.nn.Module):
    """Two zero layers: packed blocks of zeros, whatever the shapes."""

    slots = ("a", "b")

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Linear(8, n, bias=False) for n in (7, 6))
        self.mix = torch.nn.Linear(13, 8)
        torch.nn.init.zeros_(self.a.weight)
        torch.nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.mix(torch.cat([self.b(x), self.a(x)], -1))


MODELS = {
    "neutral": Neutral,
    "turned": Turned,
    "beside": Beside,
    "zeros": Zeros,
    **{f"twin {name}": (lambda name=name: Twins(name)) for name in "abc"},
}


def export(model, out):
    x = {"x": torch.randn(2, 8)}
    names = list(model.slots)
    return export_bundle(model, out, example_inputs=x, slot_names=names, progress=False)


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    folder = tmp_path_factory.mktemp("alike") / "out"
    export(model, folder)
    return model, folder


def adapter(manifest, name, folder):
    slot = manifest.slots[name]
    values = np.random.default_rng(1).standard_normal(slot.shape).astype(np.float32)
    delta = Delta(slot.shape, slot.dtype, (Dense(values),), slot.slot_hash)
    base = BaseIdentity(manifest.fingerprint)
    path = Adapter(name, "test", base, {name: delta}).save(folder / f"{name}.safetensors")
    return path, torch.from_numpy(values)


def check_every_slot(session, model, folder):
    x = torch.randn(2, 8)
    base = session.run({"x": x.numpy()})["output_0"]
    for name in session.manifest.slots:
        path, values = adapter(session.manifest, name, folder)
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).add_(values)
            expected = changed(x).numpy()
        with session.using(session.load_adapter(path)):
            found = session.run({"x": x.numpy()})["output_0"]
        assert np.abs(expected - base).max() > 1e-2
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)
        assert session.run({"x": x.numpy()})["output_0"].tobytes() == base.tobytes()


@pytest.mark.parametrize("route", ROUTES)
def test_every_slot_is_switched_as_in_torch(route, case, tmp_path):
    model, folder = case
    with open_bundle(folder, threads=1, route=route) as session:
        check_every_slot(session, model, tmp_path)


@pytest.mark.parametrize("name", ["twin b", "zeros"])
def test_blocks_that_look_alike_are_not_guessed_at(name, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(onnx_part, "slots_to_hide", lambda *_: [])
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    export(model, tmp_path / "out")
    with open_bundle(tmp_path / "out", threads=1) as session:
        assert session.route == "unpacked"
        check_every_slot(session, model, tmp_path)
    assert "packed weights not found in the engine's memory" in caplog.text


def test_a_bundle_whose_small_slots_may_be_folded_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_part, "slots_to_hide", lambda *_: [])
    export(Neutral().eval(), tmp_path / "out")
    with pytest.raises(BundleError, match=r"(?s)gain.*bias.*Export the bundle again"):
        open_bundle(tmp_path / "out", threads=1)


def test_ordinary_matrices_stay_constants_that_the_engine_packs(tmp_path):
    torch.manual_seed(0)
    manifest = export(Neutral().eval(), tmp_path / "out")
    hidden = {name for name, place in manifest.stored.items() if place.is_input}
    assert hidden == {"gain", "bias"}
