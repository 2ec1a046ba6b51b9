"""Splits, windows, errors and the baselines, against plain NumPy."""

import numpy as np
import pytest

from edge_lora.timeseries import baselines
from edge_lora.timeseries.metrics import measure
from edge_lora.timeseries.series import Series, SeriesError
from edge_lora.timeseries.windows import ETT_COLUMNS, Windows, cut


def made_up(rows, columns=("a", "b"), step=3600.0, seed=0):
    values = np.random.default_rng(seed).standard_normal((rows, len(columns))).cumsum(0)
    return Series(values.astype(np.float32), columns, step)


def test_the_standard_split_has_the_published_numbers_of_windows():
    parts = cut(made_up(17_420, ETT_COLUMNS), 336, 96)
    assert parts.split == "ett"
    assert [len(p) for p in (parts.train, parts.validation, parts.test)] == [57_463, 19_495, 19_495]
    quarter_hours = cut(made_up(69_680, ETT_COLUMNS, step=900.0), 512, 96)
    assert quarter_hours.train.starts == 34_560 - 512 - 96 + 1


def test_parts_share_no_truth_and_reach_back_by_one_window():
    series = made_up(100)
    parts = cut(series, 8, 3)
    assert parts.split == "70/10/20"
    values = [
        p.values * parts.scale + parts.mean for p in (parts.train, parts.validation, parts.test)
    ]
    for found, (start, end) in zip(values, [(0, 70), (62, 80), (72, 100)], strict=True):
        np.testing.assert_allclose(found, series.values[start:end], atol=1e-4)


def test_the_scaler_sees_training_rows_only():
    series = made_up(100)
    parts = cut(series, 8, 3)
    np.testing.assert_allclose(parts.mean, series.values[:70].mean(0), rtol=1e-5)
    np.testing.assert_allclose(parts.scale, series.values[:70].std(0), rtol=1e-5)


def test_a_constant_channel_is_not_divided_by_zero():
    values = np.ones((60, 1), np.float32)
    parts = cut(Series(values, ("a",), 1.0), 4, 2)
    assert parts.scale == 1
    assert not parts.test.values.any()


@pytest.mark.parametrize(
    ("rows", "window", "horizon", "split", "message"),
    [
        (100, 8, 0, "auto", "horizon 0; both must be at least 1"),
        (100, 0, 3, "auto", "window is 0"),
        (100, 60, 20, "auto", r"training part has 70 rows of 100, fewer than one window: 60 \+ 20"),
        (100, 8, 15, "auto", "validation part has 18 rows"),
        (100, 8, 3, "ett", "needs 20 months, 14400 rows; there are 100"),
    ],
)
def test_what_cannot_be_cut(rows, window, horizon, split, message):
    with pytest.raises(SeriesError, match=message):
        cut(made_up(rows), window, horizon, split)


def test_every_window_of_every_channel_comes_once():
    values = np.arange(20, dtype=np.float32).reshape(10, 2)
    windows = Windows(values, 3, 2)
    batches = list(windows.batches(4))
    x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
    assert len(x) == len(windows) == 12
    assert [len(b[0]) for b in batches] == [4, 4, 4]
    want = [values[i : i + 5, c] for i in range(6) for c in range(2)]
    np.testing.assert_array_equal(np.concatenate([x, y], 1), want)


def test_errors_count_every_window_and_step():
    windows = cut(made_up(90), 6, 4).test
    errors = measure(lambda x: np.zeros((len(x), 4), np.float32), windows)
    truth = np.stack(
        [windows.values[i + 6 : i + 10, c] for i in range(windows.starts) for c in range(2)]
    )
    np.testing.assert_allclose(errors.mse_by_step, np.square(truth).mean(0), rtol=1e-5)
    np.testing.assert_allclose(errors.mae, np.abs(truth).mean(), rtol=1e-5)
    assert errors.windows == len(truth)


def test_rules_without_parameters():
    x = np.arange(8, dtype=np.float32).reshape(1, 8)
    np.testing.assert_array_equal(baselines.last_value(3)(x), [[7, 7, 7]])
    np.testing.assert_array_equal(baselines.seasonal(5, 3)(x), [[5, 6, 7, 5, 6]])
    np.testing.assert_array_equal(baselines.seasonal(9, 24)(x), [[*range(8), 0]])


def test_the_full_linear_map_finds_a_linear_rule():
    """x[t + 1] = 2 cos(w) x[t] - x[t - 1] holds for a wave without its mean."""
    wave = np.sin(np.arange(400) * 0.5)[:, None].astype(np.float32)
    parts = cut(Series(wave, ("a",), 1.0), 25, 5)
    predict, values = baselines.linear(parts)
    assert values == 125
    assert measure(predict, parts.test).mse < 1e-5
    assert measure(baselines.last_value(5), parts.test).mse > 0.1
