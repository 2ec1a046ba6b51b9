import math
from time import perf_counter

import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.stream.rows import RowReader


def read(text, **options):
    problems = []
    reader = RowReader(lambda *problem: problems.append(problem), **options)
    rows = [row for line in text.splitlines() if (row := reader.read(line)) is not None]
    return [(row.line, row.time, row.values) for row in rows], problems


def test_wide_lines():
    rows, problems = read("a,time,b\n1,1970-01-01 00:00,2\n3,1970-01-01 01:00,4.5\n")
    assert rows == [(2, 0.0, {"a": 1.0, "b": 2.0}), (3, 3600.0, {"a": 3.0, "b": 4.5})]
    assert problems == []


def test_the_first_column_is_the_time_if_none_is_named_so():
    assert read("when,a\n5,1\n")[0] == [(2, 5.0, {"a": 1.0})]
    assert read("a,when\n1,5\n", time="when")[0] == [(2, 5.0, {"a": 1.0})]


@pytest.mark.parametrize("head", ["time,series,value", "Time,Series,Value"])
def test_long_lines_go_by_the_head(head):
    assert read(f"{head}\n1,pump,2\n1,fan,3\n")[0] == [
        (2, 1.0, {"pump": 2.0}),
        (3, 1.0, {"fan": 3.0}),
    ]


def test_the_columns_of_a_long_file_may_stand_in_any_order():
    assert read("value,time,series\n2,1,pump\n")[0] == [(2, 1.0, {"pump": 2.0})]


def test_the_form_can_be_said():
    assert read("ts,id,x\n1,pump,2\n", form="long")[0] == [(2, 1.0, {"pump": 2.0})]
    assert read("time,series,value\n1,2,3\n", form="wide")[0] == [
        (2, 1.0, {"series": 2.0, "value": 3.0})
    ]
    with pytest.raises(UnsupportedError, match="line 1: a long file has the columns"):
        read("time,a,b,c\n", form="long")


def test_quoted_names_and_a_mark_at_the_start_of_the_file():
    assert read('\ufefftime,"a,b"\n1,2\n')[0] == [(2, 1.0, {"a,b": 2.0})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("2,1", (3, "", "2 columns, the head line has 3")),
        ("2,1,1,1", (3, "", "4 columns, the head line has 3")),
        ("soon,1,1", (3, "", "'soon' in column 'time' is not a time")),
        ("inf,1,1", (3, "", "'inf' in column 'time' is not a time")),
        ("2,x,1", (3, "a", "'x' is not a number")),
        ("2,inf,1", (3, "a", "'inf' is not a number")),
        ("2,\ufffd\ufffd,1", (3, "a", "'\ufffd\ufffd' is not a number")),
        ('2,"1,1', (3, "", "not a line of CSV: unexpected end of data")),
    ],
)
def test_a_bad_line_is_named_and_the_rest_is_read(line, problem):
    rows, problems = read(f"time,a,b\n1,1,1\n{line}\n3,3,3\n")
    assert problems == [problem]
    assert rows[0] == (2, 1.0, {"a": 1.0, "b": 1.0})
    assert rows[-1] == (4, 3.0, {"a": 3.0, "b": 3.0})
    assert [row[2] for row in rows[1:-1]] == ([{"b": 1.0}] if problem[1] else [])


def test_a_long_line_without_a_series():
    assert read("time,series,value\n1,,2\n")[1] == [(2, "", "it names no series")]


def test_a_missing_value_is_nan_and_an_empty_cell_says_nothing():
    ((_, _, values),), problems = read("time,a,b,c\n1,nan,, \n")
    assert math.isnan(values["a"])
    assert list(values) == ["a"]
    assert problems == []


def test_empty_lines_count_but_say_nothing():
    assert read("time,a\n\n  \n1,2\n") == ([(4, 1.0, {"a": 2.0})], [])


def test_a_second_head_line_changes_the_columns():
    rows, problems = read("time,a,b\n1,1,1\ntime,a,b\n2,2,2\ntime,a,c\n3,3,3\n")
    assert [values for _, _, values in rows] == [
        {"a": 1, "b": 1},
        {"a": 2, "b": 2},
        {"a": 3, "c": 3},
    ]
    assert problems == [(5, "", "the columns change here; new: 'c'; gone: 'b'")]


