"""Regular series from CSV files: one time column, every other column a channel.

A forecast needs rows at equal steps. What breaks that (a gap, a step back, a value that is missing
or is no number) is refused with its line; short gaps can be filled in straight lines on request.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.csv_values import (
    LARGEST,
    STEP_TOLERANCE,
    read_date,
    read_number,
    read_seconds,
)
from edge_lora.errors import EdgeLoraError, list_all


class SeriesError(EdgeLoraError, ValueError):
    """A series, or what was asked of it, is not fit for forecasting."""


@dataclass(frozen=True, eq=False)
class Series:
    """Channels over time at equal steps.

    Attributes:
        values: (rows, channels) fp32, finite.
        columns: Name of each channel.
        step: Seconds between rows.
        filled: How many values were filled in.
        start: Time of the first row in seconds since 1970, as the file's clock shows it.
        labels: What the label column says of each row; empty without one.
    """

    values: NDArray[np.float32]
    columns: tuple[str, ...]
    step: float
    filled: int = 0
    start: float = 0.0
    labels: tuple[str, ...] = ()


def read_series(
    path: str | Path,
    time: str | None = None,
    fill: int = 0,
    label: str | None = None,
    columns: Sequence[str] = (),
) -> Series:
    """Read a CSV file with a head line, a time column and number columns.

    Args:
        path: The file, UTF-8.
        time: Name of the time column: dates, or seconds. Default: the first column that reads as
            a date in the first row.
        fill: Longest gap, in rows, to fill by straight lines: missing values and missing rows.
        label: Name of a column of texts that is no channel; a missing row has the text of the one
            before it. Passed over if there is no such column.
        columns: Names of the channels; the others are not read. Default: all.

    Raises:
        SeriesError: Anything that keeps the file from being a regular series; lists all with lines.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SeriesError(f"'{path}' is not a readable CSV file: {error}") from error
    if len(rows) < 3:
        raise SeriesError(f"'{path}' has no head line with two rows of numbers below it")
    (_, head), *body = rows
    at = _time_column(path, head, body[0], time)
    problems: list[str] = []
    skipped = {at} if label not in head else {at, head.index(label)}
    skipped |= _others(path, head, at, columns)
    found, times, values = _parse(head, body, at, skipped, problems)
    _refuse(path, problems)
    step = float(np.median(np.diff(times)))
    values, lines = _regular(found, times, values, step, fill, problems)
    _refuse(path, problems)
    channels = tuple(name for i, name in enumerate(head) if i not in skipped)
    filled = _fill_values(values, channels, lines, fill, problems)
    labels = () if label not in head else _labels(body, head.index(label), lines, problems)
    _refuse(path, problems)
    return Series(values.astype(np.float32), channels, step, filled, float(times[0]), labels)


def _others(path: Path, head: Sequence[str], at: int, columns: Sequence[str]) -> set[int]:
    """Return the columns that were not asked for; none if nothing was."""
    known = [name for i, name in enumerate(head) if i != at]
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise SeriesError(
            f"'{path}' has no column {', '.join(map(repr, unknown))}. It has: {', '.join(known)}"
        )
    return {i for i, name in enumerate(head) if columns and name not in columns}


def _labels(
    body: Sequence[tuple[int, list[str]]], at: int, lines: Sequence[int], problems: list[str]
) -> tuple[str, ...]:
    """Return the label of every row, filled ones included."""
    texts = [row[at].strip() for _, row in body]
    problems += [
        f"line {line}: no label" for (line, _), text in zip(body, texts, strict=True) if not text
    ]
    last = np.searchsorted([line for line, _ in body], lines, side="right") - 1
    return tuple(texts[i] for i in last)


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise SeriesError(list_all(f"'{path}' is not a regular series", problems))


def _time_column(
    path: Path, head: list[str], first: tuple[int, list[str]], time: str | None
) -> int:
    if time is not None:
        if time not in head:
            raise SeriesError(f"'{path}' has no column {time!r}. It has: {', '.join(head)}")
        return head.index(time)
    line, row = first
    for at, text in enumerate(row[: len(head)]):
        if read_date(text) is not None:
            return at
    raise SeriesError(
        f"'{path}', line {line}: no column reads as a date ({', '.join(row)}). "
        "If times are seconds, name their column"
    )


def _parse(
    head: list[str],
    body: Sequence[tuple[int, list[str]]],
    at: int,
    skipped: set[int],
    problems: list[str],
) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
    """Return line, time and values of every row; values may be NaN."""
    if len(head) <= len(skipped):
        problems.append("line 1: there is no column of numbers beside the time")
    lines, times, values = [], [], []
    for line, row in body:
        if len(row) != len(head):
            problems.append(f"line {line}: {len(row)} columns, the head line has {len(head)}")
            continue
        when = read_seconds(row[at])
        if when is None:
            problems.append(f"line {line}: {row[at]!r} in column {head[at]!r} is not a time")
            continue
        numbers = []
        for i, (name, text) in enumerate(zip(head, row, strict=True)):
            if i in skipped:
                continue
            number = read_number(text)
            if number is None or abs(number) > LARGEST:
                problems.append(f"line {line}: {text!r} in column {name!r} is not a number")
            numbers.append(math.nan if number is None else number)
        lines.append(line)
        times.append(when)
        values.append(numbers)
    return lines, np.array(times), np.array(values, np.float64)


def _regular(
    lines: list[int],
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    step: float,
    fill: int,
    problems: list[str],
) -> tuple[NDArray[np.float64], list[int]]:
    """Put rows of NaN into gaps of at most ``fill`` rows; name every other irregular step."""
    gaps = np.diff(times)
    problems += [
        f"line {lines[i + 1]}: its time is not after that of line {lines[i]}"
        for i in np.flatnonzero(gaps <= 0)
    ]
    if problems:
        return values, lines
    missing = np.rint(gaps / step).astype(np.int64) - 1
    uneven = np.abs(gaps - (missing + 1) * step) > STEP_TOLERANCE * step
    for i in np.flatnonzero(uneven | (missing > fill)):
        told = f"line {lines[i + 1]}: {gaps[i]:g} s after line {lines[i]}, usual is {step:g} s"
        if not uneven[i]:
            told += f" ({missing[i]} rows missing; the longest gap to fill is {fill})"
        problems.append(told)
    if problems or not missing.any():
        return values, lines
    places = np.concatenate([[0], np.cumsum(missing + 1)])
    wider = np.full((int(places[-1]) + 1, values.shape[1]), np.nan)
    wider[places] = values
    spread = np.interp(np.arange(len(wider)), places, lines).astype(int).tolist()
    return wider, spread


def _fill_values(
    values: NDArray[np.float64],
    columns: Sequence[str],
    lines: Sequence[int],
    fill: int,
    problems: list[str],
) -> int:
    """Fill runs of NaN in place where they are inside and short; name the others."""
    filled = 0
    rows = np.arange(len(values))
    for channel, name in enumerate(columns):
        column = values[:, channel]
        gone = np.isnan(column)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], gone, [False]]).astype(np.int8)))
        for start, end in edges.reshape(-1, 2):
            if end - start > fill or start == 0 or end == len(values):
                last = f" to line {lines[end - 1]}" if end - start > 1 else ""
                where = f"line {lines[start]}{last}"
                problems.append(
                    f"{where}: no value in column {name!r} ({end - start} rows; --fill is {fill})"
                )
        if gone.any() and not problems:
            column[gone] = np.interp(rows[gone], rows[~gone], column[~gone])
            filled += int(gone.sum())
    return filled
