"""What a cell of a CSV file means: a time, a number, nothing."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

import numpy as np

TIME_FORMATS = ("%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d", "%d.%m.%Y %H:%M")
"""Tried after ISO 8601."""
LARGEST = float(np.finfo(np.float32).max)
STEP_TOLERANCE = 1e-6  # relative: times may be rounded decimals
LONGEST_SHOWN = 60
_MISSING = ("", "na", "n/a", "nan", "null", "none")
_EPOCH = datetime(1970, 1, 1)


def shown(text: str) -> str:
    """Return a cell as a message names it: quoted, and cut if it is long.

    >>> shown("pump"), len(shown("x" * 10**6))
    ("'pump'", 63)
    """
    return repr(text) if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]!r}…"


def read_date(text: str) -> datetime | None:
    """Return the date that a text is, or None; a number is none, though ISO 8601 reads some."""
    text = text.strip()
    if read_number(text) is not None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        pass
    for style in TIME_FORMATS:
        try:
            return datetime.strptime(text, style)
        except ValueError:
            continue
    return None


def read_seconds(text: str) -> float | None:
    """Return a time, a date or a number, in seconds; local times count without summer time.

    >>> read_seconds("1970-01-02"), read_seconds("90.5"), read_seconds("soon")
    (86400.0, 90.5, None)
    """
    date = read_date(text)
    if date is not None:
        offset = date.utcoffset() or timedelta()
        return (date.replace(tzinfo=None) - _EPOCH - offset).total_seconds()
    number = read_number(text)
    return number if number is not None and math.isfinite(number) else None


def read_number(text: str) -> float | None:
    """Return a value, NaN where it is missing, None where it is no number.

    >>> read_number("1.5"), read_number("n/a"), read_number("1,5"), read_number("1_5")
    (1.5, nan, None, None)
    """
    text = text.strip()
    if text.lower() in _MISSING:
        return math.nan
    if "_" in text:  # a separator of digits in Python's source, and in no data
        return None
    try:
        return float(text)
    except ValueError:
        return None