@pytest.mark.parametrize(
    ("head", "form", "message"),
    [
        ("time,a,a", "auto", "columns without a name of their own: 'a'"),
        (
            "time",
            "auto",
            "a head line names a time column and others, separated by commas: 'time'",
        ),
        (
            "time,a",
            "long",
            "a long file has the columns time, series, value; this one has 'time', 'a'",
        ),
    ],
)
def test_a_bad_second_head_line_is_named_and_the_first_stays(head, form, message):
    rows, problems = read(f"time,a,b\n{head}\n1,1,1\n", form=form)
    assert rows == [(3, 1.0, {"1": 1.0} if form == "long" else {"a": 1.0, "b": 1.0})]
    ((line, series, told),) = problems
    assert (line, series) == (2, "")
    assert told.startswith(message)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("time", "line 1: a head line names a time column and others"),
        ("1,2,3", "line 1: there is no head line: '1', '2', '3' are values"),
        ("2020-01-01,2,3", "line 1: there is no head line"),
        ("time,a,a", "line 1: columns without a name of their own: 'a'"),
        ("time,a,", "line 1: columns without a name of their own: ''"),
    ],
)
def test_a_stream_needs_a_head_line(head, message):
    with pytest.raises(UnsupportedError, match=message):
        read(f"{head}\n")


@pytest.mark.parametrize("head", ["time,a\r1,2\r2,3", "time\ra"])
def test_lines_that_end_in_carriage_returns_alone_are_refused(head):
    with pytest.raises(UnsupportedError, match="line 1: carriage returns alone end its lines"):
        RowReader(print).read(head)


def test_a_head_line_of_many_columns_is_read_and_compared_at_once():
    """Comparing each name with each would take minutes."""
    problems, count = [], 100_000
    reader = RowReader(lambda *problem: problems.append(problem))
    begin = perf_counter()
    for letter in "ab":
        reader.read("time," + ",".join(f"{letter}{i}" for i in range(count)))
    reader.read("time," + "c," * count)
    assert perf_counter() - begin < 5
    changed, twice = (what for _, _, what in problems)
    assert changed == (
        "the columns change here; new: 'b0', 'b1', 'b2', 'b3', 'b4', 'b5', 'b6', 'b7' and 99,992 "
        "more; gone: 'a0', 'a1', 'a2', 'a3', 'a4', 'a5', 'a6', 'a7' and 99,992 more"
    )
    assert twice == "columns without a name of their own: 'c', ''"


@pytest.mark.parametrize(
    "lines",
    [["x" * 10**6], ["time,a", "1," + "x" * 10**6], ["time,a", "x" * 10**6 + ",1"],
     ["time,a", "time," + "x" * 10**6]],
)  # fmt: skip
def test_messages_stay_short(lines):
    told = []
    reader = RowReader(lambda line, series, what: told.append(what))
    try:
        for line in lines:
            reader.read(line)
    except UnsupportedError as error:
        told.append(str(error))
    assert len(told) == 1
    assert len(told[0]) < 200


def test_a_file_that_follows_begins_at_line_1_and_may_have_a_mark():
    problems = []
    reader = RowReader(lambda *problem: problems.append(problem))
    for line in ("\ufefftime,a", "1,1"):
        reader.read(line)
    reader.restart()
    for line in ("\ufefftime,b", "2,x"):
        reader.read(line)
    assert problems == [
        (1, "", "the columns change here; new: 'b'; gone: 'a'"),
        (2, "b", "'x' is not a number"),
    ]


def test_the_time_column_can_be_named_while_no_time_was_read():
    hint = "; name its column with --time"
    problems = read("date,time,a\n2020-01-01,noon,1\n2020-01-02,1,1\n2020-01-03,noon,1\n")[1]
    told = "'noon' in column 'time' is not a time"
    assert [what for _, _, what in problems if "noon" in what] == [told + hint, told]


def test_a_time_column_that_is_not_there():
    with pytest.raises(UnsupportedError, match="there is no column 'when'; there are: 'time', 'a'"):
        read("time,a\n", time="when")
