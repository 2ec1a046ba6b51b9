"""Lines of CSV as rows of values, one line at a time, whatever is wrong with some of them.

Wide: ``time,a,b,c``, every column but the time a series. Long: ``time,series,value``, one value a
line. An empty cell of a wide line is a series that has nothing to say at that time.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edge_lora.csv_values import read_number, read_seconds, shown
from edge_lora.errors import UnsupportedError

Form = Literal["auto", "wide", "long"]
LONG_COLUMNS = ("series", "value")
"""Beside the time, in any order: what makes a head line that of a long file."""
TIME_NAMES = ("time", "date", "datetime", "timestamp")
"""The first of these is the time column, else the first column is."""
NAMES_SHOWN = 8  # a head line may have thousands


@dataclass(frozen=True, slots=True)
class Row:
    """Values of one line.

    Attributes:
        line: Its number, from 1.
        time: In seconds.
        label: The time as it was written.
        values: Series -> value; NaN where the line says that it is missing.
    """

    line: int
    time: float
    label: str
    values: dict[str, float]


class RowReader:
    """Reads lines under a head line; a later line with the time column's name is a new head."""

    def __init__(
        self,
        on_problem: Callable[[int, str, str], None],
        form: Form = "auto",
        time: str | None = None,
    ) -> None:
        """Read lines of one ``form``.

        Args:
            on_problem: Is told line, series (or "") and what is wrong; the rest of the line counts.
            form: "auto" goes by the head line.
            time: Name of the time column; default: see ``TIME_NAMES``.
        """
        self._on_problem, self._form, self._time = on_problem, form, time
        self._head: list[str] = []
        self._at = 0  # of the time
        self._places: tuple[int, int] | None = None  # of series and value, if long
        self._line = 0
        self._has_time = False  # was any read in the time column?

    def read(self, text: str) -> Row | None:
        """Return the row of the next line; None if it has none.

        Raises:
            UnsupportedError: If the first line is no head line.
        """
        self._line += 1
        text = text.removeprefix("\ufeff")  # at the start of a file, which may follow another
        if not text.strip():
            return None
        try:
            cells = next(csv.reader([text], strict=True)) if '"' in text else text.split(",")
        except csv.Error as error:
            self._bad(f"not a line of CSV: {error}")
            return None
        if not self._head:
            self._begin([cell.strip() for cell in cells])
            return None
        if self._at < len(cells) and cells[self._at].strip() == self._head[self._at]:
            self._begin_again([cell.strip() for cell in cells])
            return None
        return self._row(cells)

    def restart(self) -> None:
        """Count lines anew: what follows is another file, under the same head until it has one."""
        self._line = 0

    def _row(self, cells: Sequence[str]) -> Row | None:
        if len(cells) != len(self._head):
            self._bad(f"{len(cells)} columns, the head line has {len(self._head)}")
            return None
        label = cells[self._at].strip()
        time = read_seconds(label)
        if time is None:
            other = "" if self._has_time or self._time else "; name its column with --time"
            self._bad(
                f"{shown(label)} in column {shown(self._head[self._at])} is not a time{other}"
            )
            return None
        self._has_time = True
        values = self._values(cells)
        return Row(self._line, time, label, values) if values else None

    def _values(self, cells: Sequence[str]) -> dict[str, float]:
        if self._places is not None:
            series, value = (cells[place] for place in self._places)
            named = [(series.strip(), value)]
        else:
            named = [
                (name, cell)
                for i, (name, cell) in enumerate(zip(self._head, cells, strict=True))
                if i != self._at and cell and not cell.isspace()
            ]
        values = {}
        for series, text in named:
            number = read_number(text)
            if number is None or math.isinf(number):
                self._on_problem(self._line, series, f"{shown(text.strip())} is not a number")
            elif not series:
                self._on_problem(self._line, "", "it names no series")
            else:
                values[series] = number
        return values

    def _begin(self, head: list[str]) -> None:
        """Take the first head line."""
        problem = _head_problem(head, self._time, self._form)
        if problem:
            raise UnsupportedError(f"line {self._line}: {problem}")
        self._take(head)

    def _begin_again(self, head: list[str]) -> None:
        """Take a later head line; one that is the same says nothing new."""
        problem = _head_problem(head, self._time, self._form)
        if problem:
            self._bad(problem)
        elif head != self._head:
            before, now = set(self._head), set(head)
            new = _names(name for name in head if name not in before)
            gone = _names(name for name in self._head if name not in now)
            self._bad(f"the columns change here; new: {new}; gone: {gone}")
            self._take(head)

    def _take(self, head: list[str]) -> None:
        self._head = head
        lower = [name.lower() for name in head]
        named = [lower.index(name) for name in TIME_NAMES if name in lower]
        self._at = head.index(self._time) if self._time else named[0] if named else 0
        rest = [i for i in range(len(head)) if i != self._at]
        has_long = len(head) == 3 and {lower[i] for i in rest} == set(LONG_COLUMNS)
        self._places = None
        if has_long and self._form != "wide":
            self._places = (lower.index("series"), lower.index("value"))
        elif self._form == "long":
            self._places = (rest[0], rest[1])

    def _bad(self, what: str) -> None:
        self._on_problem(self._line, "", what)


def _head_problem(head: Sequence[str], time: str | None, form: Form) -> str:
    """Return why a line cannot name columns, or nothing."""
    if any("\r" in name for name in head):
        return "carriage returns alone end its lines; write them with line feeds"
    if len(head) < 2:
        found = ", ".join(map(shown, head))
        return f"a head line names a time column and others, separated by commas: {found}"
    if all(read_number(name) is not None or read_seconds(name) is not None for name in head):
        return f"there is no head line: {_names(head)} are values, not names"
    twice = [name for name, times in Counter(head).items() if times > 1 or not name]
    if twice:
        return f"columns without a name of their own: {_names(twice)}"
    if time is not None and time not in head:
        return f"there is no column {shown(time)}; there are: {_names(head)}"
    if form == "long" and len(head) != 3:
        return f"a long file has the columns time, series, value; this one has {_names(head)}"
    return ""


def _names(names: Iterable[str]) -> str:
    """Return the first few of ``names``, each quoted, and how many more there are."""
    found = list(names)
    more = len(found) - NAMES_SHOWN
    told = ", ".join(map(shown, found[:NAMES_SHOWN])) or "none"
    return f"{told} and {more:,} more" if more > 0 else told
