"""Biases and norms as slots: switched in the live engine, on every route, and back to the bit."""

import copy

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, Dense, LowRank, RowScale
from edge_lora.reference import apply
from edge_lora.runtime import open_bundle

torch = pytest.importorskip("torch")

ROUTES = ["packed", "unpacked", "reload"]


class Net(torch.nn.Module):
    """Biases of a Gemm, a MatMul and convolutions, norms of three kinds, a bare parameter."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(4, 8, 3, padding=1)
        self.channels = torch.nn.BatchNorm1d(8)
        self.norm = torch.nn.LayerNorm(8)
        self.rms = torch.nn.RMSNorm(8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.gamma = torch.nn.Parameter(torch.ones(8))
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.channels(self.conv(x))).transpose(1, 2)
        x = x + self.gamma * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return self.head(self.rms(x).mean(1))


SLOTS = [
    "conv", "up", "down", "head", "*.bias", "gamma", "norm", "rms", "channels",
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Net().eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0 if "bias" in name else 1, std=0.3)
    return net


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(model, x, tmp_path_factory):
    from edge_lora.export import export_bundle

    out = tmp_path_factory.mktemp("biases") / "out"
    export_bundle(
        model, out, example_inputs={"x": torch.from_numpy(x)}, slot_names=SLOTS, slots="inputs",
        progress=False,
    )  # fmt: skip
    return out


def write(manifest, path, forms_of, slots):
    rng = np.random.default_rng(1)
    deltas = {}
    for name in slots:
        slot = manifest.slots[name]
        deltas[name] = Delta(slot.shape, slot.dtype, forms_of(slot, rng), slot.slot_hash)
    return Adapter(path.stem, "test", BaseIdentity(manifest.fingerprint), deltas, 0.5).save(path)


def some_forms(slot, rng):
    if slot.kind != "other":
        a = rng.standard_normal((2, int(np.prod(slot.shape[1:])))).astype(np.float32)
        return (LowRank(a, rng.standard_normal((2, slot.shape[0])).astype(np.float32), 0.3),)
    values = rng.standard_normal(slot.shape).astype(np.float32)
    return {
        0: (Dense(values, 0.5),),
        1: (RowScale(values, 0.5),),
        2: (Dense(values, 0.2), RowScale(values, 0.5)),
        3: (Dense(values, 0.5), Dense(values, 0.5)),
    }[int(slot.sha256, 16) % 4]


def merged(model, path, x):
    other = copy.deepcopy(model)
    parameters = dict(other.named_parameters())
    adapter = Adapter.load(path)
    for name, delta in adapter.deltas.items():
        weight = parameters[name].data
        terms = [(form, adapter.alpha) for form in delta.forms]
        weight.copy_(torch.from_numpy(apply(weight.numpy(), terms)))
    with torch.no_grad():
        return other(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("route", ROUTES)
def test_every_bias_and_norm_switches_and_comes_back(route, model, folder, x, tmp_path):
    with open_bundle(folder, threads=1, route=route) as session:
        manifest = session.manifest
        others = [name for name, slot in manifest.slots.items() if slot.kind == "other"]
        assert {"up.bias", "conv.bias", "norm.weight", "rms.weight", "gamma"} <= set(others)
        groups = {name: [name] for name in others} | {"all": list(manifest.slots)}
        base = session.run({"x": x})["output_0"]
        for name, slots in groups.items():
            path = write(manifest, tmp_path / f"{name}.safetensors", some_forms, slots)
            loaded = session.load_adapter(path)
            expected = merged(model, path, x)
            with session.using(loaded):
                found = session.run({"x": x})["output_0"]
                assert set(session.differing_slots()) == set(slots)
            assert np.abs(expected - base).max() > 1e-3 * np.abs(base).max(), name
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name
            assert session.run({"x": x})["output_0"].tobytes() == base.tobytes()
        assert session.differing_slots() == []
        assert session.route == route


def test_auto_takes_the_packed_route(folder):
    with open_bundle(folder, threads=1) as session:
        assert session.route == "packed"


def test_a_language_model_switches_its_norms(torch_model, feeds, tmp_path):
    from edge_lora.export import export_bundle

    names = ["*.q_proj", "*norm"]
    export_bundle(torch_model, tmp_path / "out", slot_names=names, progress=False)
    with open_bundle(tmp_path / "out", threads=1) as session:
        assert session.route == "packed"
        norms = [name for name in session.manifest.slots if "norm" in name]
        assert len(norms) == 5
        path = write(session.manifest, tmp_path / "norms.safetensors", some_forms, norms)
        base = session.run(feeds)["logits"]
        session.load_adapter(path)
        with session.using("norms"):
            found = session.run(feeds)["logits"]
        ids = torch.from_numpy(feeds["input_ids"])
        other = copy.deepcopy(torch_model)
        adapter = Adapter.load(path)
        for name, delta in adapter.deltas.items():
            weight = other.get_parameter(name).data
            terms = [(form, adapter.alpha) for form in delta.forms]
            weight.copy_(torch.from_numpy(apply(weight.numpy(), terms)))
        with torch.no_grad():
            expected = other(ids).logits.numpy()
        assert np.abs(expected - base).max() > 0.1
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        assert session.run(feeds)["logits"].tobytes() == base.tobytes()
