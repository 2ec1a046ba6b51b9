"""Scenario sets from a CSV file to a session that picks by itself."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora.cli import main

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.torch

from edge_lora.timeseries.bases import make_base  # noqa: E402
from edge_lora.timeseries.conditions import (  # noqa: E402
    conditions_of,
    only,
    require_windows,
)
from edge_lora.timeseries.metrics import Errors  # noqa: E402
from edge_lora.timeseries.scenario_training import (  # noqa: E402
    ConditionRow,
    ScenarioReport,
    verdict,
)
from edge_lora.timeseries.series import Series, SeriesError, read_series  # noqa: E402
from edge_lora.timeseries.windows import cut  # noqa: E402

HOUR, DAY = 3600.0, 86400.0


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def write_two_modes(path, rows=1800, block=150):
    """Write two columns that turn fast or slowly, in blocks; one small linear map cannot do both.

    The column "mode" says which it is.
    """
    rng = np.random.default_rng(0)
    time = np.datetime64("2024-01-01T00") + np.arange(rows)
    slow = (np.arange(rows) // block) % 2 == 1
    phase = np.cumsum(2 * np.pi / np.where(slow, 16, 10))
    values = np.stack([20 + 5 * np.sin(phase), -3 + np.cos(phase)], 1)
    values += rng.normal(0, 0.2, values.shape) * [5, 1]
    lines = [
        f"{t},{'slow' if s else 'fast'},{a:.4f},{b:.4f}"
        for t, s, (a, b) in zip(time, slow, values, strict=True)
    ]
    path.write_text("\n".join(["date,mode,a,b", *lines]))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_two_modes(tmp_path_factory.mktemp("data") / "modes.csv")


def train(data, out, *options):
    return run(
        "train", "--task", "forecast", "--data", data, "--horizon", 12, "--window", 32,
        "--season", 8, "--set", "rank=2", "--epochs", 6, "--batch-size", 128, "-o", out, *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    result = train(data, folder, "--condition", "mode", "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_a_set_beats_one_adapter_where_conditions_differ(trained):
    folder, facts = trained
    mse = {row["forecast"]: row["mse"] for row in facts["test"]}
    one, oracle, chosen = (
        mse["one adapter for all conditions"],
        mse["set, true condition"],
        mse["set, classifier's choice"],
    )
    assert chosen < 0.75 * one
    assert oracle <= chosen < 1.4 * oracle
    assert mse["no adapter"] > one
    assert facts["classifier_accuracy"] > 0.95
    assert facts["verdict"].startswith("The set helps")
    assert facts["set_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert facts["base_bytes"] == 4 * 32 * 12
    assert {row["name"]: row["is_own"] for row in facts["by_condition"]} == {
        "fast": True,
        "slow": True,
    }


@pytest.mark.ort
def test_a_session_forecasts_with_the_adapters_that_were_measured(trained, data, tmp_path):
    """The table's classifier row, again: raw windows through a live session on "auto"."""
    pytest.importorskip("onnxruntime")
    from edge_lora.runtime import open_bundle

    folder, facts = trained
    bundle = tmp_path / "bundle"
    exported = run(
        "export", "--task", "forecast", "--window", 32, "--horizon", 12, "-o", bundle, "--json"
    )
    assert exported.exit_code == 0, exported.output
    series = read_series(data, label="mode")
    parts = cut(series, 32, 12)
    channels = len(series.columns)
    x, y = parts.test.take(np.arange(len(parts.test)))
    x, y = (
        a.reshape(parts.test.starts, channels, -1).transpose(0, 2, 1) * parts.scale + parts.mean
        for a in (x, y)
    )
    with open_bundle(bundle, threads=1) as session:
        assert session.load_scenarios(folder) == ["fast", "slow"]
        session.set_adapter("auto")
        found = session.run({"x": x.astype(np.float32)})["output_0"]
        picked = session.choose({"x": x.astype(np.float32)}).conditions
    mse = float(np.square((found - y) / parts.scale).mean())
    (expected,) = (r["mse"] for r in facts["test"] if r["forecast"] == "set, classifier's choice")
    assert mse == pytest.approx(expected, rel=1e-3)
    conditions = conditions_of(series, "mode")
    names = [conditions.names[i] for i in conditions.of(parts.test)[::channels]]
    right = np.mean([a == b for a, b in zip(picked, names, strict=True)])
    assert right == pytest.approx(facts["classifier_accuracy"], abs=1e-9)


