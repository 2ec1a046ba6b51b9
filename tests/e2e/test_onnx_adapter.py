"""A ``.onnx_adapter`` in plain ONNX Runtime, against our own unfused run."""

import numpy as np
import pytest

from edge_lora import Adapter
from edge_lora.errors import AdapterMismatchError, UnsupportedError
from edge_lora.quantise import quantise
from edge_lora.runtime import open_bundle
from edge_lora.runtime.onnx_adapter import to_onnx_adapter

ort = pytest.importorskip("onnxruntime")


def plain_run(bundle, feeds, adapter=None):
    """Run the graph as any program with ONNX Runtime would."""
    options = ort.RunOptions()
    loaded = ort.LoraAdapter()
    if adapter is not None:
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    session = ort.InferenceSession(
        bundle / "onnx" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds, options), strict=True))


@pytest.mark.parametrize("bits", [None, 2])
def test_the_outputs_are_those_of_our_unfused_run(bundle, feeds, make_adapter, tmp_path, bits):
    adapter = Adapter.load(make_adapter("low_rank", 1, slots="model.layers.*", alpha=0.5))
    if bits:
        adapter = quantise(adapter, bits)
    path = to_onnx_adapter(adapter, tmp_path / "x.onnx_adapter", bundle)
    theirs, base = plain_run(bundle, feeds, path)["logits"], plain_run(bundle, feeds)["logits"]
    with open_bundle(bundle, threads=1) as session:
        session.load_adapter(adapter.save(tmp_path / "x.safetensors"), "x")
        ours = session.run(feeds, adapter="x")["logits"]
    assert np.abs(theirs - base).max() > 1e-2
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


def test_what_the_graph_cannot_be_fed_is_refused(mlp_bundle, make_mlp_adapter, tmp_path):
    path = tmp_path / "x.onnx_adapter"
    with pytest.raises(UnsupportedError, match="form sparse is not low-rank"):
        to_onnx_adapter(Adapter.load(make_mlp_adapter("sparse")), path, mlp_bundle)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_refused(bundle, make_mlp_adapter, tmp_path):
    with pytest.raises(AdapterMismatchError, match="fingerprints differ"):
        to_onnx_adapter(Adapter.load(make_mlp_adapter("low_rank")), tmp_path / "x", bundle)
