"""What a session makes of inputs for an ExecuTorch program that has no bundle."""

import warnings

import numpy as np
import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime import open_bundle

pytest.importorskip("edge_lora_executorch")
torch = pytest.importorskip("torch")
pytest.importorskip("executorch.exir")
pytestmark = pytest.mark.torch


class Scaled(torch.nn.Module):
    """Look something up, and scale it by a number without axes."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 3)

    def forward(self, ids, factor):
        return self.table(ids) * factor


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Scaled().eval()


@pytest.fixture(scope="module")
def session(model, tmp_path_factory):
    from executorch.exir import to_edge

    inputs = (torch.tensor([1, 2]), torch.tensor(2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ExecuTorch's own
        program = to_edge(torch.export.export(model, inputs)).to_executorch().buffer
    path = tmp_path_factory.mktemp("program") / "scaled.pte"
    path.write_bytes(program)
    with open_bundle(path, threads=1) as opened:
        yield opened


def feeds(ids=(1, 2), factor=2.0):
    return {"input_0": np.array(ids, np.int64), "input_1": np.array(factor, np.float32)}


def test_an_input_without_axes(session, model):
    (found,) = session.run(feeds(factor=-0.5)).values()
    expected = model(torch.tensor([1, 2]), torch.tensor(-0.5)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bytes_in_another_order_are_refused(session):
    swapped = {**feeds(), "input_0": np.array([1, 2], ">i8")}
    with pytest.raises(UnsupportedError, match="'input_0' is >i8, must be int64"):
        session.run(swapped)


def test_a_failed_run_names_its_inputs(session):
    with pytest.raises(UnsupportedError, match=r"run of input_0 \(2,\), input_1 \(\): .*failed"):
        session.run(feeds(ids=(1, 9)))
