"""What a cell means, where two readings are possible."""

import math

import pytest

from edge_lora.csv_values import read_date, read_number, read_seconds


@pytest.mark.parametrize("text", ["10000101.00", "10000101.24", "12340101.12", "20200101", "-0"])
def test_a_number_is_a_number_and_no_date(text):
    assert read_date(text) is None
    assert read_seconds(text) == float(text)


@pytest.mark.parametrize("text", ["1_000", "1_0.5", "1e1_0"])
def test_digits_are_not_separated(text):
    assert read_number(text) is None
    assert read_seconds(text) is None


def test_dates_and_missing_values_stay_what_they_were():
    assert read_seconds("1970-01-02") == read_seconds("1970/01/02") == 86400
    assert read_seconds("02.01.1970 00:00") == 86400
    assert read_seconds("1970-01-01T02:00+01:00") == 3600
    assert read_date("nan") is None
    assert read_seconds("nan") is None
    assert math.isnan(read_number("nan"))
