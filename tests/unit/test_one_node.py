import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_lora.runtime.engines.one_node import matmul_model


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (33, 17), (128, 300)])
def test_the_handmade_model_is_valid_onnx_and_multiplies(in_features, out_features):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((in_features, out_features)).astype(np.float32)
    blob = matmul_model(weight)
    onnx.checker.check_model(onnx.load_from_string(blob), full_check=True)
    x = rng.standard_normal((3, in_features)).astype(np.float32)
    session = ort.InferenceSession(blob, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight, rtol=1e-4, atol=1e-4)
