"""A written-out normalisation becomes one node, whatever axis it is over, with the same result."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from edge_lora.export import export_bundle  # noqa: E402

WINDOW, HORIZON = 24, 6


class Normalised(torch.nn.Module):
    """A forecast of a window without its mean and spread, which come back at the end."""

    def __init__(self, axis, epsilon=1e-5):
        super().__init__()
        torch.manual_seed(0)
        self.axis, self.epsilon = axis, epsilon
        self.head = torch.nn.Linear(WINDOW, HORIZON, bias=False)

    def forward(self, x):
        mean = x.mean(self.axis, keepdim=True)
        centred = x - mean
        spread = torch.sqrt((centred * centred).mean(self.axis, keepdim=True) + self.epsilon)
        z = torch.tanh(centred / spread)  # else the spread would cancel
        y = self.head(z.movedim(self.axis, -1)).movedim(-1, self.axis)
        return y * spread + mean


class OtherSteps(Normalised):
    """Looks alike, but its spread is over another axis than its mean."""

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        spread = torch.sqrt((centred * centred).mean(2, keepdim=True) + self.epsilon)
        return self.head((centred / spread).transpose(1, 2))


def exported(model, shape, folder):
    export_bundle(
        model, folder, example_inputs={"x": torch.randn(shape)}, dynamic_shapes={"x": {0: "batch"}},
        slot_names=["head.weight"], progress=False,
    )  # fmt: skip
    path = str(folder / "onnx" / "model.onnx")
    operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    return operators, ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (3, WINDOW, 2)), (-1, (3, 2, WINDOW)), (1, (3, WINDOW))]
)
def test_it_is_one_node_with_the_same_result(axis, shape, tmp_path):
    model = Normalised(axis)
    operators, session = exported(model, shape, tmp_path / "bundle")
    assert operators.count("LayerNormalization") == 1
    assert not {"ReduceMean", "Sqrt", "Div", "Sub", "Identity"} & set(operators)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 400
    want = model.double()(x.float().double()).detach().numpy()
    found = session.run(None, {"x": x.float().numpy()})[0]
    np.testing.assert_allclose(found, want, rtol=2e-6)


def test_a_window_without_spread_gives_its_value(tmp_path):
    _, session = exported(Normalised(1), (3, WINDOW, 2), tmp_path / "bundle")
    x = np.full((2, WINDOW, 2), 101325.3, np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], 101325.3, rtol=1e-6)


def test_epsilon_is_kept(tmp_path):
    model = Normalised(1, epsilon=4.0)
    _, session = exported(model, (3, WINDOW, 2), tmp_path / "bundle")
    x = torch.randn(2, WINDOW, 2)
    want = model(x).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], want, rtol=1e-4, atol=1e-5)


def test_what_only_looks_alike_stays(tmp_path):
    model = OtherSteps(1)
    operators, session = exported(model, (3, WINDOW, 2), tmp_path / "bundle")
    assert "LayerNormalization" not in operators
    x = torch.randn(2, WINDOW, 2)
    found = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
