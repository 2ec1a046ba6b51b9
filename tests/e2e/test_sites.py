"""Bottlenecks at sites: idle they are the base, fed they are what torch computes with hooks."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Bottleneck, Delta, Dense, LowRank
from edge_lora.bundle import read_manifest
from edge_lora.errors import AdapterMismatchError, NoEffectError, UnsupportedError
from edge_lora.runtime import open_bundle
from edge_lora.runtime.generate import generate

torch = pytest.importorskip("torch")

ACTS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
CASES = list(itertools.product(ACTS, ["parallel", "sequential"]))
ARROW = "model.layers.0.post_attention_layernorm->model.layers.0.mlp"
ARROWS = "*.post_attention_layernorm->*.mlp"


def bottleneck(shape, act, placement, seed=0, rank=3, biases=True, scale=0.7):
    rng = np.random.default_rng(seed)
    d_out, d_in = shape
    width = d_in if placement == "parallel" else d_out

    def draw(*size):
        return rng.standard_normal(size).astype(np.float32) / 3

    return Bottleneck(
        draw(rank, width), draw(d_out, rank), scale, act, placement,
        draw(rank) if biases else None, draw(d_out) if biases else None,
    )  # fmt: skip


def write(folder, manifest, deltas, name="adapter", alpha=1.0):
    """Write an adapter; ``deltas`` maps slots to forms."""
    found = {}
    for slot_name, forms in deltas.items():
        slot = manifest.slots[slot_name]
        found[slot_name] = Delta(slot.shape, slot.dtype, tuple(forms), slot.slot_hash)
    base = BaseIdentity(manifest.fingerprint, manifest.base_id)
    return Adapter(name, "test", base, found, alpha).save(folder / f"{name}.safetensors")


def branch(form, z, alpha):
    """Compute a bottleneck by torch alone."""
    down, up = torch.from_numpy(form.down), torch.from_numpy(form.up)
    middle = z @ down.T
    if form.down_bias is not None:
        middle = middle + torch.from_numpy(form.down_bias)
    result = ACTS[form.act](middle) @ up.T
    if form.up_bias is not None:
        result = result + torch.from_numpy(form.up_bias)
    return form.scale * alpha * result


def hooked(model, path, run):
    """Return ``run()`` with the adapter's bottlenecks and low-rank deltas added by hooks."""
    adapter = path if isinstance(path, Adapter) else Adapter.load(path)
    modules = dict(model.named_modules())
    handles, read = [], {}
    for name, delta in adapter.deltas.items():
        source, _, target = name.rpartition("->")

        def keep(module, args, kwargs=None, name=name):
            read[name] = args[0]

        def add(module, args, output, name=name, delta=delta):
            z = read.get(name, args[0])
            return output + sum(
                branch(form, z if form.placement == "parallel" else output, adapter.alpha)
                for form in delta.forms
            )

        def low_rank(module, args, output, delta=delta):
            (form,) = delta.forms
            a, bt = torch.from_numpy(form.a), torch.from_numpy(form.bt)
            return output + args[0] @ a.T @ bt * form.scale * adapter.alpha

        if source:
            handles.append(modules[source].register_forward_pre_hook(keep))
        if isinstance(delta.forms[0], LowRank):
            module = modules[target.removesuffix(".weight")]
            handles.append(module.register_forward_hook(low_rank))
        else:
            handles.append(modules[target].register_forward_hook(add))
    try:
        with torch.no_grad():
            return run().numpy()
    finally:
        for handle in handles:
            handle.remove()


