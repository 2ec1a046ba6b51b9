import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_lora.runtime.stream.window import Window


def content(window, size):
    out = np.empty(size, np.float32)
    window.copy_to(out)
    return out


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), size=st.integers(1, 9)
)
def test_it_holds_the_last_values_in_order(values, size):
    window, kept = Window(size), deque(maxlen=size)
    for i, value in enumerate(values):
        assert window.add(10.0 * i, value) == ""
        kept.append(value)
        assert window.newest == value
        assert window.is_full == (len(kept) == size)
        if window.is_full:
            np.testing.assert_array_equal(content(window, size), np.array(kept, np.float32))


@pytest.mark.parametrize(
    ("time", "value", "told"),
    [
        (20.0, 1.0, "its time is not after the last one"),
        (5.0, 1.0, "its time is not after the last one"),
        (30.0, math.nan, "no value"),
        (30.0, math.inf, "inf is not a number in fp32"),
        (30.0, 1e39, "1e+39 is not a number in fp32"),
    ],
)
def test_what_is_refused_changes_nothing(time, value, told):
    window = Window(3)
    for i in range(3):
        window.add(10.0 * i, i)
    assert window.add(time, value) == told
    np.testing.assert_array_equal(content(window, 3), [0, 1, 2])
    assert window.add(30.0, 3) == ""
    np.testing.assert_array_equal(content(window, 3), [1, 2, 3])


@pytest.mark.parametrize(
    ("time", "told"),
    [(50.0, "2 rows are missing before it"), (23.0, "3 s after the last one, usual is 10 s")],
)
def test_a_gap_or_another_step_starts_anew(time, told):
    window = Window(3)
    for i in range(3):
        window.add(10.0 * i, i)
    assert window.add(time, 7.0, fill=1) == f"{told}; its window starts anew"
    assert not window.is_full
    assert window.add(time + 3, 8.0) == ""  # at a step of 3 from now on
    assert window.add(time + 6, 9.0) == ""
    np.testing.assert_array_equal(content(window, 3), [7, 8, 9])
    assert window.step == 3


def test_a_short_gap_is_filled_by_a_straight_line():
    window = Window(5)
    for i in range(2):
        window.add(10.0 * i, 0.0)
    assert window.add(40.0, 3.0, fill=2) == ""
    np.testing.assert_allclose(content(window, 5), [0, 0, 1, 2, 3], rtol=1e-6)


@pytest.mark.parametrize(
    "times",
    [
        [1.7e9 + i * 0.1 for i in range(20)],  # a tenth of a second is no exact number
        [round(i / 3, 3) for i in range(20)],
        [i + 0.02 * (-1) ** i for i in range(20)],  # a clock that jitters
    ],
)
def test_nearly_equal_steps_are_equal(times):
    window = Window(4)
    assert [window.add(time, 0.0) for time in times] == [""] * 20


@pytest.mark.parametrize(("every", "due"), [(1, [3, 4, 5, 6, 7, 8]), (2, [3, 5, 7]), (4, [3, 7])])
def test_the_first_full_window_is_due_then_every_so_many_values(every, due):
    window, found = Window(3), []
    for i in range(1, 9):
        window.add(float(i), 0.0)
        if window.is_due(every):
            found.append(i)
    assert found == due


def test_after_a_gap_the_next_full_window_is_due():
    window = Window(2)
    due = []
    for time in (0.0, 1.0, 2.0, 9.0, 10.0, 11.0):
        window.add(time, 0.0)
        due.append(window.is_due(100))
    assert due == [False, True, False, False, True, False]


@pytest.mark.parametrize(
    "times", [[0.0, 5e-324, 1e10], [-1.7e308, 1.7e308], [0.0, 1.0, 1e300], [0.0, 1e-9, 1.7e308]]
)
def test_times_beyond_all_bounds_start_anew(times):
    window = Window(3)
    *first, last = times
    assert [window.add(time, 0.0) for time in first] == [""] * len(first)
    assert window.add(last, 7.0, fill=10).endswith("its window starts anew")
    assert window.newest == 7.0
    assert math.isnan(window.step)


def test_no_more_rows_are_filled_than_a_window_has():
    window = Window(4)
    for time in (0.0, 1.0):
        window.add(time, 0.0)
    assert window.add(6.0, 5.0, fill=10**9) == ""
    np.testing.assert_allclose(content(window, 4), [2, 3, 4, 5])
    assert (
        window.add(12.0, 5.0, fill=10**9) == "5 rows are missing before it; its window starts anew"
    )
