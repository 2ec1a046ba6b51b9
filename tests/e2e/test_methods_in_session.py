"""What the methods train runs unfused in the exported graph as it did in torch."""

import numpy as np
import pytest

from edge_lora.runtime import open_bundle

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def session(torch_model, tmp_path_factory):
    from edge_lora.export import export_bundle

    out = tmp_path_factory.mktemp("methods") / "out"
    export_bundle(
        torch_model, out, slots="inputs", slot_forms=("low_rank", "row_scale"), progress=False,
        sites=["*.mlp", "*.post_attention_layernorm->*.mlp"],
        slot_names=["*_proj", "*.embed_tokens"],
    )  # fmt: skip
    with open_bundle(out, threads=1) as opened:
        yield opened
        assert opened.differing_slots() == []


CASES = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "bilora": {"rank": 4, "bits": 1},
    "dylora": {"rank": 4, "ranks": [1, 2, 4]},
    "matryoshka": {"rank": 4, "ranks": [1, 2, 4]},
    "biadaptformer": {"rank": 4, "bits": 2},
}


@pytest.mark.parametrize("method", CASES)
def test_unfused_equals_the_trained_model(method, torch_model, session, feeds, tmp_path):
    from edge_lora.methods import attach

    attached = attach(torch_model, method, **CASES[method])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        attached.model.eval()
        ids = torch.from_numpy(feeds["input_ids"])
        expected = attached.model(ids).logits.numpy()
    path = attached.lower(method, dtype="F32").save(tmp_path / "a.safetensors")
    attached.detach()
    base = session.run(feeds)["logits"]
    name = session.load_adapter(path)
    found = session.run(feeds, adapter=name)["logits"]
    assert np.abs(expected - base).max() > 0.02 * np.abs(base).max()
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    session.delete_adapter(name)


def test_the_engines_own_adapters_feed_the_same_inputs(torch_model, session, feeds, tmp_path):
    """A file of ONNX Runtime's own kind, fed without us, does what our session does."""
    import onnxruntime as ort

    from edge_lora import Adapter
    from edge_lora.methods import attach
    from edge_lora.runtime.slot_arrays import slot_arrays

    for method in ("dora", "biadaptformer"):
        attached = attach(torch_model, method, rank=2)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        path = attached.lower(method, dtype="F32").save(tmp_path / f"{method}.safetensors")
        attached.detach()
        arrays = slot_arrays(Adapter.load(path), session.manifest)
        file = ort.AdapterFormat()
        file.set_parameters({k: ort.OrtValue.ortvalue_from_numpy(a) for k, a in arrays.items()})
        file.export_adapter(str(tmp_path / f"{method}.onnx_adapter"))
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(tmp_path / f"{method}.onnx_adapter"))
        options.add_active_adapter(adapter)
        plain = ort.InferenceSession(
            str(session.folder / "onnx/model.onnx"), providers=["CPUExecutionProvider"]
        )
        found = plain.run(["logits"], dict(feeds), options)[0]
        name = session.load_adapter(path)
        expected = session.run(feeds, adapter=name)["logits"]
        session.delete_adapter(name)
        assert np.abs(found - plain.run(["logits"], dict(feeds))[0]).max() > 0.01
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
