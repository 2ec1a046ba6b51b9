"""Plots of forecasts: what is drawn is what was forecast, in the file's units and times."""

import csv
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora.cli import main

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.torch

from edge_lora.errors import UnsupportedError  # noqa: E402
from edge_lora.timeseries.bases import make_base  # noqa: E402
from edge_lora.timeseries.compare import baselines, trained, wearing  # noqa: E402
from edge_lora.timeseries.plots import check_plots, picture, save_errors, save_plot  # noqa: E402
from edge_lora.timeseries.series import Series, read_series  # noqa: E402
from edge_lora.timeseries.training import Recipe  # noqa: E402
from edge_lora.timeseries.windows import cut  # noqa: E402

WINDOW, HORIZON, SEASON = 48, 12, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the first 50 days of Seattle's hourly temperatures, with a column of odd name."""
    found = find_spec("vega_datasets")
    if found is None:
        pytest.skip("vega-datasets is not installed")
    source = Path(found.origin).parent / "_data" / "seattle-temps.csv"
    rows = source.read_text().splitlines()[1:1201]
    path = tmp_path_factory.mktemp("data") / "temps.csv"
    lines = [f"{r},{(float(r.split(',')[1]) - 32) / 1.8:.3f}" for r in rows]
    path.write_text("\n".join(["date,temp,<b>&$celsius$", *lines]))
    return path


@pytest.fixture(scope="module")
def fitted(data):
    """Return series, parts, base and results."""
    series = read_series(data)
    parts = cut(series, WINDOW, HORIZON)
    base = make_base("linear", WINDOW, HORIZON)
    recipe = Recipe(epochs=2)
    _, ours = trained(base, "linear", parts, recipe, "x")
    return series, parts, base, [ours, *baselines(parts, SEASON, recipe, with_no_base=True)]


@pytest.fixture(scope="module")
def drawn(fitted):
    series, parts, base, results = fitted
    return picture(series, parts, base, results, SEASON, "temps.csv")


def test_examples_are_rows_of_the_file(drawn, data):
    with data.open(newline="") as file:
        head, *rows = csv.reader(file)
    at = {np.datetime64(row[0].replace("/", "-")): row for row in rows}
    assert [examples[0].column for examples in drawn.examples] == head[1:]
    for column, examples in enumerate(drawn.examples, 1):
        assert len(examples) == 3
        for example in examples:
            values = [float(at[time][column]) for time in example.times]
            np.testing.assert_allclose([*example.past, *example.truth], values, rtol=1e-4)
            assert len(example.truth) == HORIZON


def test_examples_are_of_the_test_part_only(drawn, fitted):
    _, parts, _, _ = fitted
    begin = np.datetime64("2010-01-01T00:00") + (parts.test.first + WINDOW) * np.timedelta64(1, "h")
    assert all(e.times[-HORIZON] >= begin for examples in drawn.examples for e in examples)


def test_forecasts_are_the_adapters_and_the_rules(drawn, fitted):
    series, parts, base, results = fitted
    example = drawn.examples[1][2]
    hour = np.timedelta64(1, "h")
    first = int((example.times[-HORIZON] - np.datetime64("2010-01-01T00:00")) / hour) - WINDOW
    raw = series.values[first : first + WINDOW, 1]
    x = ((raw - parts.mean[1]) / parts.scale[1])[None].astype(np.float32)
    with wearing(base, results[0].adapter) as predict:
        ours = predict(x)[0] * parts.scale[1] + parts.mean[1]
    found = dict(example.forecasts)
    assert next(iter(found)) == results[0].name
    np.testing.assert_allclose(found[results[0].name], ours, rtol=1e-4)
    np.testing.assert_allclose(found["seasonal (24)"], raw[-SEASON:][:HORIZON], rtol=1e-4)
    assert "no base: low-rank linear" in found
    assert not base.head.weight.any()


def test_the_caption_has_both_sizes(drawn, fitted):
    ours = fitted[3][0]
    assert f"Adapter {ours.adapter_bytes:,} bytes, base {ours.base_bytes:,} bytes" in drawn.caption
    assert f"MSE {ours.errors.mse:.4f}" in drawn.caption


