"""The core as ONNX Runtime's allocator: patched == rebuilt and undone == base, to the bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from edge_lora import Sparse, native, reference  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from native_images import adapter_file  # noqa: E402

pytestmark = pytest.mark.ort


def session_of(weight):
    """Return a session of one MatMul under our allocator and its packed block, if it has one."""
    in_features, out_features = weight.shape
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", in_features])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["m", out_features])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(weight), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1")
    before = {block[0] for block in native.live_blocks()}
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    blocks = [
        (address, size)
        for address, size, reserved in native.live_blocks()
        if reserved and address not in before and size >= weight.nbytes
    ]
    return session, blocks


@pytest.fixture(scope="module", autouse=True)
def _registered():
    for _ in range(2):  # twice is fine
        ort.SessionOptions().register_custom_ops_library(native.library_path())
    assert native.allocator_status() == "registered"


@pytest.mark.parametrize("shape", [(40, 300), (48, 64), (17, 520)], ids=str)
def test_patched_is_rebuilt_and_undone_is_base(shape, tmp_path):
    out_features, in_features = shape
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(np.float32)
    probe, found = session_of(native.Layout.probe_values(in_features, out_features, "io"))
    layout = native.Layout.from_probe(*found[0], in_features, out_features)
    del probe
    session, blocks = session_of(weight.T)
    (tmp_path / "w").write_bytes(np.ascontiguousarray(weight.T).tobytes())
    image = native.Image(1)
    image.add_slot("w", in_features, out_features, str(tmp_path / "w"), 0, "io")
    held = [block for block in blocks if image.add_place("w", layout, *block)]
    assert len(held) == 1

    x = rng.standard_normal((3, in_features)).astype(np.float32)
    base = session.run(None, {"x": x})[0]
    indices = np.sort(rng.choice(weight.size, 100, replace=False)).astype(np.uint32)
    form = Sparse(indices, rng.standard_normal(100).astype(np.float16))
    image.swap(image.compile([(adapter_file(tmp_path, {"w": [form]}, {"w": shape}), 1.0)]))
    rebuilt, _ = session_of(reference.apply(weight, [(form, 1.0)]).T)
    patched = session.run(None, {"x": x})[0]
    np.testing.assert_array_equal(patched, rebuilt.run(None, {"x": x})[0])
    assert not np.array_equal(patched, base)
    image.swap(None)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], base)
    image.close()


def test_run_time_memory_is_reused_and_given_back():
    session, _ = session_of(np.ones((64, 64), np.float32))
    x = np.ones((8, 64), np.float32)
    session.run(None, {"x": x})
    before = native.allocator_stats()
    for _ in range(20):
        session.run(None, {"x": x})
    after = native.allocator_stats()
    assert after["misses"] == before["misses"]
    assert after["hits"] > before["hits"]
    assert after["cached_bytes"] <= 64 << 20
    del session
    assert native.allocator_stats()["reserved_bytes"] < after["reserved_bytes"]


def test_sessions_that_do_not_opt_in_are_left_alone():
    before = native.live_blocks()
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Abs (x) }'
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones(1000, np.float32)})
    assert native.live_blocks() == before


def test_process_exits_cleanly_with_a_live_session():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np, test_native_allocator as t\n"
        "from edge_lora import native\n"
        "t.ort.SessionOptions().register_custom_ops_library(native.library_path())\n"
        "session, _ = t.session_of(np.ones((64, 64), np.float32))\n"
        "session.run(None, {'x': np.ones((2, 64), np.float32)})\n"
    )
    folder = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
