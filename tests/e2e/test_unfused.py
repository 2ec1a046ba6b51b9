"""Adapters as graph inputs, for one call."""

import numpy as np
import pytest

from edge_lora.errors import UnknownNameError, UnsupportedError
from edge_lora.runtime import open_bundle
from edge_lora.runtime.canary import canary_feeds


@pytest.fixture(scope="module", params=["onnxruntime", "executorch"])
def session(request, bundle_for):
    with open_bundle(bundle_for(request.param), threads=2) as opened:
        yield opened
        assert opened.differing_slots() == []


@pytest.fixture(scope="module")
def feeds(session):
    return canary_feeds(session.manifest)


@pytest.fixture(scope="module", autouse=True)
def _load(session, make_adapter):
    session.load_adapter(make_adapter("low_rank", 1, slots="model.layers.*"), "low")
    session.load_adapter(make_adapter("low_rank", 2, slots="*.q_proj.weight", alpha=0.5), "part")
    session.load_adapter(make_adapter("sparse", 3), "sparse")


@pytest.mark.parametrize("name", ["low", "part"])
def test_unfused_equals_fused(session, feeds, name):
    base = session.run(feeds)["logits"]
    unfused = session.run(feeds, adapter=name)["logits"]
    with session.using(name):
        fused = session.run(feeds)["logits"]
    assert np.abs(fused - base).max() > 1e-2
    np.testing.assert_allclose(unfused, fused, rtol=2e-4, atol=2e-4)
    assert session.run(feeds)["logits"].tobytes() == base.tobytes()


def test_io_binding_uses_the_adapter_and_reads_its_arrays_anew(session, feeds):
    binding = session.io_binding(adapter="low")
    arrays = {name: array.copy() for name, array in feeds.items()}
    for name, array in arrays.items():
        binding.bind_input(name, array)
    first = binding.numpy(binding.run()["logits"])
    np.testing.assert_array_equal(first, session.run(feeds, adapter="low")["logits"])
    arrays["input_ids"] += 1
    np.testing.assert_array_equal(
        binding.numpy(binding.run()["logits"]), session.run(arrays, adapter="low")["logits"]
    )


def test_a_sparse_adapter_is_refused_by_name(session, feeds):
    with pytest.raises(UnsupportedError, match="form sparse is not low-rank"):
        session.run(feeds, adapter="sparse")


def test_unfused_on_top_of_fused_is_refused(session, feeds):
    with session.using("sparse"), pytest.raises(UnsupportedError, match="disable_adapters"):
        session.run(feeds, adapter="low")


def test_wrong_inputs_are_all_named(session, feeds):
    gone = next(name for name in ("attention_mask", "start") if name in feeds)
    bad = {k: v for k, v in feeds.items() if k != gone}
    bad["input_ids"] = bad["input_ids"].astype(np.float32)
    bad["nonsense"] = np.zeros(1)
    with pytest.raises(UnsupportedError) as caught:
        session.run(bad)
    for text in (
        f"'{gone}' is missing",
        "'input_ids' is float32",
        "no such input 'nonsense'",
    ):
        assert text in str(caught.value)
    with pytest.raises(UnknownNameError, match="no adapter named 'nobody'"):
        session.run(feeds, adapter="nobody")
