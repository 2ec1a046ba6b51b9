"""A base of fp16: adapters run unfused; fusing is refused, because no engine would see it."""

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Bottleneck, Delta, Dense, LowRank
from edge_lora.errors import UnsupportedError
from edge_lora.runtime import open_bundle

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 3, bias=False)
    return torch.nn.Sequential(*layers).half().eval()


@pytest.fixture(scope="module")
def session(net, tmp_path_factory):
    from edge_lora.export import export_bundle

    out = tmp_path_factory.mktemp("half") / "out"
    example = {"input": torch.randn(2, 5, 8).half()}
    export_bundle(net, out, example_inputs=example, slots="inputs", sites=["2"], progress=False)
    with open_bundle(out, threads=1, route="reload") as opened:
        yield opened


def load(session, folder, name, deltas):
    slots = session.manifest.slots
    found = {n: Delta(slots[n].shape, "F16", forms, slots[n].slot_hash) for n, forms in deltas}
    base = BaseIdentity(session.manifest.fingerprint)
    return session.load_adapter(Adapter(name, "test", base, found).save(folder / name))


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_a_low_rank_adapter_runs_unfused_and_is_never_said_to_be_fused(net, session, tmp_path):
    form = LowRank(draw(2, 8), draw(2, 16), 0.3)
    name = load(session, tmp_path, "lora", [("0.weight", (form,))])
    x = np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float16)
    base = session.run({"input": x})["output_0"]
    found = session.run({"input": x}, adapter=name)["output_0"]
    weight = net[0].weight.float() + torch.from_numpy(form.bt.T @ form.a) * form.scale
    middle = torch.relu(torch.from_numpy(x).float() @ weight.T)
    expected = (middle @ net[2].weight.float().T).detach().numpy()
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=0.01)
    with pytest.raises(UnsupportedError, match=r"(?s)only fp32.*0\.weight is F16.*fp32 base"):
        session.set_adapter(name)
    assert session.active_adapters == {}
    assert session.run({"input": x})["output_0"].tobytes() == base.tobytes()


def test_a_bottleneck_is_active_because_it_changes_no_weight(session, tmp_path):
    form = Bottleneck(draw(2, 16), draw(3, 2), 0.3, "relu")
    name = load(session, tmp_path, "branch", [("2", (form,))])
    x = np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float16)
    base = session.run({"input": x})["output_0"]
    with session.using(name):
        found = session.run({"input": x})["output_0"]
    assert np.abs(found - base).max() > 0.01
    assert found.tobytes() == session.run({"input": x}, adapter=name)["output_0"].tobytes()


def test_what_can_neither_be_fused_nor_fed_is_refused(session, tmp_path):
    with pytest.raises(UnsupportedError, match="form dense is not low-rank"):
        load(session, tmp_path, "dense", [("0.weight", (Dense(draw(16, 8)),))])
    assert "dense" not in session.adapters
