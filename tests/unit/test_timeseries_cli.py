"""Forecasting on the command line: train on a CSV, export the base, switch in a live session."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora import Adapter
from edge_lora.cli import main
from edge_lora.errors import UnsupportedError

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.torch

from edge_lora.timeseries.baselines import linear  # noqa: E402
from edge_lora.timeseries.bases import make_base, portable_name  # noqa: E402
from edge_lora.timeseries.compare import Result, measure_adapter, trained, verdict  # noqa: E402
from edge_lora.timeseries.metrics import Errors, measure  # noqa: E402
from edge_lora.timeseries.series import read_series  # noqa: E402
from edge_lora.timeseries.training import Recipe, fit, predictor, settings_for  # noqa: E402
from edge_lora.timeseries.windows import cut  # noqa: E402

TINY = "gpt2-random:1x16"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def write_csv(path, period):
    """Write two noisy waves of that many hours, 500 rows."""
    rng = np.random.default_rng(0)
    time = np.datetime64("2024-01-01T00") + np.arange(500)
    wave = np.sin(np.arange(500) * 2 * np.pi / period)
    values = np.stack([20 + 5 * wave, -3 + wave], 1) + rng.normal(0, 0.1, (500, 2))
    lines = [f"{t},{a},{b}" for t, (a, b) in zip(time, values, strict=True)]
    path.write_text("\n".join(["date,a,b", *lines]))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "waves.csv", 24)


def train(data, out, *more):
    return run(
        "train", "--task", "forecast", "--data", data, "--window", 24, "--horizon", 6,
        "--epochs", 4, "--batch-size", 32, "-o", out, *more,
    )  # fmt: skip


def test_train_beats_the_last_value_and_says_what_it_does_not_beat(data, tmp_path):
    out = tmp_path / "waves.safetensors"
    result = train(data, out, "--set", "rank=4", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    errors = {row["forecast"]: row["mse"] for row in facts["test"]}
    ours = errors["adapter (rslora on linear)"]
    assert ours < 0.2 * errors["last value"]
    assert facts["values"] == 4 * (24 + 6)
    assert len(facts["by_step"]) == 6
    assert np.mean([row["mse"] for row in facts["by_step"]]) == pytest.approx(ours)
    better = [name for name, error in errors.items() if error < ours]
    assert all(f"{name} (" in facts["verdict"] for name in better)
    assert better or "the best of the table" in facts["verdict"]
    adapter = Adapter.load(out)
    assert adapter.base.id == "linear-24-6"
    assert adapter.provenance["training"]["columns"] == ["a", "b"]
    parts = cut(read_series(data), 24, 6)
    again = measure_adapter(make_base("linear", 24, 6), adapter, parts.test)
    assert again.mse == pytest.approx(ours, rel=1e-6)


def test_tables_for_people(data, tmp_path):
    result = train(data, tmp_path / "x.safetensors", "--method", "bilora", "--set", "rank=2")
    assert result.exit_code == 0, result.output
    assert "seasonal (24)\t0\t" in result.stdout
    assert "steps ahead\ttest MSE\ttest MAE" in result.stdout


def test_another_base_is_compared_with_no_base(data, tmp_path):
    result = train(data, tmp_path / "x.safetensors", "--base", TINY, "--epochs", 1, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    names = [row["forecast"] for row in facts["test"]]
    assert "no base: low-rank linear" in names
    assert "base does not help" in facts["verdict"] or "Test MSE" in facts["verdict"]


def test_no_path_of_this_machine_is_stored(tmp_path):
    (tmp_path / "gpt2").mkdir()
    assert portable_name(str(tmp_path / "gpt2") + "/") == "gpt2"
    assert portable_name(f"gpt2-compact:{tmp_path / 'gpt2'}") == "gpt2-compact:gpt2"
    for name in ("linear", "fracast", "gpt2-random:1x16", "gpt2-compact", "smollm2:2"):
        assert portable_name(name) == name


def result_of(name, mse):
    return Result(name, 10, Errors(np.array([mse]), np.array([mse]), 1))


def test_the_verdict_is_plain():
    ours, line, full = (
        result_of("adapter", 0.5),
        result_of("no base: low-rank linear", 0.4),
        result_of("full linear", 0.3),
    )
    assert verdict([ours, full, line]).startswith("The base does not help")
    assert "Not beaten: full linear (0.3000" in verdict([ours, full])
    assert verdict([ours, result_of("last value", 0.6)]).endswith("the best of the table.")


def test_training_is_repeatable_and_leaves_the_base_alone(data):
    parts = cut(read_series(data), 24, 6)
    found = []
    for _ in range(2):
        base = make_base("linear", 24, 6)
        attached, curves = fit(base, parts, Recipe(epochs=2, batch_size=64))
        assert curves.best_step is not None
        trained = measure(predictor(base), parts.validation).mse
        assert trained == pytest.approx(curves.best_validation_loss, rel=1e-3)
        found.append(attached.lower("x").content_hash)
        attached.detach()
        assert not base.head.weight.any()
    assert found[0] == found[1]


def test_results_on_other_windows_are_not_in_the_verdict():
    ours = Result("adapter", 10, Errors(np.array([0.5]), np.array([0.5]), 700))
    part = Result("fracast", 0, Errors(np.array([0.1]), np.array([0.1]), 256))
    assert verdict([ours, part]).endswith("the best of the table.")


def test_the_windows_of_a_row_are_shown_where_they_differ(capsys):
    from edge_lora.cli.forecast import _print

    def shown(windows):
        rows = [Result("a", 1, Errors(np.ones(10), np.ones(10), n)) for n in windows]
        _print({"file_bytes": 1, "base_bytes": 1, "verdict": ""}, rows, as_json=False)
        return capsys.readouterr().out

    assert "test MAE\twindows" in shown((9, 5))
    assert "test MAE\twindows" not in shown((9, 9))
    steps = [line.split("\t")[0] for line in shown((9, 9)).splitlines()][-6:-1]
    assert steps == ["2", "4", "6", "8", "10"]


def test_dora_is_refused_where_it_cannot_act(data, tmp_path):
    result = train(data, tmp_path / "x.safetensors", "--method", "dora")
    assert result.exit_code == 1
    assert "head.weight: 6 of length 0" in result.output
    assert "Use rslora" in result.output
    parts = cut(read_series(data), 24, 6)
    attached, _ = fit(make_base(TINY, 24, 6), parts, Recipe("dora", epochs=1, batch_size=256))
    assert attached.method == "dora"


def test_training_that_changes_nothing_is_refused(data):
    parts = cut(read_series(data), 24, 6)
    still = {
        name: replace(getattr(parts, name), values=np.zeros_like(getattr(parts, name).values))
        for name in ("train", "validation", "test")
    }
    base = make_base("linear", 24, 6)
    with pytest.raises(UnsupportedError, match="training changed nothing"):
        trained(base, "linear", replace(parts, **still), Recipe(epochs=1), "x")
    assert not base.head.weight.any()


def test_a_column_that_never_changes_is_forecast_as_it_is(data):
    parts = cut(read_series(data), 24, 6)
    still = replace(parts.train, values=np.full_like(parts.train.values, 2.0))
    predict, _ = linear(replace(parts, train=still, validation=still))
    np.testing.assert_allclose(predict(np.full((3, 24), 2.0, np.float32)), 2.0)


def test_a_base_is_offered_only_options_that_the_method_has():
    base = make_base("linear", 24, 6)
    base.settings = {"rank": 4, "alpha": 4.0}
    assert settings_for(base, "bilora") == {"rank": 4, "scale": 4.0, "bits": 4, "group": 64}
    assert settings_for(base, "rslora") == {"rank": 4, "alpha": 4.0}
    assert settings_for(base, "shira") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--horizon", 0), "both must be at least 1"),
        (("--window", 400), "fewer than one window"),
        (("--base", "gpt9"), "unknown base 'gpt9'"),
        (("--method", "lara"), "unknown method 'lara'"),
        (("--method", "biadaptformer"), "stands beside modules"),
        (("--data", "no-such.csv"), "not a readable CSV file"),
        (("--split", "ett"), "needs 20 months"),
    ],
)
def test_bad_requests_are_one_message(data, tmp_path, options, message):
    out = tmp_path / "x.safetensors"
    result = train(data, out, *options)
    assert result.exit_code == 1
    assert message in result.output
    assert not out.exists()


def test_text_is_still_the_default_task(tmp_path):
    assert "--horizon" in run("train", "--task=forecast", "--help").output
    assert "--horizon" not in run("train", "--help").output
    assert "--skill" in run("train", "--task", "text", "--help").output
    assert run("export", "--task", "weather", "-o", tmp_path / "x").exit_code == 2


@pytest.mark.ort
@pytest.mark.parametrize("name", ["linear", TINY])
def test_adapters_switch_in_a_live_session(name, data, tmp_path):
    """Also the position table: looked up with constants, an engine would have it folded away."""
    pytest.importorskip("onnxruntime")
    from edge_lora.methods import attach
    from edge_lora.runtime import open_bundle

    bundle = tmp_path / "bundle"
    result = run(
        "export", "--task", "forecast", "--base", name, "--window", 24, "--horizon", 6,
        "-o", bundle, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    base = make_base(name, 24, 6)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 24, 3, generator=generator) * 4 + 7
    outputs, paths = {"": base(x)}, {}
    for slot in base.slots:  # one adapter for each slot: each of them must act
        attached = attach(base, "lora", [slot], rank=2)
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.normal_(generator=generator)
        outputs[slot] = base(x)
        paths[slot] = attached.lower(slot, "F32").save(tmp_path / f"{slot}.safetensors")
        attached.detach()
    with open_bundle(bundle, threads=1) as session:
        for slot, path in paths.items():
            session.load_adapter(path, slot)
            session.set_adapter(slot)
            got = session.run({"x": x.numpy()})["output_0"]
            np.testing.assert_allclose(got, outputs[slot].detach(), rtol=1e-3, atol=1e-3)
            assert np.abs(got - outputs[""].detach().numpy()).max() > 0.1
            session.disable_adapters()
        got = session.run({"x": x.numpy()})["output_0"]
        np.testing.assert_allclose(got, outputs[""].detach(), rtol=1e-4, atol=1e-4)