def summed(adapters, weights):
    """Return one adapter with the forms of all, each as strong as asked."""
    deltas = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in adapter.deltas.items():
            forms = tuple(replace(f, scale=f.scale * adapter.alpha * weight) for f in delta.forms)
            before = deltas[name].forms if name in deltas else ()
            deltas[name] = replace(delta, forms=(*before, *forms))
    return replace(adapters[0], deltas=deltas, alpha=1.0)


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(8, 3, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def net_session(net, tmp_path_factory):
    from edge_lora.export import export_bundle

    out = tmp_path_factory.mktemp("net") / "out"
    sites = ["blocks.*.down", "blocks.1", "head", "*.norm->*.down"]
    inputs = {"x": torch.randn(2, 5, 8)}
    names = ["*.up", "*.down", "head", "blocks.0.down.bias"]
    export_bundle(
        net, out, example_inputs=inputs, sites=sites, slots="inputs", slot_names=names,
        progress=False,
    )  # fmt: skip
    with open_bundle(out, threads=1) as session:
        yield session
        assert session.differing_slots() == []


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(3).standard_normal((3, 5, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def llama(torch_model, tmp_path_factory):
    from edge_lora.export import export_bundle

    out = tmp_path_factory.mktemp("llama") / "out"
    export_bundle(torch_model, out, sites=["*.mlp", ARROWS], slots="inputs", progress=False)
    return out


@pytest.fixture(scope="module")
def llama_session(llama):
    with open_bundle(llama, threads=1) as session:
        yield session


def run_net(session, x, adapter=None):
    return session.run({"x": x}, adapter=adapter)["output_0"]


@pytest.mark.parametrize(("act", "placement"), CASES)
def test_a_site_computes_what_torch_does(act, placement, net, net_session, x, tmp_path):
    manifest = net_session.manifest
    deltas = {
        site: [bottleneck(manifest.slots[site].shape, act, placement, i, rank=1 + i)]
        for i, site in enumerate(["blocks.0.down", "blocks.1", "head"])
    }
    path = write(tmp_path, manifest, deltas, f"{act}-{placement}", alpha=0.5)
    name = net_session.load_adapter(path)
    base = run_net(net_session, x)
    found = run_net(net_session, x, name)
    assert np.abs(found - base).max() > 0.05 * np.abs(base).max()
    assert_close(found, hooked(net, path, lambda: net(torch.from_numpy(x))))
    assert run_net(net_session, x).tobytes() == base.tobytes()
    net_session.delete_adapter(name)


def test_branches_of_one_site_add_up_whatever_they_are(net, net_session, x, tmp_path):
    shape = net_session.manifest.slots["blocks.0.down"].shape
    forms = [bottleneck(shape, a, p, i) for i, (a, p) in enumerate(reversed(CASES))]
    path = write(tmp_path, net_session.manifest, {"blocks.0.down": forms}, "many")
    name = net_session.load_adapter(path)
    expected = hooked(net, path, lambda: net(torch.from_numpy(x)))
    assert_close(run_net(net_session, x, name), expected)
    net_session.delete_adapter(name)


def test_a_branch_can_read_the_input_of_another_module(net, net_session, x, tmp_path):
    site = "blocks.0.norm->blocks.0.down"
    form = bottleneck(net_session.manifest.slots[site].shape, "relu", "parallel")
    path = write(tmp_path, net_session.manifest, {site: [form]}, "arrow")
    name = net_session.load_adapter(path)
    expected = hooked(net, path, lambda: net(torch.from_numpy(x)))
    assert_close(run_net(net_session, x, name), expected)
    net_session.delete_adapter(name)


def mixed(manifest, folder, act="relu"):
    rng = np.random.default_rng(5)
    deltas = {
        site: [bottleneck(slot.shape, act, "parallel", i)]
        for i, (site, slot) in enumerate(manifest.slots.items())
        if slot.kind == "site"
    }
    for name, slot in manifest.slots.items():
        if name.endswith("q_proj.weight"):
            a = rng.standard_normal((2, slot.shape[1])).astype(np.float32) / 4
            bt = rng.standard_normal((2, slot.shape[0])).astype(np.float32) / 4
            deltas[name] = [LowRank(a, bt, 0.5)]
    return write(folder, manifest, deltas, "mixed")


def test_a_language_model_with_bottlenecks_and_low_rank_slots(
    torch_model, llama_session, feeds, tmp_path
):
    path = mixed(llama_session.manifest, tmp_path)
    name = llama_session.load_adapter(path)
    base = llama_session.run(feeds)["logits"]
    found = llama_session.run(feeds, adapter=name)["logits"]
    ids = torch.from_numpy(feeds["input_ids"])
    assert_close(found, hooked(torch_model, path, lambda: torch_model(ids).logits))
    assert np.abs(found - base).max() > 0.05
    binding = llama_session.io_binding(name)
    for key, array in feeds.items():
        binding.bind_input(key, array)
    np.testing.assert_array_equal(binding.numpy(binding.run()["logits"]), found)
    generated = generate(llama_session, [[1, 5, 2]], max_new_tokens=6, adapter=name, stop=[])
    assert len(generated.tokens[0]) == 6
    ids = [1, 5, 2]
    for token in generated.tokens[0]:
        logits = hooked(torch_model, path, lambda: torch_model(torch.tensor([ids])).logits)
        assert token == logits[0, -1].argmax()
        ids.append(token)
    idle = llama_session.state_id
    with llama_session.using(name):
        assert_close(llama_session.run(feeds)["logits"], found)
        assert llama_session.state_id != idle
        again = generate(llama_session, [[1, 5, 2]], max_new_tokens=6, stop=[])
        assert again.tokens == generated.tokens
        plain = llama_session.io_binding()
        for key, array in feeds.items():
            plain.bind_input(key, array)
        assert_close(plain.numpy(plain.run()["logits"]), found)
    assert llama_session.run(feeds)["logits"].tobytes() == base.tobytes()
    assert llama_session.state_id == idle
    llama_session.delete_adapter(name)


def test_an_idle_site_is_the_base_to_the_bit(bundle, llama_session, feeds):
    with open_bundle(bundle, threads=1) as plain:
        expected = plain.run(feeds)
    found = llama_session.run(feeds)
    assert all(found[key].tobytes() == expected[key].tobytes() for key in expected)
    assert llama_session.manifest.fingerprint == read_manifest(bundle).fingerprint


def test_a_branch_without_effect_is_refused(net_session, tmp_path):
    form = bottleneck((3, 8), "relu", "parallel")
    form = replace(form, up=np.zeros_like(form.up), up_bias=None)
    path = write(tmp_path, net_session.manifest, {"head": [form]}, "zero")
    with pytest.raises(NoEffectError, match="canary"):
        net_session.load_adapter(path)
    assert net_session.adapters == []


def test_a_bundle_without_the_site_refuses_by_name(bundle, llama, tmp_path):
    path = mixed(read_manifest(llama), tmp_path)
    with (
        open_bundle(bundle, threads=1) as session,
        pytest.raises(AdapterMismatchError, match=r"layers\.0\.mlp: no such site"),
    ):
        session.load_adapter(path)


def test_forms_in_the_wrong_place_are_all_named(net_session, tmp_path):
    a, bt = np.ones((1, 8), np.float32), np.ones((1, 3), np.float32)
    deltas = {
        "head": [LowRank(a, bt)],
        "head.weight": [bottleneck((3, 8), "relu", "parallel")],
    }
    path = write(tmp_path, net_session.manifest, deltas, "misplaced")
    with pytest.raises(AdapterMismatchError) as caught:
        net_session.load_adapter(path)
    assert "head: is a site, which takes no low_rank" in str(caught.value)
    assert "head.weight: is a weight, which takes no bottleneck" in str(caught.value)
    assert net_session.adapters == []


@pytest.mark.parametrize("route", ["packed", "reload"])
def test_active_adapters_are_fused_and_fed_and_add_up(route, net, net_session, x, tmp_path):
    manifest = net_session.manifest
    site, weight = "blocks.0.down", "blocks.1.up.weight"
    rng = np.random.default_rng(1)
    a, bt = (rng.standard_normal((2, n)).astype(np.float32) for n in (8, 16))
    one = {
        site: [bottleneck((8, 16), "relu", "parallel", 1)],
        "head": [bottleneck((3, 8), "gelu", "sequential", 2)],
        weight: [LowRank(a, bt, 0.2)],
    }
    other = {site: [bottleneck((8, 16), "none", "sequential", 3)]}
    paths = [write(tmp_path, manifest, one, "one", alpha=2.0), write(tmp_path, manifest, other)]

    adapters = [Adapter.load(path) for path in paths]

    def expected(weights):
        return hooked(net, summed(adapters, weights), lambda: net(torch.from_numpy(x)))

    with open_bundle(net_session.folder, threads=1, route=route) as session:
        for path in paths:
            session.load_adapter(path)
        base = run_net(session, x)
        session.set_adapters(["one", "adapter"], [0.5, 1.5])
        both = session.state_id
        assert_close(run_net(session, x), expected([0.5, 1.5]))
        assert session.differing_slots() == [weight]
        with pytest.raises(UnsupportedError, match=r"unfused while .* is active"):
            session.run({"x": x}, adapter="one")
        session.set_adapter("adapter")
        assert_close(run_net(session, x), expected([0, 1]))
        assert session.differing_slots() == []
        assert session.active_adapters == {"adapter": 1.0}
        assert session.state_id != both
        paths[1].unlink()
        with session.using("one"):
            assert_close(run_net(session, x), expected([1, 0]))
        assert session.active_adapters == {"adapter": 1.0}
        session.disable_adapters()
        assert run_net(session, x).tobytes() == base.tobytes()


@pytest.mark.parametrize("act", ["relu", "none"])
def test_a_bottleneck_with_a_replaced_head_is_set_and_not_run_unfused(
    act, net, net_session, x, tmp_path
):
    site, head = "blocks.0.down", np.random.default_rng(4).standard_normal((3, 8), np.float32)
    form = bottleneck((8, 16), act, "parallel")
    deltas = {site: [form], "head.weight": [Dense(head, mode="set")]}
    name = net_session.load_adapter(write(tmp_path, net_session.manifest, deltas, "head"))
    with pytest.raises(UnsupportedError, match=r"(?s)head\.weight.*set_adapter\(\)"):
        net_session.run({"x": x}, adapter=name)
    only = write(tmp_path, net_session.manifest, {site: [form]}, "only")
    changed = copy.deepcopy(net)
    changed.head.weight.data = torch.from_numpy(head)
    with net_session.using(name):
        assert_close(
            run_net(net_session, x), hooked(changed, only, lambda: changed(torch.from_numpy(x)))
        )
    assert net_session.differing_slots() == []
    net_session.delete_adapter(name)


def test_a_trained_branch_and_head_of_one_bit_compute_what_training_saw(
    net, net_session, x, tmp_path
):
    from edge_lora.methods import attach

    model = copy.deepcopy(net)
    attached = attach(model, "biadaptformer", slots=["blocks.0.down"], rank=4, head="head.weight")
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
        expected = model(torch.from_numpy(x)).numpy()
    path = attached.lower("bi-head").save(tmp_path / "bi-head")
    attached.detach()
    name = net_session.load_adapter(path)
    with net_session.using(name):
        assert_close(run_net(net_session, x), expected)
    net_session.delete_adapter(name)


class Two(torch.nn.Module):
    """A site whose output has a second reader, and whose bias a second layer reads."""

    def __init__(self):
        super().__init__()
        self.site, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.other.bias = self.site.bias
        self.pair = Pair(self.site)

    def forward(self, x):
        y, mean = self.pair(x)
        return self.other(torch.relu(y)) + mean


class Pair(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y, y.mean(-1, keepdim=True)


def test_only_what_reads_the_site_sees_an_active_branch(tmp_path):
    from edge_lora.export import export_bundle

    net, x = Two().eval(), torch.randn(4, 8)
    export_bundle(
        net, tmp_path / "out", example_inputs={"x": x}, sites=["pair"],
        slot_names=["site", "other", "site.bias"], progress=False,
    )  # fmt: skip
    form = bottleneck((8, 8), "none", "parallel")
    hook = net.pair.register_forward_hook(
        lambda _, z, out: (out[0] + branch(form, z[0], 1), out[1])
    )
    expected = net(x).detach().numpy()
    hook.remove()
    with open_bundle(tmp_path / "out", threads=1) as session:
        session.load_adapter(write(tmp_path, session.manifest, {"pair": [form]}))
        session.set_adapter("adapter")
        assert_close(run_net(session, x.numpy()), expected)