class Checked(HTMLParser):
    """Collects tags, and refuses what closes what was not opened."""

    VOID = frozenset({"meta", "br", "line", "path"})

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone(drawn, tmp_path):
    text = save_plot(drawn, tmp_path / "x.html").read_text()
    page = Checked()
    page.feed(text)
    assert page.open == []
    tags = [tag for tag, _ in page.seen]
    assert not {"script", "link", "img", "iframe", "b"} & set(tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "<b>&$celsius$" in page.texts
    assert tags.count("svg") == 2 * 3 + 2
    assert "prefers-color-scheme:dark" in text
    assert "width=device-width" in text
    assert tags.count("tr") == 1 + HORIZON
    assert "nan" not in text
    example = drawn.examples[0][0]
    told = str(example.times[-HORIZON]).replace("T", " ").removesuffix(":00")
    assert any(t.startswith(f"{told}: truth {example.truth[0]:.5g}, adapter") for t in page.texts)


def test_what_a_page_says_of_a_step_is_what_was_measured(drawn, tmp_path):
    page = Checked()
    page.feed(save_plot(drawn, tmp_path / "x.html").read_text())
    ours = next(iter(drawn.errors))
    error = drawn.errors[ours].mse_by_step[4]
    assert any(t.startswith(f"5 ahead: {ours} {error:.4f}") for t in page.texts)
    assert f"{error:.4f}" in page.texts


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_images_are_drawn(drawn, tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = save_plot(drawn, tmp_path / f"x.{ending}")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(data) > 10_000


def test_one_step_ahead_and_times_that_are_no_dates(tmp_path):
    pytest.importorskip("matplotlib")
    values = np.sin(np.arange(200, dtype=np.float32))[:, None]
    series = Series(values, ("v",), 1e12, 0, 5e14)
    parts = cut(series, 8, 1)
    base = make_base("linear", 8, 1)
    recipe = Recipe(epochs=1, settings={"rank": 1})
    _, ours = trained(base, "linear", parts, recipe, "x")
    results = [ours, *baselines(parts, 4, recipe, with_no_base=False)]
    found = picture(series, parts, base, results, 4, "x.csv")
    assert found.examples[0][0].times.dtype.kind == "i"
    for ending in ("png", "html"):
        assert save_plot(found, tmp_path / f"x.{ending}").stat().st_size > 1000


def test_many_columns_are_said_not_drawn():
    values = np.random.default_rng(0).standard_normal((120, 11)).astype(np.float32)
    series = Series(values, tuple("abcdefghijk"), 60.0)
    parts = cut(series, 6, 2)
    base = make_base("linear", 6, 2)
    recipe = Recipe(epochs=1, settings={"rank": 1})
    _, ours = trained(base, "linear", parts, recipe, "x")
    results = [ours, *baselines(parts, 4, recipe, with_no_base=False)]
    found = picture(series, parts, base, results, 4, "x.csv")
    assert len(found.examples) == 8
    assert found.caption.endswith("3 more columns.")


def test_errors_of_every_step_as_csv(fitted, tmp_path):
    results = fitted[3]
    with save_errors(results, tmp_path / "e.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results) * HORIZON
    assert float(rows[3]["mse"]) == results[0].errors.mse_by_step[3]
    mine = [float(row["mae"]) for row in rows if row["forecast"] == "seasonal (24)"]
    assert np.mean(mine) == pytest.approx(results[2].errors.mae)


def test_an_unknown_ending_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedError, match=r"unknown ending of a plot; known: \.png, \.svg"):
        check_plots([tmp_path / "x.gif"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_plots([tmp_path / "x.html"])
    with pytest.raises(UnsupportedError, match=r"edge-lora\[plot\]"):
        check_plots([tmp_path / "x.png"])


def test_the_command_draws_what_it_is_asked_for(data, tmp_path):
    result = CliRunner().invoke(
        main,
        ["train", "--task", "forecast", "--data", str(data), "--columns", "temp", "--epochs", "1",
         "--horizon", "4", "--window", "24", "-o", str(tmp_path / "x.safetensors"),
         "--plot", str(tmp_path / "x.html"), "--plot", str(tmp_path / "y.html"),
         "--errors", str(tmp_path / "e.csv"), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    page = (tmp_path / "x.html").read_text()
    assert page == (tmp_path / "y.html").read_text()
    assert f"Test MSE {facts['test'][0]['mse']:.4f}" in page
    assert f"Adapter {facts['file_bytes']:,} bytes" in page
    with (tmp_path / "e.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["mse"]) for r in rows[:4]] == [s["mse"] for s in facts["by_step"]]


@pytest.mark.parametrize("name", ["x.gif", "no-folder/x.png", "."])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(data, tmp_path, name):
    result = CliRunner().invoke(
        main,
        ["train", "--task", "forecast", "--data", str(data), "--horizon", "4",
         "-o", str(tmp_path / "x.safetensors"), "--plot", str(tmp_path / name)],
    )  # fmt: skip
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_stored_adapter_is_drawn_as_when_it_was_trained(data, tmp_path):
    common = ["--data", str(data), "--columns", "temp", "--json"]
    stored, page = tmp_path / "x.safetensors", tmp_path / "x.html"
    result = CliRunner().invoke(
        main,
        ["train", "--task", "forecast", "--epochs", "1", "--horizon", "4", "--window", "24",
         "-o", str(stored), *common],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    trained_mse = json.loads(result.stdout)["test"][0]["mse"]
    result = CliRunner().invoke(main, ["plot", str(stored), "-o", str(page), *common])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["test"]["adapter (x)"]["mse"] == pytest.approx(trained_mse, rel=1e-6)
    assert facts["plots"] == [str(page)]
    assert f"Test MSE {trained_mse:.4f}" in page.read_text()
    base = ["--base", "gpt2-random:1x16"]
    result = CliRunner().invoke(main, ["plot", str(stored), "-o", str(page), *common, *base])
    assert result.exit_code == 1
    assert "adapter 'x'" in result.output


@pytest.mark.parametrize(
    "about",
    [{}, {"task": "text"}, {"task": "forecast", "window": 8}, "x",
     {"task": "forecast", "window": True, "horizon": 4, "base": "linear"},
     {"task": "forecast", "window": 8, "horizon": 4, "base": 3}],
)  # fmt: skip
def test_an_adapter_that_says_no_forecast_is_refused(data, fitted, tmp_path, about):
    adapter = replace(fitted[3][0].adapter, provenance={"training": about})
    path = adapter.save(tmp_path / "x.safetensors")
    arguments = ["plot", str(path), "--data", str(data), "-o", str(tmp_path / "x.html")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "does not say that it forecasts" in result.output


def test_an_adapter_that_claims_a_huge_window_is_refused(data, fitted, tmp_path):
    about = {"task": "forecast", "window": 10**12, "horizon": 4, "base": "linear"}
    adapter = replace(fitted[3][0].adapter, provenance={"training": about})
    path = adapter.save(tmp_path / "x.safetensors")
    arguments = ["plot", str(path), "--data", str(data), "-o", str(tmp_path / "x.html")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "fewer than one window" in result.output
