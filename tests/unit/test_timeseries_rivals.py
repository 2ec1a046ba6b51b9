"""Other people's forecasters, from their formulas, and what stands beside an adapter."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora.cli import main
from edge_lora.errors import EngineUnavailableError, UnknownNameError, UnsupportedError
from edge_lora.timeseries.series import SeriesError, read_series

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.torch

from edge_lora.timeseries import compare  # noqa: E402
from edge_lora.timeseries.metrics import measure  # noqa: E402
from edge_lora.timeseries.rivals import RIVALS, train_rival  # noqa: E402
from edge_lora.timeseries.series import Series  # noqa: E402
from edge_lora.timeseries.training import Recipe, fit, predictor  # noqa: E402
from edge_lora.timeseries.windows import cut  # noqa: E402


def waves(rows=400):
    rng = np.random.default_rng(0)
    values = np.sin(np.arange(rows) * 2 * np.pi / 24)[:, None] + rng.normal(0, 0.1, (rows, 1))
    return Series(values.astype(np.float32), ("a",), 3600.0)


@pytest.fixture
def parts():
    return cut(waves(), 24, 6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dlinear", 2 * (336 * 96 + 96)),
        ("rlinear", 336 * 96 + 96 + 2),
        ("patchtst", 2 + 17 * 16 + 42 * 16 + 3 * 5_392 + 42 * 16 * 96 + 96),
    ],
)
def test_sizes(name, values):
    """PatchTST has 5,392 a layer: attention 1,088, norms 64, feed-forward 4,240."""
    assert sum(p.numel() for p in RIVALS[name](336, 96).parameters()) == values


def test_dlinear_is_its_formula():
    model = RIVALS["dlinear"](40, 6)
    x = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    got = model(x).detach().numpy()
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    series = x.double().numpy()[1, :, 2]
    padded = np.concatenate([[series[0]] * 12, series, [series[-1]] * 12])
    trend = np.convolve(padded, np.ones(25) / 25, "valid")
    want = weights["trend.weight"] @ trend + weights["trend.bias"]
    want += weights["rest.weight"] @ (series - trend) + weights["rest.bias"]
    np.testing.assert_allclose(got[1, :, 2], want, atol=1e-5)


@pytest.mark.parametrize("name", list(RIVALS))
def test_channels_do_not_see_each_other(name):
    model = RIVALS[name](40, 6).eval()
    x = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([model(x[:, :, c : c + 1]) for c in range(3)], 2)
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(RIVALS))
def test_rivals_learn_in_the_same_loop(name, parts):
    torch.manual_seed(0)
    before = measure(predictor(RIVALS[name](24, 6).eval()), parts.validation).mse
    model, report = train_rival(name, parts, epochs=25)
    after = measure(predictor(model), parts.validation).mse
    assert after == pytest.approx(report.best_validation_loss, rel=1e-3)
    assert after < 0.95 * before
    assert len(report.validation_losses) == 25
    assert not model.training


def test_unknown_names_are_refused_before_any_work(parts, tmp_path):
    with pytest.raises(UnknownNameError, match="Known: dlinear, rlinear, patchtst, fracast"):
        compare.comparisons(["dlinear", "arima"], parts, 0, "cpu")
    with pytest.raises(UnknownNameError, match="unknown rival 'arima'"):
        train_rival("arima", parts)
    command = "train --task forecast --data none.csv --horizon 6 --compare arima -o"
    result = CliRunner().invoke(main, [*command.split(), str(tmp_path / "x.safetensors")])
    assert result.exit_code == 1
    assert "nothing to compare with: arima" in result.output


def test_a_device_that_is_not_there(parts):
    from edge_lora.timeseries.bases import make_base

    with pytest.raises(UnsupportedError, match="no device 'tpu' here"):
        fit(make_base("linear", 24, 6), parts, Recipe(device="tpu"))


def write(path, rows=200):
    times = np.datetime64("2024-01-01T00") + np.arange(rows)
    lines = [f"{t},{i % 24},sunny,{i % 12}" for i, t in enumerate(times)]
    path.write_text("\n".join(["date,a,sky,b", *lines]))
    return path


def test_columns_are_chosen_by_name_and_the_others_never_read(tmp_path):
    path = write(tmp_path / "x.csv")
    assert read_series(path, columns=["b"]).columns == ("b",)
    both = read_series(path, columns=["b", "a"])
    assert both.columns == ("a", "b")  # in the order of the file
    np.testing.assert_array_equal(both.values[:13, 1], [*range(12), 0])
    with pytest.raises(SeriesError, match="'sunny' in column 'sky'"):
        read_series(path)
    with pytest.raises(SeriesError, match=r"no column 'c', 'date'\. It has: a, sky, b"):
        read_series(path, columns=["c", "a", "date"])


def test_the_table_has_bytes_of_base_and_adapter(tmp_path):
    path = write(tmp_path / "x.csv")
    command = (
        "train --task forecast --window 24 --horizon 6 --epochs 1 --columns a,b --affine "
        "--compare dlinear,rlinear --device cpu"
    )
    arguments = [*command.split(), "--data", str(path), "-o", str(tmp_path / "x.safetensors")]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    rows = {row["forecast"]: row for row in facts["test"]}
    assert rows["dlinear"]["adapter_bytes"] == 4 * 2 * (24 * 6 + 6)
    assert rows["rlinear"]["base_bytes"] == 0
    ours = rows["adapter (rslora on linear)"]
    assert ours["base_bytes"] == 4 * (24 * 6 + 2)
    assert ours["adapter_bytes"] == pytest.approx(facts["file_bytes"], abs=300)
    assert ours["values"] == 16 * 30 + 2
    told = CliRunner().invoke(main, arguments)
    assert "forecast\tvalues\tbase\tadapter\ttest MSE\ttest MAE" in told.stdout


@pytest.mark.skipif(find_spec("fracast") is None, reason="fracast is not installed")
def test_fracast_untrained_says_how_many_windows_it_saw(parts, monkeypatch):
    monkeypatch.setattr(compare, "FEW_WINDOWS", 5)
    (row,) = compare.comparisons(["fracast"], parts, 0, "cpu")
    assert row.name == "fracast, untrained, 5 of the windows"
    assert (row.errors.windows, row.values, row.base_bytes) == (5, 0, 4 * 85_001)


def test_some_windows_are_spread_evenly_and_have_every_channel(parts):
    values = np.arange(60, dtype=np.float32)[:, None] + 100 * np.arange(3, dtype=np.float32)
    windows = replace(parts.test, values=values)
    seen = []

    def predict(x):
        seen.extend(x[:, 0].tolist())
        return np.zeros((len(x), 6), np.float32)

    which = windows.spread(10)
    assert measure(predict, windows, which).windows == 9
    assert seen == [c + t for t in (0, 15, 30) for c in (0, 100, 200)]
    assert windows.starts == 31
    np.testing.assert_array_equal(windows.spread(1), [0, 1, 2])
    np.testing.assert_array_equal(windows.spread(1000), np.arange(len(windows)))


@pytest.mark.parametrize(
    ("names", "window", "message"),
    [
        ("patchtst,dlinear", 6, "patchtst needs a window of at least 8 rows, not 6"),
        ("dlinear,", 24, "--compare 'dlinear,' has an empty name"),
        (",", 24, "--compare ',' has an empty name"),
    ],
)
def test_comparisons_that_cannot_be_are_refused_before_training(tmp_path, names, window, message):
    data, out = write(tmp_path / "x.csv"), tmp_path / "x.safetensors"
    command = f"train --task forecast --columns a --horizon 6 --window {window} --compare {names}"
    arguments = [*command.split(), "--data", str(data), "-o", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "training on" not in result.output
    assert not out.exists()


def test_a_comparison_without_its_package_is_refused_before_training(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "fracast", None)
    monkeypatch.setitem(sys.modules, "fracast.inference", None)
    with pytest.raises(EngineUnavailableError, match=r"edge-lora\[forecast\]"):
        compare.check_comparisons(["fracast"], 24, 6)
    with pytest.raises(UnsupportedError, match="8 rows, not 7"):
        compare.check_comparisons(["fracast"], 7, 6)


def test_rivals_take_the_epochs_that_are_asked_for_and_each_name_once(parts):
    rows = compare.comparisons(["dlinear", "rlinear", "dlinear"], parts, 0, "cpu", epochs=2)
    assert [row.name for row in rows] == ["dlinear", "rlinear"]
    assert [len(row.fit.validation_losses) for row in rows] == [2, 2]


@pytest.mark.parametrize("options", [("--compare", "dlinear"), ("--name", "x")])
def test_what_a_set_has_not_is_refused(tmp_path, options):
    data = write(tmp_path / "x.csv")
    command = f"train --task forecast --data {data} --columns a --horizon 6 --condition hour -o"
    result = CliRunner().invoke(main, [*command.split(), str(tmp_path / "set"), *options])
    assert result.exit_code == 2
    assert "--condition trains several" in result.output
