"""Most of a written-out normalisation becomes one node over any axis, with the same result."""

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
    assert not {"ReduceMean", "Sqrt", "Div", "Identity"} & set(operators)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 400
    want = model.double()(x.float().double()).detach().numpy()
    found = session.run(None, {"x": x.float().numpy()})[0]
    np.testing.assert_allclose(found, want, rtol=2e-6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a model, its graph and a session over it."""
    folder, model = tmp_path_factory.mktemp("plain") / "bundle", Normalised(1)
    _, session = exported(model, (3, WINDOW, 2), folder)
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
    return model.double(), graph, session


def test_the_fused_node_sees_values_near_zero(plain):
    """Engines differ in how it takes the spread; only around zero are they all exact."""
    _, graph, _ = plain
    made_by = {name: node for node in graph.node for name in node.output}
    (fused,) = (node for node in graph.node if node.op_type == "LayerNormalization")
    before = made_by[fused.input[0]]
    while before.op_type == "Transpose":
        before = made_by[before.input[0]]
    assert before.op_type == "Sub"


@pytest.mark.parametrize(("mean", "spread"), [(101325, 5), (1e6, 1), (-1e4, 0.1), (1.6e9, 1000)])
def test_values_far_from_zero(plain, mean, spread):
    model, _, session = plain
    x = (mean + spread * torch.randn(4, WINDOW, 2, dtype=torch.float64)).float()
    want = model(x.double()).detach().numpy()
    found = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, want, atol=1e-3 * spread + 2e-7 * abs(mean), rtol=0)


@pytest.mark.parametrize(("axes_of_epsilon", "is_fused"), [(0, True), (1, True), (4, False)])
def test_an_epsilon_that_adds_axes_is_left_alone(axes_of_epsilon, is_fused):
    ir = pytest.importorskip("onnx_ir")
    from edge_lora.export.normalisation import FuseNormalisation

    steps = """
        m = ReduceMean(x, axis)  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean(q, axis)
        e = Add(v, small)  s = Sqrt(e)  y = Div(d, s)  z = Mul(y, y)
    """
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float[2, 8, 3] x) => (float z)
    <int64[1] axis = {{1}}> {{{steps}}}"""
    model = onnx.parser.parse_model(text)
    small = np.full((1,) * axes_of_epsilon, 1e-5, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(small, "small"))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("z", 1, None))
    before = model.SerializeToString()
    result = FuseNormalisation([])(ir.from_proto(model))
    assert result.modified == is_fused
    x = {"x": np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)}
    want, found = (
        ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, x)[0]
        for data in (before, ir.to_proto(result.model).SerializeToString())
    )
    assert want.shape == found.shape
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_a_window_without_spread_gives_its_value(plain):
    _, _, session = plain
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
