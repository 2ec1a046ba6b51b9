"""Bases whose adapter is the whole of a layer, other people's weights, and affine normalisation."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora import Adapter
from edge_lora.cli import main
from edge_lora.errors import EngineUnavailableError, UnsupportedError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

from edge_lora.methods import attach, find_weights, slot_table  # noqa: E402
from edge_lora.timeseries.affine import with_affine  # noqa: E402
from edge_lora.timeseries.bases import make_base  # noqa: E402
from edge_lora.timeseries.compare import (  # noqa: E402
    bytes_of,
    file_bytes,
    lowered,
    measure_adapter,
    trained,
)
from edge_lora.timeseries.metrics import measure  # noqa: E402
from edge_lora.timeseries.series import read_series  # noqa: E402
from edge_lora.timeseries.training import Recipe, fit, predictor  # noqa: E402
from edge_lora.timeseries.windows import cut  # noqa: E402

COMPACT = "gpt2-compact:1x16"


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def parts():
    """A month of real temperatures."""
    found = find_spec("vega_datasets")
    if found is None:
        pytest.skip("vega-datasets is not installed")
    path = Path(found.origin).parent / "_data" / "seattle-temps.csv"
    series = read_series(path, fill=1)
    return cut(replace(series, values=series.values[:700]), 48, 6)


@pytest.fixture
def x():
    return torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(0)) * 5 + 10


def test_an_untrained_compact_base_gives_the_mean(x):
    y = make_base(COMPACT, 50, 6)(x)
    torch.testing.assert_close(y, x.mean(1, keepdim=True).expand(-1, 6, -1))


def test_a_compact_base_is_its_definition(x):
    base = make_base(COMPACT, 50, 6)
    generator = torch.Generator().manual_seed(1)
    base.in_layer.weight.data.normal_(generator=generator)
    base.out_layer.weight.data.normal_(generator=generator)
    got = base(x)
    for n in range(3):
        for c in range(2):
            series = x[n, :, c]
            mean, spread = series.mean(), torch.sqrt(series.var(unbiased=False) + 1e-5)
            series = (series - mean) / spread
            series = torch.cat([series[:1].repeat(22), series])
            tokens = torch.stack([base.in_layer.weight @ part for part in series.split(24)])
            hidden = base.encoder(inputs_embeds=tokens[None]).last_hidden_state
            want = base.out_layer(hidden.reshape(-1)) * spread + mean
            torch.testing.assert_close(got[n, :, c], want, rtol=1e-4, atol=1e-4)


def test_the_compact_base_has_no_random_ends_and_only_the_positions_in_use():
    """At One-for-All's width and rank, whatever the number of frozen blocks."""
    base = make_base("gpt2-compact:1x768", 336, 96)
    assert base.encoder.wpe.weight.shape == (14, 768)
    assert not base.in_layer.weight.any()
    assert not base.out_layer.weight.any()
    full = make_base("gpt2-random:1x768", 336, 96)
    torch.testing.assert_close(base.encoder.wpe.weight, full.gpt2.wpe.weight[:14])
    attached = attach(base, "rslora", base.slots, rank=16, alpha=16.0)
    assert attached.parameter_count == 16 * (24 + 768 + 14 + 768 + 14 * 768 + 96) == 198_752
    adapter = lowered(attached, base, "gpt2-compact:1x768", Recipe(), "x", "F32")
    attached.detach()
    assert 4 * 198_752 < file_bytes(adapter) < 4 * 198_752 + 3000
    saved = bytes_of(full) - bytes_of(base)
    ends = 4 * (17 * 768 + 32_257 * 96 - 24 * 768 - 14 * 768 * 96)
    assert saved == ends + 4 * 768 * (1024 - 14)


def test_a_compact_forecaster_is_rebuilt_from_its_file_alone(parts, tmp_path):
    base = make_base(COMPACT, 48, 6)
    adapter, result = trained(base, COMPACT, parts, Recipe(epochs=4, batch_size=32), "t")
    path = adapter.save(tmp_path / "t.safetensors")
    about = Adapter.load(path).provenance["training"]
    again = make_base(about["base"], about["window"], about["horizon"])
    assert slot_table(again).fingerprint == adapter.base.fingerprint
    errors = measure_adapter(again, Adapter.load(path), parts.test)
    assert errors.mse == pytest.approx(result.errors.mse, rel=1e-6)
    mean = measure(predictor(again), parts.test)
    assert errors.mse < 0.8 * mean.mse
    assert result.adapter_bytes == path.stat().st_size
    assert result.base_bytes == bytes_of(base)


