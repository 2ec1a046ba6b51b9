"""Unfused, every form that the graph has inputs for is what a merged torch model computes."""

import copy
import itertools

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, LowRank, RowScale, Sparse, codebook
from edge_lora.bundle import read_manifest
from edge_lora.errors import UnsupportedError
from edge_lora.forms import matrix_shape, to_fp32
from edge_lora.reference import apply
from edge_lora.runtime import open_bundle

torch = pytest.importorskip("torch")


class Everything(torch.nn.Module):
    """An embedding, convolutions of every kind, and linear layers on two and three axes."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.plain = torch.nn.Conv1d(6, 8, 1)
        self.strided = torch.nn.Conv1d(8, 8, 3, stride=2, padding=2, dilation=2, bias=False)
        self.grouped = torch.nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.flat = torch.nn.Conv2d(1, 4, (3, 2), padding=(1, 0))
        self.wide = torch.nn.Linear(4, 6)
        self.head = torch.nn.Linear(6, 5)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        x = torch.tanh(self.grouped(self.strided(self.plain(x))))
        x = torch.tanh(self.flat(x[:, None])).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.wide(x)).mean(1))


SLOTS = ["embed", "plain", "strided", "grouped", "flat", "wide", "head"]
CAST = {
    "fp32": lambda x: x,
    "fp16": lambda x: x.astype(np.float16),
    "1-bit": lambda x: codebook.encode(x, 1),
    "4-bit rows": lambda x: codebook.encode(x, 4, "row"),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Everything().eval()
    for parameter in net.parameters():  # so that a change early on is seen at the end
        parameter.data *= 2.5
    return net


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 11, (2, 9))


@pytest.fixture(scope="module")
def folder(model, ids, tmp_path_factory):
    from edge_lora.export import export_bundle

    out = tmp_path_factory.mktemp("forms") / "out"
    export_bundle(
        model,
        out,
        example_inputs={"ids": torch.from_numpy(ids)},
        slots="inputs",
        slot_forms=("low_rank", "row_scale"),
        slot_names=SLOTS,
        progress=False,
    )
    return out


@pytest.fixture(scope="module")
def session(folder):
    with open_bundle(folder, threads=1) as opened:
        yield opened
        assert opened.differing_slots() == []


@pytest.fixture
def write(session, tmp_path):
    count = itertools.count()

    def written(forms_of, slots, alpha=0.5):
        """Write an adapter with ``forms_of(shape, rng)`` at every slot of ``slots``; load it."""
        manifest, rng = session.manifest, np.random.default_rng(7)
        deltas = {}
        for name in slots:
            slot = manifest.slots[f"{name}.weight"]
            forms = tuple(forms_of(slot.shape, rng))
            deltas[slot.name] = Delta(slot.shape, slot.dtype, forms, slot.slot_hash)
        base = BaseIdentity(manifest.fingerprint)
        name = f"a{next(count)}"
        path = Adapter(name, "test", base, deltas, alpha).save(tmp_path / f"{name}.safetensors")
        loaded.append(session.load_adapter(path))
        return loaded[-1], path

    loaded = []
    yield written
    for name in loaded:
        session.delete_adapter(name)


def merged(model, path, ids, rank=None):
    """Return the outputs of a torch model with the adapter in its weights."""
    other = copy.deepcopy(model)
    parameters = dict(other.named_parameters())
    adapter = Adapter.load(path)
    for name, delta in adapter.deltas.items():
        weight = parameters[name].data
        forms = [f.at_rank(rank) if rank else f for f in delta.forms]
        changed = apply(weight.numpy(), [(form, adapter.alpha) for form in forms])
        weight.copy_(torch.from_numpy(changed))
    with torch.no_grad():
        return other(torch.from_numpy(ids)).numpy()


def low_rank(shape, rng, rank=3, cast=CAST["fp32"], **nested):
    rows, columns = matrix_shape(shape)
    a = cast(rng.standard_normal((rank, columns)).astype(np.float32) / 2)
    bt = cast(rng.standard_normal((rank, rows)).astype(np.float32) / 2)
    return LowRank(a, bt, 0.7, **nested)


def check(session, model, name, path, ids, rank=None):
    base = session.run({"ids": ids})["output_0"]
    found = session.run({"ids": ids}, adapter=name, rank=rank)["output_0"]
    expected = merged(model, path, ids, rank)
    assert np.abs(expected - base).max() > 0.02 * np.abs(base).max()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert session.run({"ids": ids})["output_0"].tobytes() == base.tobytes()


@pytest.mark.parametrize("slot", [s for s in SLOTS if s != "grouped"])
def test_low_rank_factors_at_every_kind_of_layer(slot, session, model, write, ids):
    name, path = write(lambda s, r: [low_rank(s, r), low_rank(s, r, 2)], [slot])
    check(session, model, name, path, ids)


@pytest.mark.parametrize("cast", CAST)
def test_factors_of_every_encoding(cast, session, model, write, ids):
    name, path = write(lambda s, r: [low_rank(s, r, cast=CAST[cast])], ["embed", "flat", "head"])
    check(session, model, name, path, ids)


@pytest.mark.parametrize("slot", ["wide", "head"])
def test_a_gain_of_the_outputs_spares_the_bias(slot, session, model, write, ids):
    def dora(shape, rng):
        return low_rank(shape, rng), RowScale(rng.standard_normal(shape[0]).astype(np.float32), 0.3)

    name, path = write(dora, [slot])
    check(session, model, name, path, ids)
    name, path = write(lambda s, r: dora(s, r)[1:], [slot])
    check(session, model, name, path, ids)


def test_every_rank_of_a_nested_adapter(session, model, write, ids):
    ranks = {"ranks": (1, 2, 4), "rank_scale": (2.0, 1.0, 0.5)}
    name, path = write(lambda s, r: [low_rank(s, r, 4, **ranks)], ["embed", "strided", "wide"])
    for rank in (1, 2, 4):
        check(session, model, name, path, ids, rank)
        assert session.rank_of(name, rank) == rank
        with session.using(name, rank=np.int64(rank)):  # as NumPy counts
            fused = session.run({"ids": ids})["output_0"]
            state = session.state_id
        expected = merged(model, path, ids, rank)
        assert np.abs(fused - expected).max() <= 1e-5 * np.abs(expected).max()
        assert state != session.state_id
    states = {session.state_with(name, rank) for rank in (None, 1, 2, 4)}
    assert len(states) == 4
    for use in (
        lambda: session.run({"ids": ids}, adapter=name, rank=3),
        lambda: session.set_adapter(name, rank=3),
    ):
        with pytest.raises(UnsupportedError, match=r"rank 3; its ranks: 1, 2, 4"):
            use()
    assert session.active_adapters == {}


def test_a_latency_budget_chooses_a_rank_once(session, write, ids, monkeypatch):
    ranks = {"ranks": (1, 2, 4), "rank_scale": (2.0, 1.0, 0.5)}
    name, _ = write(lambda s, r: [low_rank(s, r, 4, **ranks)], ["wide"])
    assert session.rank_of(name, "auto:60000ms") == 4
    with pytest.raises(UnsupportedError, match=r"keeps 0 ms: rank 1 [\d.]+ ms, rank 2 .*rank 4"):
        session.run({"ids": ids}, adapter=name, rank="auto:0ms")
    measured = []

    def pretend(engine, feeds, variants):
        measured.append(variants)
        return {1: 3.0, 2: 5.0, 4: 8.0}

    monkeypatch.setattr("edge_lora.runtime.unfused.measure", pretend)
    expected = session.run({"ids": ids}, adapter=name, rank=2)["output_0"]
    for _ in range(2):
        found = session.run({"ids": ids}, adapter=name, rank="auto:7.5ms")["output_0"]
        np.testing.assert_array_equal(found, expected)
    assert session.rank_of(name, "auto:7.5ms") == 2
    assert len(measured) == 1
    assert set(measured[0]) == {1, 2, 4}
    with pytest.raises(UnsupportedError, match="neither a number nor like 'auto:12ms'"):
        session.rank_of(name, "auto:12")
    whole, _ = write(lambda s, r: [low_rank(s, r)], ["wide"])
    with pytest.raises(UnsupportedError, match="is of one rank"):
        session.rank_of(whole, "auto:1ms")
    with session.using(name), pytest.raises(UnsupportedError, match="disable_adapters"):
        session.rank_of(name, "auto:60000ms")


REFUSED = {
    "grouped": (low_rank, "the bundle has no inputs for this slot"),
    "wide": (
        lambda s, r: RowScale(np.ones(s[1], np.float32), 1.0, "col"),
        "form row_scale of columns is not low-rank and runs fused only",
    ),
    "plain": (
        lambda s, r: RowScale(np.ones(s[0], np.float32)),
        "the bundle has no row_scale input for this slot",
    ),
    "head": (
        lambda s, r: Sparse(np.array([1], np.uint32), np.ones(1, np.float32)),
        "form sparse is not low-rank and runs fused only",
    ),
}


@pytest.mark.parametrize("slot", REFUSED)
def test_what_has_no_unfused_way_says_why_and_can_be_fused(slot, session, model, write, ids):
    form, reason = REFUSED[slot]
    name, path = write(lambda s, r: [form(s, r)], [slot])
    with pytest.raises(UnsupportedError, match=f"(?s){slot}.weight: {reason}.*set_adapter"):
        session.run({"ids": ids}, adapter=name)
    with session.using(name):
        fused = session.run({"ids": ids})["output_0"]
    expected = merged(model, path, ids)
    assert np.abs(fused - expected).max() <= 1e-5 * np.abs(expected).max()


def test_gains_are_only_there_when_asked_for(model, ids, tmp_path):
    from edge_lora.export import export_bundle

    inputs = {"ids": torch.from_numpy(ids)}
    export_bundle(
        model, tmp_path / "out", example_inputs=inputs, slots="inputs", slot_names=["head"],
        progress=False,
    )  # fmt: skip
    assert read_manifest(tmp_path / "out").stored["head.weight"].gain_input is None


def test_coded_values_decode_to_what_is_fed():
    values = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    assert len(np.unique(to_fp32(CAST["1-bit"](values)))) == 2
