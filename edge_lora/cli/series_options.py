"""The options that name a CSV file of series and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_OPTIONS = (
    click.option("--data", type=click.Path(path_type=Path), required=True, help="CSV file."),
    click.option("--columns", help="Channels, separated by commas. Default: all but the time."),
    click.option(
        "--time", help="Name of the time column. Default: the first that reads as a date."
    ),
    click.option(
        "--fill",
        default=0,
        show_default=True,
        type=click.IntRange(0),
        help="Longest gap to fill, in rows.",
    ),
)


def series_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``command`` the parameters data, columns, time and fill."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