def test_a_checkpoint_can_be_the_encoder(tiny_gpt2, tmp_path, x):
    tiny_gpt2.save_pretrained(tmp_path / "gpt2")
    base = make_base(f"gpt2-compact:{tmp_path / 'gpt2'}", 50, 6)
    assert base.id == "gpt2-compact:gpt2-50-6"
    assert base(x).shape == (3, 6, 2)


def test_smollm2_gives_its_first_layers(tiny_llama, monkeypatch, x):
    from edge_lora.bases import LoadedModel
    from edge_lora.timeseries import smollm2

    layers = list(tiny_llama.model.layers)
    kept, table = tiny_llama.model.layers, tiny_llama.model.embed_tokens
    monkeypatch.setattr(smollm2, "load_model", lambda name: LoadedModel(name, tiny_llama, None))
    try:
        base = make_base("smollm2:1", 50, 6)
        assert list(base.encoder.layers) == layers[:1]
        assert base.slots == ("in_layer", "out_layer")
        assert "encoder.embed_tokens.weight" not in find_weights(base)
        torch.testing.assert_close(base(x), x.mean(1, keepdim=True).expand(-1, 6, -1))
        for count in (0, 31, 10**9):
            monkeypatch.setattr(smollm2, "load_model", None)  # refused before it is loaded
            with pytest.raises(UnsupportedError, match="the model has 30 layers"):
                make_base(f"smollm2:{count}", 50, 6)
        monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
        with pytest.raises(EngineUnavailableError, match=r"gguf.*edge-lora\[demo\]"):
            make_base("smollm2:1", 50, 6)
    finally:
        tiny_llama.model.layers, tiny_llama.model.embed_tokens = kept, table


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("edge_lora.bases.find_spec", lambda _: None)
    with pytest.raises(EngineUnavailableError, match=r"edge-lora\[demo\]"):
        make_base("smollm2:2", 48, 6)
    monkeypatch.setitem(sys.modules, "fracast", None)
    monkeypatch.setitem(sys.modules, "fracast.inference", None)
    with pytest.raises(EngineUnavailableError, match=r"edge-lora\[forecast\]"):
        make_base("fracast", 48, 6)


@needs("fracast")
def test_fracast_gives_its_own_median_beyond_one_block():
    from fracast import FracastModel

    rng = np.random.default_rng(0)
    wave = 20 + 5 * np.sin(np.arange(200) * 2 * np.pi / 24) + rng.normal(0, 0.3, (2, 200))
    wave = wave.astype(np.float32)
    want = FracastModel.from_pretrained(weights="fp32").forecast_batch(wave, horizon=60)[:, :, 4]
    with torch.no_grad():
        got = make_base("fracast", 200, 60)(torch.from_numpy(wave).T[None])
    np.testing.assert_allclose(got[0].T, want, rtol=1e-4, atol=1e-4)


@needs("fracast")
def test_fracast_can_be_adapted_and_comes_back(parts):
    base = make_base("fracast", 48, 6)
    assert bytes_of(base) == 4 * 85_001
    few = replace(
        parts,
        train=replace(parts.train, values=parts.train.values[:61]),
        validation=replace(parts.train, values=parts.train.values[:61]),
    )
    untrained = measure(predictor(base), few.validation).mse
    before = {name: weight.tensor.clone() for name, weight in find_weights(base).items()}
    attached, report = fit(base, few, Recipe(epochs=2, batch_size=8))
    assert len(attached.lower("x").deltas) == 14
    assert "core.scale.to_gb.weight" not in attached.lower("x").deltas
    assert report.best_validation_loss < untrained
    attached.detach()
    assert all(torch.equal(before[name], w.tensor) for name, w in find_weights(base).items())


@needs("fracast")
def test_fracast_refuses_what_it_cannot():
    with pytest.raises(UnsupportedError, match="at least 8 rows, not 7"):
        make_base("fracast", 7, 6)
    with pytest.raises(UnsupportedError, match="no affine option"):
        make_base("fracast", 48, 6, affine=True)


@pytest.mark.parametrize("method", ["rslora", "shira"])
def test_affine_normalisation_is_trained_stored_and_put_back(parts, method):
    base = make_base("linear", 48, 6, affine=True)
    assert base.id == "linear-48-6-affine"
    gain, shift = base.norm.gain.item(), base.norm.shift.item()
    assert gain == pytest.approx(1, abs=1e-5)
    assert shift == pytest.approx(0, abs=1e-5)
    settings = {"rank": 4} if method == "rslora" else {"density": 0.5}
    recipe = Recipe(method, settings, epochs=3, batch_size=64)
    attached, report = fit(base, parts, recipe)
    plain = attach(make_base("linear", 48, 6), method, ["head"], **settings)
    assert attached.parameter_count == plain.parameter_count + 2
    assert base.norm.shift.item() != shift
    found = measure(predictor(base), parts.validation).mse
    assert found == pytest.approx(report.best_validation_loss, rel=1e-3)
    adapter = attached.lower("x", "F32")
    attached.detach()
    assert set(adapter.deltas) == {"head.weight", "norm.gain", "norm.shift"}
    assert (base.norm.gain.item(), base.norm.shift.item()) == (gain, shift)
    assert measure_adapter(base, adapter, parts.validation).mse == pytest.approx(found, rel=1e-5)