def test_tables_for_people_and_a_condition_that_says_nothing(tmp_path):
    """Labels without meaning: the set cannot help, and the tool says so."""
    rng = np.random.default_rng(0)
    time = np.datetime64("2024-01-01T00") + np.arange(800)
    wave = np.sin(np.arange(800) * 2 * np.pi / 8) + rng.normal(0, 0.3, 800)
    path = tmp_path / "x.csv"
    lines = [
        f"{t},{'ab'[b]},{v}" for t, b, v in zip(time, rng.integers(0, 2, 800), wave, strict=True)
    ]
    path.write_text("\n".join(["date,coin,v", *lines]))
    result = train(path, tmp_path / "set", "--condition", "coin")
    assert result.exit_code == 0, result.output
    for text in (
        "forecast\ttest MSE\ttest MAE",
        "one adapter for all conditions\t",
        "condition\twindows\town adapter\tpicked\tMSE, one\tMSE, own\tMAE, own",
        "classifier accuracy: ",
        "set bytes: ",
        "base bytes: 1.536 kB",
    ):
        assert text in result.stdout


def test_the_verdict_is_plain():
    def report(one, oracle, chosen, own=True):
        one, oracle, chosen = (
            Errors(np.array([e]), np.array([e]), 1) for e in (one, oracle, chosen)
        )
        rows = (ConditionRow("a", 1, own), ConditionRow("b", 1, False))
        return ScenarioReport(one, one, oracle, chosen, 0.9, 0.9, 0.5, 5, 100, 300, 50, rows)

    assert verdict(report(0.4, 0.2, 0.3)).startswith("The set helps: test MSE 0.3000")
    assert "25.0% lower" in verdict(report(0.4, 0.2, 0.3))
    assert "would reach 0.2000, but the classifier" in verdict(report(0.4, 0.2, 0.4))
    assert "validation likes no condition's own" in verdict(report(0.4, 0.4, 0.4, own=False))
    assert "no better even where they belong" in verdict(report(0.4, 0.5, 0.6))
    assert "0.4000 in 100 bytes, the set 0.6000 in 300 bytes" in verdict(report(0.4, 0.5, 0.6))


def made_up(rows, start, step=HOUR):
    return Series(np.zeros((rows, 2), np.float32), ("a", "b"), step, 0, start)


def test_conditions_by_the_clock():
    friday = 1_704_412_800.0  # 2024-01-05T00:00
    hours = conditions_of(made_up(50, friday), "hour")
    assert hours.names[:2] == ("00h", "01h")
    assert [hours.names[i] for i in hours.rows[[0, 23, 24, 49]]] == ["00h", "23h", "00h", "01h"]
    days = conditions_of(made_up(5, friday, DAY), "weekday")
    assert [days.names[i] for i in days.rows] == [
        "friday",
        "saturday",
        "sunday",
        "monday",
        "tuesday",
    ]
    ends = conditions_of(made_up(5, friday, DAY), "weekend")
    assert [ends.names[i] for i in ends.rows] == [
        "workday",
        "weekend",
        "weekend",
        "workday",
        "workday",
    ]
    months = conditions_of(made_up(60, friday, DAY), "month")
    assert months.names == ("january", "february", "march")


def test_a_window_has_the_condition_of_its_last_input_row():
    series = Series(
        np.arange(200, dtype=np.float32).reshape(100, 2), ("a", "b"), HOUR,
        labels=tuple("x" if i < 80 else "y" for i in range(100)),
    )  # fmt: skip
    parts = cut(series, 8, 3)
    conditions = conditions_of(series, "mode")
    for part in (parts.train, parts.validation, parts.test):
        numbers = np.arange(len(part))
        x, _ = part.take(numbers)
        channel = numbers % 2
        last = np.rint(((x[:, -1] * parts.scale[channel] + parts.mean[channel]) - channel) / 2)
        np.testing.assert_array_equal(conditions.of(part), (last >= 80).astype(int))
    some = only(parts.test, np.array([3, 5]))
    np.testing.assert_array_equal(some.take(np.array([1]))[0], parts.test.take(np.array([5]))[0])
    assert len(some) == 2
    assert sum(len(x) for x, _ in some.batches(1)) == 2


