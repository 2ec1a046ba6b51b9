"""CSV files as series: what is read, what is refused and with which line."""

from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edge_lora.timeseries.series import SeriesError, read_series


def hours(count, start=datetime(2024, 1, 1)):
    return [(start + timedelta(hours=i)).isoformat(" ") for i in range(count)]


def write(path, rows, head="date,a,b"):
    path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture
def rows():
    return [[time, i, i * 0.5] for i, time in enumerate(hours(12))]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.csv"


def test_values_columns_and_step(path, rows):
    series = read_series(write(path, rows))
    assert series.columns == ("a", "b")
    assert series.step == 3600
    assert series.filled == 0
    assert series.values.dtype == np.float32
    np.testing.assert_array_equal(series.values, [[i, i * 0.5] for i in range(12)])


def test_the_time_column_is_found_anywhere_and_zones_count(path):
    rows = [[i, f"2024-01-01T0{i}:00:00+0{i}:00"] for i in range(4)]  # the same moment
    with pytest.raises(SeriesError, match="line 3: its time is not after that of line 2"):
        read_series(write(path, rows, "a,when"))
    rows = [[i, f"2024-01-01T0{i}:00:00+01:00"] for i in range(4)]
    assert read_series(write(path, rows, "a,when")).columns == ("a",)


def test_seconds_as_times_must_be_named(path):
    write(path, [[0, 1], [5, 2], [10, 3]], "t,a")
    with pytest.raises(SeriesError, match="line 2: no column reads as a date"):
        read_series(path)
    assert read_series(path, time="t").step == 5
    with pytest.raises(SeriesError, match=r"no column 'u'\. It has: t, a"):
        read_series(path, time="u")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[4].__setitem__(1, "warm"), "line 6: 'warm' in column 'a' is not a number"),
        (lambda r: r[4].__setitem__(1, "inf"), "line 6: 'inf' in column 'a' is not a number"),
        (lambda r: r[4].__setitem__(1, "1e39"), "line 6: '1e39' in column 'a' is not a number"),
        (lambda r: r[4].__setitem__(2, ""), r"line 6: no value in column 'b' \(1 rows"),
        (
            lambda r: [r[i].__setitem__(1, "NaN") for i in (3, 4, 5)],
            r"line 5 to line 7: no value in column 'a' \(3 rows",
        ),
        (lambda r: r[4].append(7), "line 6: 4 columns, the head line has 3"),
        (lambda r: r[4].pop(), "line 6: 2 columns, the head line has 3"),
        (lambda r: r[4].__setitem__(0, "noon"), "line 6: 'noon' in column 'date' is not a time"),
        (
            lambda r: r[4].__setitem__(0, r[2][0]),
            "line 6: its time is not after that of line 5",
        ),
        (lambda r: r.__delitem__(4), r"line 6: 7200 s after line 5, usual is 3600 s \(1 rows"),
        (
            lambda r: r[4].__setitem__(0, "2024-01-01 04:10:00"),
            "line 6: 4200 s after line 5, usual is 3600 s\n",
        ),
    ],
)
def test_what_breaks_a_series_is_named_with_its_line(path, rows, change, message):
    change(rows)
    with pytest.raises(SeriesError, match=message):
        read_series(write(path, rows))


def test_all_problems_come_at_once(path, rows):
    rows[2][1], rows[7][2] = "x", "y"
    with pytest.raises(SeriesError, match=r"(?s)line 4: 'x'.*line 9: 'y'"):
        read_series(write(path, rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no head line with two rows"),
        (b"date,a\n2024-01-01,1\n", "no head line with two rows"),
        (b"date\n2024-01-01\n2024-01-02\n", "no column of numbers"),
        (b"date,a\n\xff\xfe\n1,1\n", "not a readable CSV file"),
        (b'date,a\n2024-01-01,"1\n2024-01-02,1\n', "not a readable CSV file"),
    ],
)
def test_files_that_are_no_series(path, content, message):
    path.write_bytes(content)
    with pytest.raises(SeriesError, match=message):
        read_series(path)


def test_a_missing_file_is_one_error(path):
    with pytest.raises(SeriesError, match="not a readable CSV file"):
        read_series(path)


def test_short_gaps_are_filled_in_straight_lines(path, rows):
    rows[3][1] = "nan"
    del rows[6:8]
    series = read_series(write(path, rows), fill=2)
    np.testing.assert_allclose(series.values, [[i, i * 0.5] for i in range(12)])
    assert series.filled == 1 + 4


def test_gaps_at_an_end_are_never_filled(path, rows):
    rows[0][1] = rows[11][2] = ""
    with pytest.raises(SeriesError, match=r"(?s)line 2: no value.*line 13: no value"):
        read_series(write(path, rows), fill=5)


def test_a_year_of_real_temperatures_lacks_the_hour_of_summer_time():
    found = find_spec("vega_datasets")
    if found is None:
        pytest.skip("vega-datasets is not installed")
    path = Path(found.origin).parent / "_data" / "seattle-temps.csv"
    with pytest.raises(SeriesError, match="line 1733: 7200 s after line 1732"):
        read_series(path)
    series = read_series(path, fill=1)
    assert series.values.shape == (8760, 1)
    assert series.filled == 1
