"""The axes of a plot page: round numbers inside of it, which can be told apart."""

import re

import numpy as np
import pytest

from edge_lora.timeseries.plot_page import _drawing, _labels, _ticks


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (-10, -1), (-10.5, -1.5), (101325.1, 101335.2), (-0.03, 0.05), (1e9, 1e9 + 1),
     (-3e38, 3e38), (999, 1001)],
)  # fmt: skip
def test_ticks_lie_inside_and_differ(low, high):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low <= ticks[0]
    assert ticks[-1] <= high
    labels = _labels(ticks)
    assert len(set(labels)) == len(ticks)
    np.testing.assert_allclose([float(label) for label in labels], ticks, rtol=1e-9, atol=1e-9)


def test_usual_labels_are_short():
    assert _labels([0.0, 0.2, 0.4]) == ["0", "0.2", "0.4"]
    assert _labels([101330.0, 101335.0]) == ["101330", "101335"]
    assert _labels([]) == []


@pytest.mark.parametrize(
    "values",
    [[np.nan] * 3, [1.0, np.nan, 2.0], [np.inf, 0.0, -np.inf], [3e38] * 3, [0.0] * 3,
     [5e-324, 0, 0], [-7.0] * 3, [1e-310, 0, 2e-310]],
)  # fmt: skip
@pytest.mark.parametrize("zero", [False, True])
def test_what_cannot_be_drawn_is_left_out(values, zero):
    drawing = _drawing([("c0", range(3), values)], {0: "a"}, [], 0, zero=zero)
    assert not re.search("nan|inf", drawing)
    assert "<path class=c0" in drawing
