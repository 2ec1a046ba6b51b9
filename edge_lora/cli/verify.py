"""``edge-lora verify``: are these files sound, and do they fit each other?"""

from __future__ import annotations

from pathlib import Path

import click

from edge_lora.adapter import Adapter
from edge_lora.bundle import Manifest, read_manifest, verify_files
from edge_lora.bundle_check import verify_fingerprint, verify_slots
from edge_lora.bundle_engine import PARTS
from edge_lora.cli.output import json_option, print_json, report
from edge_lora.cli.scenarios import is_set, set_adapters
from edge_lora.errors import EdgeLoraError


@click.command("verify")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--engine",
    type=click.Choice(list(PARTS)),
    help="Also open each bundle with it: does it run, and do switches, on this device?",
)
@json_option
def command(paths: tuple[Path, ...], engine: str | None, as_json: bool) -> None:
    """Check adapter files, scenario sets and bundles; every adapter must fit every bundle named.

    Hashes of files, slots and base, format, shapes and values are checked. Everything that is
    wrong is listed; exit code 1.

    \b
    edge-lora verify smollm2/ roman.safetensors iso-date.safetensors
    """
    problems: list[str] = []
    bundles: dict[Path, Manifest] = {}
    adapters: dict[Path, Adapter] = {}
    for path in paths:
        report(f"checking {path}")
        try:
            if is_set(path):
                adapters |= set_adapters(path)
            elif path.is_dir():
                bundles[path] = read_manifest(path)
            else:
                adapters[path] = Adapter.load(path)
        except EdgeLoraError as error:
            problems.append(str(error))
    fingerprints = {str(path): _check(path, bundles[path], problems) for path in bundles}
    for manifest in bundles.values():
        for adapter in adapters.values():
            try:
                manifest.slots.check(adapter)
            except EdgeLoraError as error:
                problems.append(str(error))
    routes = {str(p): _open(p, engine, problems) for p in bundles} if engine else {}
    if as_json:
        print_json(
            {
                **({"engine": engine, "routes": routes} if engine else {}),
                "sound": not problems,
                "checked": [str(p) for p in paths],
                "fingerprints": fingerprints,
                "problems": problems,
            }
        )
    if problems:
        raise EdgeLoraError("\n".join(problems))
    if not as_json:
        fit = f", {len(adapters)} adapters fit" if bundles and adapters else ""
        click.echo(f"sound: {len(paths)} checked{fit}")


def _open(path: Path, engine: str, problems: list[str]) -> str | None:
    """Open a bundle, which tests itself, and return the route of its switches."""
    from edge_lora.runtime import open_bundle

    try:
        with open_bundle(path, engine) as session:
            return session.route
    except EdgeLoraError as error:
        problems.append(str(error))
        return None


def _check(path: Path, manifest: Manifest, problems: list[str]) -> str:
    """Check the bundle's bytes, note what is wrong and say what became of the fingerprint."""
    for check in (verify_files, verify_slots):
        try:
            check(path, manifest)
        except EdgeLoraError as error:
            problems.append(str(error))
    try:
        if verify_fingerprint(manifest):
            return "recomputed"
    except EdgeLoraError as error:
        problems.append(f"bundle '{path}': {error}")
        return "differs"
    return "skipped: the bundle does not list every slot that it covers"
