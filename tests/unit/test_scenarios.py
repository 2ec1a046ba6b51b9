"""The classifier of a scenario set: its features by their definition, its network by torch."""

import math
from itertools import pairwise

import numpy as np
import pytest

from edge_lora.errors import BundleError
from edge_lora.scenario_classifier import (
    CLIP,
    MOST_BINS,
    Classifier,
    WindowFeatures,
    read_classifier,
    write_classifier,
)


def classifier(features, conditions=3, hidden=0, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [features.count, *([hidden] if hidden else []), conditions]
    layers = tuple(
        (
            rng.standard_normal((a, b)).astype(np.float32),
            rng.standard_normal(b).astype(np.float32),
        )
        for a, b in pairwise(sizes)
    )
    mean = rng.standard_normal(features.count).astype(np.float32)
    return Classifier(features, mean, np.exp(mean), layers)


def by_definition(x, season):
    """One window's features, row by row."""
    n = len(x)
    season = min(season, n)
    mean = sum(x) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in x) / n + 1e-5)
    z = [(v - mean) / spread for v in x]
    whole = n // season
    seasons = [z[n - (whole - k) * season : n - (whole - k - 1) * season] for k in range(whole)]
    folded = [sum(s[i] for s in seasons) / whole for i in range(season)]
    days = [sum(s) / season for s in seasons]
    slope = sum(v * (2 * i / (n - 1) - 1) for i, v in enumerate(z)) / n
    again = sum(z[i] * z[i - season] for i in range(season, n)) / n
    return [*folded, *z[-season:], *days, mean, math.log(spread), slope, again]


@pytest.mark.parametrize(("window", "season"), [(16, 4), (17, 5), (8, 8), (6, 24)])
def test_features_are_what_they_say(window, season):
    features = WindowFeatures(window, season)
    x = np.random.default_rng(0).standard_normal((5, window)) * 3 + 20
    found = features.of(x)
    assert found.shape == (5, features.count)
    expected = [by_definition(list(row), season) for row in x]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_long_seasons_are_averaged_down():
    features = WindowFeatures(960, 96)
    x = np.random.default_rng(0).standard_normal((2, 960))
    found = features.of(x)
    assert found.shape == (2, features.count) == (2, 2 * MOST_BINS + 10 + 4)
    z = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    last = z[:, -96:].reshape(2, MOST_BINS, 2).mean(2)
    np.testing.assert_allclose(found[:, MOST_BINS : 2 * MOST_BINS], last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 7.0, 3e38, -3e38])
def test_a_constant_window_has_finite_features(value):
    found = WindowFeatures(16, 4).of(np.full((1, 16), value))
    assert np.isfinite(found).all()


@pytest.mark.torch
@pytest.mark.parametrize("hidden", [0, 7])
def test_the_network_is_torchs(hidden):
    torch = pytest.importorskip("torch")
    features = WindowFeatures(16, 4)
    one = classifier(features, hidden=hidden)
    x = np.random.default_rng(1).standard_normal((6, 16))
    y = torch.from_numpy(features.of(x))
    y = ((y - torch.from_numpy(one.mean)) / torch.from_numpy(one.scale)).clamp(-CLIP, CLIP)
    for i, (weight, bias) in enumerate(one.layers):
        y = (y.relu() if i else y) @ torch.from_numpy(weight) + torch.from_numpy(bias)
    expected = torch.log_softmax(y, 1).numpy()
    np.testing.assert_allclose(one.log_probabilities(x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one.probabilities(x), np.exp(expected), rtol=1e-4, atol=1e-4)


def test_columns_are_judged_together():
    one = classifier(WindowFeatures(16, 4))
    x = np.random.default_rng(1).standard_normal((4, 16, 3))
    each = np.stack([one.log_probabilities(x[:, :, c]) for c in range(3)]).mean(0)
    expected = np.exp(each) / np.exp(each).sum(1, keepdims=True)
    np.testing.assert_allclose(one.probabilities(x), expected, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_window_that_is_not_finite_is_not_judged(bad):
    one = classifier(WindowFeatures(16, 4))
    x = np.random.default_rng(1).standard_normal((2, 16, 3))
    x[1, 5, 2] = bad
    found = one.probabilities(x)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize("shape", [(0, 16), (0, 16, 3), (2, 16, 0), (0, 16, 0)])
def test_nothing_to_judge(shape):
    found = classifier(WindowFeatures(16, 4)).probabilities(np.zeros(shape))
    assert found.shape == (shape[0], 3)
    assert np.isnan(found).all()


@pytest.mark.parametrize("hidden", [0, 7])
def test_a_classifier_survives_its_file(tmp_path, hidden):
    features = WindowFeatures(16, 4)
    one = classifier(features, hidden=hidden)
    again = read_classifier(write_classifier(one, tmp_path / "c.safetensors"), features, 3)
    x = np.random.default_rng(1).standard_normal((6, 16))
    np.testing.assert_array_equal(one.probabilities(x), again.probabilities(x))


def damage(arrays, name, change):
    changed = dict(arrays)
    changed[name] = change(changed.get(name))
    if changed[name] is None:
        del changed[name]
    return changed


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mean", lambda _: None, "tensor 'mean' is missing"),
        ("extra", lambda _: np.zeros(3, np.float32), "tensor 'extra' is unknown"),
        ("scale", lambda a: 0 * a, "scale has values that are not above 0"),
        ("weight0", lambda a: a * np.nan, "weight0 has values that are not finite"),
        ("weight0", lambda a: a.astype(np.float64), "weight0 is float64"),
        ("weight0", lambda a: a[1:], r"weight0 is float32 \(16, 7\), must be float32 \(17, 7\)"),
        ("bias0", lambda a: a.reshape(-1, 1), r"bias0 is float32 \(7, 1\)"),
        ("bias1", lambda _: None, "tensor 'weight1' is unknown"),
        ("bias1", lambda a: a[:2], r"bias1 is float32 \(2,\), must be float32 \(3,\)"),
    ],
)
def test_arrays_that_are_no_classifier(tmp_path, name, change, message):
    from safetensors.numpy import load_file, save_file

    features = WindowFeatures(16, 5)
    path = write_classifier(classifier(features, hidden=7), tmp_path / "c.safetensors")
    save_file(damage(load_file(path), name, change), path)
    with pytest.raises(BundleError, match=message):
        read_classifier(path, features, 3)


def test_what_is_no_safetensors_file(tmp_path):
    path = tmp_path / "c.safetensors"
    for data in (b"", b"not one", b"\xff" * 100):
        path.write_bytes(data)
        with pytest.raises(BundleError, match="is not a safetensors file"):
            read_classifier(path, WindowFeatures(16, 4), 3)
