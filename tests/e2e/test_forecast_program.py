"""``edge-lora export --task forecast --engine executorch``: a stream over the other engine."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("edge_lora_executorch")
torch = pytest.importorskip("torch")
pytest.importorskip("executorch")
pytestmark = pytest.mark.torch

from edge_lora.cli import main  # noqa: E402
from edge_lora.errors import UnsupportedError  # noqa: E402
from edge_lora.runtime import open_bundle  # noqa: E402

WINDOW, HORIZON = 24, 6


def run(*arguments):
    found = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("forecast") / "out"
    options = ["--engine", "executorch", "--engine", "onnxruntime", "--json"]
    shape = ["--window", WINDOW, "--horizon", HORIZON]
    facts = json.loads(run("export", "--task", "forecast", *shape, *options, "-o", out))
    assert facts["largest"] == {"batch": 64, "channels": 16}
    assert facts["slots"] == 1
    assert set(facts["largest_relative_error"]) == {"executorch", "onnxruntime"}
    return out


def test_more_series_than_a_run_takes_are_forecast_in_several(bundle, tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((WINDOW, 100))
    source = tmp_path / "in.csv"
    lines = [",".join(["time", *(f"s{i}" for i in range(100))])]
    lines += [",".join(map(str, [60 * t, *row])) for t, row in enumerate(values)]
    source.write_text("\n".join(lines) + "\n")
    found = {
        engine: run("run", bundle, "--input", source, "--engine", engine).splitlines()[1:]
        for engine in ("executorch", "onnxruntime")
    }
    tables = [[line.split(",")[2:] for line in lines] for lines in found.values()]
    assert np.shape(tables[0]) == (100, HORIZON)
    np.testing.assert_allclose(*np.array(tables, np.float64), rtol=1e-5, atol=1e-6)


def test_a_run_that_is_too_large_is_refused_before_the_engine(bundle):
    with open_bundle(bundle, engine="executorch", threads=1) as session:
        assert session.largest == {"batch": 64, "channels": 16}
        whole = session.run({"x": np.zeros((64, WINDOW, 16), np.float32)})
        assert whole["output_0"].shape == (64, HORIZON, 16)
        with pytest.raises(UnsupportedError, match=r"(?s)batch may be at most 64.*channels may be"):
            session.run({"x": np.zeros((65, WINDOW, 17), np.float32)})
        with pytest.raises(UnsupportedError, match="channels may be at most 16"):
            session.io_binding().bind_input("x", np.zeros((1, WINDOW, 17), np.float32))
    with open_bundle(bundle, engine="onnxruntime", threads=1) as session:
        assert session.largest == {}
        session.run({"x": np.zeros((65, WINDOW, 17), np.float32)})


def test_inspect_says_the_largest_sizes(bundle):
    facts = json.loads(run("inspect", bundle, "--engine", "executorch", "--json"))
    assert facts["largest"] == {"batch": 64, "channels": 16}