def test_a_label_column_is_no_channel(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "date,mode,v\n2024-01-01T00,a,1\n2024-01-01T01,a,2\n2024-01-01T03,b ,4\n2024-01-01T04,b,5\n"
    )
    series = read_series(path, fill=1, label="mode")
    assert series.columns == ("v",)
    assert series.labels == ("a", "a", "a", "b", "b")
    assert series.start == 1_704_067_200.0
    assert read_series(tmp_path / "x.csv", fill=1, label="mode").values[:, 0].tolist() == [
        1,
        2,
        3,
        4,
        5,
    ]
    path.write_text(path.read_text().replace("b ,", ","))
    with pytest.raises(SeriesError, match="line 4: no label"):
        read_series(path, fill=1, label="mode")


def test_conditions_with_too_few_windows_are_named():
    series = made_up(400, 0.0)
    parts = cut(series, 8, 3)
    with pytest.raises(SeriesError, match="00h: 22 to train on, 4 to validate") as error:
        require_windows(conditions_of(series, "hour"), parts)
    assert "at least 64 and 16" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (
            ("--condition", "moon", "--columns", "a"),
            "neither a column nor one of hour, weekday, weekend, month",
            1,
        ),
        (("--condition", "a", "--columns", "b"), "values; a set has 2 to 64", 1),
        (("--condition", "month", "--columns", "a,b"), "too few windows", 1),
        (("--condition", "mode", "--plot", "x.png"), "--condition trains several", 2),
    ],
)
def test_bad_requests_are_one_message(data, tmp_path, options, message, code):
    result = train(data, tmp_path / "set", *options)
    assert result.exit_code == code
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_into(data, trained):
    folder, _ = trained
    before = sorted(folder.iterdir())
    result = train(data, folder, "--condition", "mode")
    assert result.exit_code == 1
    assert "is there already" in result.output
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("to", ["nowhere", "."])
def test_a_link_is_refused_before_the_training(data, tmp_path, to):
    out = tmp_path / "link"
    out.symlink_to(to)
    result = train(data, out, "--condition", "mode")
    assert result.exit_code == 1
    assert "is there already" in result.output
    assert "training on" not in result.output
    assert list(tmp_path.iterdir()) == [out]


def test_a_set_can_be_inspected_and_verified(trained, tmp_path):
    folder, _ = trained
    facts = json.loads(run("inspect", folder, "--slots", "--json").stdout)
    assert facts["kind"] == "scenario set"
    assert facts["conditions"] == ["fast", "slow"]
    assert (facts["window"], facts["season"]) == (32, 8)
    assert [row["condition"] for row in facts["slots"]] == ["fast", "slow"]
    assert run("verify", folder).exit_code == 0
    copy = shutil.copytree(folder, tmp_path / "set")
    (copy / "adapter-01.safetensors").unlink()
    result = run("verify", copy)
    assert result.exit_code == 1
    assert "adapter-01.safetensors is missing" in result.output


def test_a_set_of_adapters_of_another_base_is_not_sound(trained, tmp_path):
    folder, _ = trained
    copy = shutil.copytree(folder, tmp_path / "set")
    path = copy / "scenarios.json"
    document = json.loads(path.read_text())
    document["base"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(document))
    result = run("verify", copy)
    assert result.exit_code == 1
    assert "condition 'slow' is of base" in result.output


def test_training_leaves_the_base_alone(data, tmp_path):
    from edge_lora.timeseries.scenario_training import train_scenarios
    from edge_lora.timeseries.training import Recipe

    series = read_series(data, label="mode")
    base = make_base("linear", 32, 12)
    recipe = Recipe(settings={"rank": 2, "alpha": 4.0}, epochs=1, batch_size=512)
    parts = cut(series, 32, 12)
    report = train_scenarios(
        base, "linear", parts, conditions_of(series, "mode"), 8, recipe, tmp_path
    )
    assert not base.head.weight.any()
    assert report.one.windows == report.chosen.windows == len(parts.test)
