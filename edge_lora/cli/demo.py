"""``edge-lora demo``: a real language model switches skills in milliseconds, and back."""

from __future__ import annotations

from pathlib import Path

import click

from edge_lora.cli.output import json_option, print_json, print_table, report, threads_option


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/demo"),
    show_default=True,
    help="Folder for the bundle, the report and the picture.",
)
@click.option("--train", help="Train this skill's adapter here first (roman, iso-date, home).")
@click.option("--steps", type=click.IntRange(1), help="Of --train. Default: 150.")
@click.option("--examples", default=40, show_default=True, type=click.IntRange(1), help="A skill.")
@threads_option
@json_option
def command(
    out: Path,
    train: str | None,
    steps: int | None,
    examples: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Export SmolLM2-135M once, switch three skills under it, and measure everything."""
    from edge_lora.demo.picture import COLUMNS, save_picture, table
    from edge_lora.demo.run import run_demo

    result = run_demo(out, examples=examples, threads=threads, train=train, steps=steps, say=report)
    picture = save_picture(result, out / "demo.png")
    if as_json:
        print_json({**result.to_json(), "picture": str(picture)})
        return
    for skill in result.skills:
        click.echo(f"\n{skill.skill}")
        for prompt, base, adapted in skill.examples:
            click.echo(f"  {prompt}\n    base    {base}\n    adapter {adapted}")
    click.echo()
    print_table(COLUMNS, table(result), title=f"route {result.route}")
    restored = "yes" if result.base_restored else "NO"
    click.echo(
        f"base restored after {result.switches} switches: {restored}, "
        f"sha256 {result.image_sha256}\nplot: {picture}"
    )
