"""``edge-lora bench``: what loading, switching and running cost on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_lora.cli.output import (
    AdapterArgument,
    AdapterType,
    engine_option,
    json_option,
    print_json,
    report,
    route_option,
    threads_option,
)


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, type=AdapterType())
@click.option("--runs", default=50, show_default=True, type=click.IntRange(50), help="Per variant.")
@engine_option
@threads_option
@route_option
@click.option(
    "-o",
    "--out",
    "outs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Write a .json, .csv, .md or .html report; repeatable.",
)
@json_option
def command(
    bundle: Path,
    adapters: tuple[AdapterArgument, ...],
    runs: int,
    engine: str,
    threads: int | None,
    route: Any,
    outs: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Measure BUNDLE with ADAPTERS: open, load, swap, first run, steady runs, churn.

    \b
    edge-lora bench smollm2-bundle roman=roman.safetensors -o bench.html
    """
    from edge_lora.runtime.bench import bench_bundle
    from edge_lora.runtime.bench.report import check_format, markdown, write_report

    for path in outs:
        check_format(path)
    result = bench_bundle(
        bundle,
        {adapter.name: adapter.path for adapter in adapters},
        engine=engine,
        threads=threads,
        route=route,
        runs=runs,
        progress=report,
    )
    for path in outs:
        report(f"wrote {write_report(result, path)}")
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(markdown(result), nl=False)
