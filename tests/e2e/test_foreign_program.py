"""An ExecuTorch program that was not exported for us: it runs, and says that it has no slots."""

import shutil

import numpy as np
import pytest

from edge_lora.bundle import read_manifest
from edge_lora.errors import BundleError, EngineUnavailableError, UnsupportedError
from edge_lora.runtime import open_bundle
from edge_lora.runtime.canary import canary_feeds

pytest.importorskip("edge_lora_executorch")


@pytest.fixture(scope="module")
def program(program_bundle, tmp_path_factory):
    """Return a program without its bundle."""
    path = tmp_path_factory.mktemp("foreign") / "model.pte"
    shutil.copy(program_bundle / read_manifest(program_bundle).program.file, path)
    return path


def test_it_runs_under_numbered_names(program, program_bundle):
    with open_bundle(program_bundle, "executorch", threads=1) as session:
        feeds = canary_feeds(session.manifest)
        order = session.manifest.program.input_order
        wanted = session.run(feeds)["logits"]
    with open_bundle(program, threads=1) as session:
        assert list(session.inputs) == [f"input_{i}" for i in range(len(order))]
        assert session.inputs[f"input_{order.index('input_ids')}"].dtype == "int64"
        zeros = {
            name: np.zeros([int(str(size).split()[-1]) for size in spec.shape], spec.dtype)
            for name, spec in session.inputs.items()
        }
        named = {f"input_{order.index(name)}": array for name, array in feeds.items()}
        (found,) = session.run({**zeros, **named}).values()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert (session.route, session.adapters) == ("reload", [])


def test_adapters_are_refused_with_the_reason(program, make_adapter):
    with open_bundle(program, threads=1) as session:
        with pytest.raises(UnsupportedError, match="has no slots, so no adapter can be loaded"):
            session.load_adapter(make_adapter("sparse"))
        assert session.adapters == []


def test_what_it_cannot_do_is_said(program):
    with pytest.raises(EngineUnavailableError, match="no ONNX graph"):
        open_bundle(program, "onnxruntime")
    with pytest.raises(UnsupportedError, match="packs no weight of a slot"):
        open_bundle(program, route="packed")


@pytest.mark.parametrize("content", [b"", b"no program at all" * 9, b"\x3c\0\0\0ET12eh00"])
def test_a_file_that_is_no_program_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.pte"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"broken\.pte"):
        open_bundle(path)


def test_wrong_inputs_are_refused(program):
    with open_bundle(program, threads=1) as session, pytest.raises(UnsupportedError):
        session.run({"input_0": np.zeros((1, 2), np.float32)})