def test_affine_normalisation_is_its_formula(x):
    base = make_base("linear", 50, 6, affine=True)
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base.head.weight.copy_(weight)
        base.norm.gain.fill_(1.7)
        base.norm.shift.fill_(-0.4)
        got = base(x).numpy()
    series = x.double().numpy().transpose(0, 2, 1)
    mean, spread = series.mean(-1, keepdims=True), np.sqrt(series.var(-1, keepdims=True) + 1e-5)
    z = (series - mean) / spread * 1.7 - 0.4
    want = (z @ weight.double().numpy().T + 0.4) / 1.7 * spread + mean
    np.testing.assert_allclose(got, want.transpose(0, 2, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("gain", "divisor"), [(0.0, 0.01), (-1e-6, -0.01), (-0.5, -0.5)])
def test_a_gain_near_zero_does_not_explode(x, gain, divisor):
    base = make_base("linear", 50, 6, affine=True)
    with torch.no_grad():
        base.norm.gain.fill_(gain)
        base.norm.shift.fill_(0.25)
        got = base(x).transpose(1, 2).double()
    series = x.double().transpose(1, 2)
    spread = torch.sqrt(series.var(-1, unbiased=False, keepdim=True) + 1e-5)
    want = -0.25 / divisor * spread + series.mean(-1, keepdim=True)
    torch.testing.assert_close(got, want.expand_as(got), rtol=1e-4, atol=1e-4)


@pytest.mark.ort
@pytest.mark.parametrize(("name", "options"), [("linear", ["--affine"]), (COMPACT, [])])
def test_each_slot_acts_in_a_live_session(name, options, tmp_path):
    """Gain and shift stand at both ends; an engine must not keep a second copy of them."""
    pytest.importorskip("onnxruntime")
    from edge_lora.runtime import open_bundle

    bundle = tmp_path / "bundle"
    result = CliRunner().invoke(
        main,
        ["export", "--task", "forecast", "--base", name, "--window", "72", "--horizon", "6",
         "-o", str(bundle), *options],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    base = make_base(name, 72, 6, affine=bool(options))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 72, 3, generator=generator) * 4 + 7
    attached = attach(base, "lora", base.slots, rank=2)
    if options:
        attached = with_affine(attached, base)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        want = base(x).numpy()
    path = attached.lower("a", "F32").save(tmp_path / "a.safetensors")
    attached.detach()
    with open_bundle(bundle, threads=1) as session:
        assert session.route != "reload"
        untrained = session.run({"x": x.numpy()})["output_0"]
        session.load_adapter(path, "a")
        with session.using("a"):
            got = session.run({"x": x.numpy()})["output_0"]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
        assert np.abs(got - untrained).max() > 0.1
        np.testing.assert_array_equal(session.run({"x": x.numpy()})["output_0"], untrained)


@pytest.mark.ort
def test_convert_compares_forecasts_in_a_bundle(parts, tmp_path):
    pytest.importorskip("onnxruntime")
    base = make_base("linear", 48, 6)
    adapter, _ = trained(base, "linear", parts, Recipe(epochs=1), "t")
    adapter.save(tmp_path / "t.safetensors")
    run = CliRunner().invoke
    made = run(
        main,
        ["export", "--task", "forecast", "--window", "48", "--horizon", "6",
         "-o", str(tmp_path / "b")],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    command = [
        "convert", str(tmp_path / "t.safetensors"), str(tmp_path / "s.safetensors"),
        "--bits", "4", "--group", "64", "--base", str(tmp_path / "b"),
    ]  # fmt: skip
    told = run(main, command)
    assert told.exit_code == 0, told.output
    assert "greedy" not in told.stdout
    facts = json.loads(run(main, [*command, "--json"]).stdout)
    (row,) = facts["equivalence"]
    assert 0 < row["largest_difference"] < 0.5 * row["effect"]
    refused = run(main, [*command, "--prompt", "x"])
    assert refused.exit_code == 1
    assert "takes no text" in refused.output
