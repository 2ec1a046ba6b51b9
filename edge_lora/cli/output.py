"""What every command shares: the ``--json`` switch, tables, and adapter arguments.

Data goes to stdout, progress and errors to stderr. A terminal gets coloured tables, a pipe gets
plain tab-separated lines.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from edge_lora.errors import UnsupportedError

threads_option = click.option("--threads", type=click.IntRange(1), help="Default: all processors.")
route_option = click.option(
    "--route",
    type=click.Choice(["auto", "packed", "unpacked", "reload"]),
    default="auto",
    show_default=True,
    help="How adapters are switched.",
)
engine_option = click.option(
    "--engine",
    type=click.Choice(["auto", "onnxruntime", "executorch"]),
    default="auto",
    show_default=True,
    help="auto: the first of the others that the bundle was exported for.",
)
engines_option = click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(["onnxruntime", "executorch"]),
    default=["onnxruntime"],
    show_default=True,
    help="What runs the bundle. Repeat it for both, over one slot table.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def print_json(value: Any) -> None:
    """Print ``value`` as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a table: framed on a terminal, tab-separated with a head line in a pipe."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in [list(columns), *cells]:
            click.echo("\t".join(line))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=escape(title) or None, title_justify="left")
    for row in cells:
        table.add_row(*map(escape, row))
    Console().print(table)


def print_facts(facts: dict[str, Any]) -> None:
    """Print ``name: value`` lines, aligned on a terminal."""
    width = max(map(len, facts), default=0) if sys.stdout.isatty() else 0
    for name, value in facts.items():
        click.echo(f"{name + ':':<{width + 1}} {value}")


def report(message: str) -> None:
    """Say on stderr what is being done."""
    click.echo(message, err=True)


def human_bytes(count: int) -> str:
    """Return a size for people, in decimal units.

    >>> human_bytes(4_700_000)
    '4.7 MB'
    """
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


@dataclass(frozen=True)
class AdapterArgument:
    """``NAME=PATH[:SCALE]`` from the command line."""

    name: str
    path: Path
    scale: float = 1.0


class AdapterType(click.ParamType[AdapterArgument]):
    """Parses ``NAME=PATH[:SCALE]``; the name defaults to the file's, the scale to 1.

    Whether the file is there and sound is for its reader to say.
    """

    name = "NAME=PATH[:SCALE]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> AdapterArgument:
        """Return the parsed argument; a malformed scale is a usage error."""
        if isinstance(value, AdapterArgument):
            return value
        name, equals, rest = str(value).partition("=")
        if not equals:
            name, rest = "", str(value)
        path, scale = split_scale(rest, self.fail)
        return AdapterArgument(name or path.stem, path, scale)


def split_scale(text: str, fail: Callable[[str], Any]) -> tuple[Path, float]:
    """Split ``PATH[:SCALE]``; an existing file whose name has a colon is taken as it is."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        fail(f"scale {scale!r} is not a number, in {text!r}")
        raise AssertionError from None


def require_place(out: Path) -> None:
    """Raise UnsupportedError if nothing can be put at ``out``: before the work, not after it."""
    folder = out.parent
    if not folder.is_dir():
        raise UnsupportedError(f"'{out}' cannot be written: there is no folder '{folder}'")
    if not os.access(folder, os.W_OK):
        raise UnsupportedError(f"'{out}' cannot be written: the folder '{folder}' is read-only")


def require_file_place(out: Path) -> None:
    """Raise UnsupportedError if no file can be put at ``out``."""
    require_place(out)
    if out.is_dir():
        raise UnsupportedError(f"'{out}' is a folder; give the name of a file")


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse repeated ``key=value``: the value is JSON where it reads as JSON, else text.

    >>> parse_settings(["rank=8", "mask=snip"])
    {'rank': 8, 'mask': 'snip'}
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{setting!r} is not KEY=VALUE", param_hint="--set")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed
