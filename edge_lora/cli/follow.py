"""``edge-lora run --follow``: forecasts as lines arrive, one adapter per series."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from edge_lora.cli.output import engine_option, human_bytes, json_option, report, route_option
from edge_lora.cli.stop import Stop
from edge_lora.csv_values import shown
from edge_lora.errors import EdgeLoraError, UnsupportedError

if TYPE_CHECKING:
    from edge_lora.runtime.stream import Forecast, Forecasts
    from edge_lora.runtime.stream.rows import Row

OTHERS = "*"
TOLD_A_MINUTE = 20  # problems spelled out; a thousand broken sensors must not fill a disk
_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


class StreamProblemError(EdgeLoraError):
    """A problem of the stream, where it was asked to stop at one."""


class BytesType(click.ParamType[int]):
    """``64MB``, in decimal units."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|)", str(value))
        if match is None:
            self.fail(f"{value!r} is no size; write one like 64MB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class SeriesAdapterType(click.ParamType[tuple[str, Path]]):
    """``SERIES=PATH``; a path alone is for all other series."""

    name = "SERIES=PATH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        """Return series and path; the file must be there."""
        series, equals, rest = str(value).partition("=")
        path = Path(rest if equals else series)
        if not path.is_file():
            self.fail(f"there is no file '{path}'", param, ctx)
        return (series if equals else OTHERS), path


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, type=SeriesAdapterType())
@click.option("--follow", is_flag=True, help="Forecast what arrives on stdin, or tail --input.")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="CSV file instead of stdin; without --follow, up to its end.",
)
@click.option(
    "--adapters",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of SERIES.safetensors.",
)
@click.option("--every", default=1, show_default=True, type=click.IntRange(1), help="Rows.")
@click.option(
    "--fill",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Longest gap to fill, in rows, at most a window; a longer one starts the window anew.",
)
@click.option(
    "--memory",
    default="64MB",
    show_default=True,
    type=BytesType(),
    help="Most for windows and adapters, beside the base.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "wide", "long"]),
    default="auto",
    show_default=True,
    help="wide: time,a,b,…; long: time,series,value.",
)
@click.option("--time", help="Name of the time column.")
@click.option("--skip-bad", is_flag=True, help="Count what is wrong, do not name it.")
@click.option("--strict", is_flag=True, help="Stop at the first thing that is wrong.")
@click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="More wait for work by spinning, and small bases give them none.",
)
@engine_option
@route_option
@json_option
def command(
    bundle: Path,
    adapters: tuple[tuple[str, Path], ...],
    follow: bool,
    source: Path | None,
    folder: Path | None,
    every: int,
    fill: int,
    memory: int,
    form: Any,
    time: str | None,
    skip_bad: bool,
    strict: bool,
    threads: int,
    engine: str,
    route: Any,
    as_json: bool,
) -> None:
    """Forecast every series of a CSV stream with BUNDLE, each with its own adapter.

    A series is forecast from when its window is full. Its adapter is SERIES=PATH or the file of its
    name in --adapters, else *=PATH or a PATH alone, else none: the base. What is wrong with a line
    is named on stderr and concerns its series only; after a gap, the window starts anew.

    \b
    tail -n +1 -F sensors.csv | edge-lora run forecast-bundle --follow --adapters adapters/
    edge-lora run forecast-bundle --input sensors.csv --follow pump=pump.safetensors --every 24
    """
    if skip_bad and strict:
        raise click.UsageError("--skip-bad and --strict exclude each other")
    chosen = _adapters(adapters, folder)
    from edge_lora.runtime import open_bundle
    from edge_lora.runtime.stream import Forecasts
    from edge_lora.runtime.stream.rows import RowReader

    problems = Problems(is_silent=skip_bad, is_strict=strict)
    with open_bundle(bundle, engine, threads=threads, route=route) as session, Stop() as stop:
        forecasts = Forecasts(
            session,
            chosen,
            every=every,
            fill=fill,
            memory_bytes=memory,
            on_problem=problems.of_series,
        )
        reader = RowReader(problems.of_line, form, time)
        try:
            follower = Follower(forecasts, problems, Writer(forecasts.horizon, as_json))
            follower.follow(stop.lines(_lines(source, follow, reader.restart)), reader)
            _require_forecasts(forecasts)
        except KeyboardInterrupt:
            pass
        finally:
            problems.close()
            _report(forecasts, problems, as_json)


@dataclass
class Problems:
    """Names what is wrong on stderr, with its line; how much of it depends on what was asked."""

    is_silent: bool
    is_strict: bool
    count: int = 0
    lines: dict[str, int] = field(default_factory=dict)  # series -> line that is being read
    _minute: float = -1.0
    _told: int = 0
    _untold: int = 0

    def of_series(self, series: str, what: str) -> None:
        """Tell what is wrong with a series, on the line that is being read."""
        self.of_line(self.lines.get(series, 0), series, what)

    def of_line(self, line: int, series: str, what: str) -> None:
        """Tell what is wrong with one line."""
        self.count += 1
        message = f"line {line}{f', series {shown(series)}' if series else ''}: {what}"
        if self.is_strict:
            raise StreamProblemError(message)
        if self.is_silent:
            return
        minute = monotonic() // 60
        if minute != self._minute:
            self.close()
            self._minute, self._told = minute, 0
        if self._told < TOLD_A_MINUTE:
            self._told += 1
            report(message)
        else:
            self._untold += 1

    def close(self) -> None:
        """Say how many problems were not spelled out since the last ones that were."""
        if self._untold:
            report(f"… and {self._untold:,} more problems")
        self._untold = 0


class Writer:
    """Writes forecasts to stdout, one a line, as they are made."""

    def __init__(self, horizon: int, as_json: bool) -> None:
        """Write CSV with a head line, or JSON lines."""
        self._numbers = ",".join(["%.7g"] * horizon)
        self._as_json = as_json
        if not as_json:
            self._print(["series,time," + ",".join(str(i + 1) for i in range(horizon))])

    def write(self, made: Sequence[Forecast], label: str) -> None:
        """Write the forecasts of one row, whose time was written so."""
        if made:
            self._print([self._line(forecast, label) for forecast in made])

    def _line(self, forecast: Forecast, label: str) -> str:
        values = self._numbers % tuple(forecast.values.tolist())
        if not self._as_json:
            return f"{_cell(forecast.series)},{_cell(label)},{values}"
        names = f'"series": {json.dumps(forecast.series)}, "time": {json.dumps(label)}'
        return f'{{{names}, "forecast": [{values}]}}'

    def _print(self, lines: list[str]) -> None:
        """Write as it is: click.echo takes out what looks like colours."""
        if sys.stdout is None:
            raise UnsupportedError("forecasts cannot be written: stdout is closed")
        try:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever reads has had enough
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest of it
            raise UnsupportedError(f"forecasts cannot be written: {error.strerror}") from error


class Follower:
    """Puts lines of one time together, so that they are forecast together."""

    def __init__(self, forecasts: Forecasts, problems: Problems, writer: Writer) -> None:
        self._forecasts, self._problems, self._writer = forecasts, problems, writer
        self._row: Row | None = None
        self._has_said_base = False

    def follow(self, chunks: Iterator[Iterable[str]], reader: Any) -> None:
        """Forecast all lines; what came together is forecast before more is waited for."""
        for lines in chunks:
            for text in lines:
                row = reader.read(text)
                if row is not None:
                    self._take(row)
            self._flush()

    def _take(self, row: Row) -> None:
        held = self._row
        if held is None or held.time != row.time or not held.values.keys().isdisjoint(row.values):
            self._flush()
            self._row = row
        else:
            held.values.update(row.values)
        self._problems.lines.update(dict.fromkeys(row.values, row.line))

    def _flush(self) -> None:
        row, self._row = self._row, None
        if row is None:
            return
        made = self._forecasts.push_row(row.time, row.values)
        self._problems.lines.clear()
        self._writer.write(made, row.label)
        on_base = next((f.series for f in made if f.adapter is None), None)
        if on_base is not None and not self._has_said_base:
            self._has_said_base = True
            report(f"series {on_base!r} has no adapter; it, and others without one, use the base")


def _adapters(named: tuple[tuple[str, Path], ...], folder: Path | None) -> dict[str, Path]:
    """Return series -> file; those that are named count before those of the folder."""
    series = [name for name, _ in named]
    twice = sorted({name for name in series if series.count(name) > 1})
    if twice:
        raise click.UsageError(f"more than one adapter for {', '.join(twice)}")
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))} if folder else {}
    if folder and not found:
        raise UnsupportedError(f"'{folder}' holds no SERIES.safetensors")
    return {**found, **dict(named)}


def _lines(
    source: Path | None, follow: bool, on_restart: Callable[[], None]
) -> Iterator[list[str]]:
    from edge_lora.runtime.stream.source import lines_of, lines_of_growing

    if source is None:
        if sys.stdin is None:
            raise UnsupportedError("stdin is closed; name a file with --input")
        yield from lines_of(sys.stdin.fileno())
    elif follow and source.is_file():  # a pipe has an end of its own
        yield from lines_of_growing(source, on_restart)
    else:
        with source.open("rb") as file:
            yield from lines_of(file.fileno())


def _require_forecasts(forecasts: Forecasts) -> None:
    """Raise UnsupportedError if a stream has ended and nothing came of it."""
    if not forecasts.counts.forecasts:
        raise UnsupportedError(
            f"the stream ended without a forecast: each needs {forecasts.window} rows of a series "
            "in equal steps without a gap (--fill closes short ones), and an adapter that fits"
        )


def _report(forecasts: Forecasts, problems: Problems, as_json: bool) -> None:
    from edge_lora.runtime.bench.measure import resident_bytes

    residents = forecasts.residents
    facts = {
        "series": forecasts.series,
        "series_on_the_base": forecasts.series_on_the_base,
        **asdict(forecasts.counts),
        "problems": problems.count,
        "adapters_in_memory": residents.count,
        "loads": residents.loads,
        "evictions": residents.evictions,
        "window_bytes": forecasts.window_bytes,
        "adapter_bytes": residents.nbytes,
        "process_bytes": resident_bytes(),
    }
    if as_json:
        report(json.dumps(facts))
        return
    report(
        f"[{facts['series']:,} series, {facts['forecasts']:,} forecasts in {facts['runs']:,} runs, "
        f"{problems.count:,} problems; adapters: {residents.loads:,} loads, "
        f"{residents.evictions:,} evictions, {residents.count:,} in memory; "
        f"windows {human_bytes(forecasts.window_bytes)}, adapters {human_bytes(residents.nbytes)}, "
        f"process {human_bytes(facts['process_bytes'])}]"
    )


def _cell(text: str) -> str:
    """Quote what CSV needs quoted."""
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text
