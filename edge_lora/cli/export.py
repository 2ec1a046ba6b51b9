"""``edge-lora export``: a base, once, as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import click

from edge_lora.cli.output import (
    engines_option,
    human_bytes,
    json_option,
    print_facts,
    print_json,
    report,
)
from edge_lora.cli.tasks import TaskCommand, task_option


@click.command("export", cls=TaskCommand)
@task_option("What the base is for.")
@click.option(
    "--base", default="smollm2", show_default=True, help="Base: a name, folder or GGUF file."
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@engines_option
@click.option(
    "--weights",
    type=click.Choice(["fp32", "int8-dynamic"]),
    default="fp32",
    show_default=True,
    help="Of linear layers in an ExecuTorch program.",
)
@click.option(
    "--cache-length",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Prompt and answer in an ExecuTorch program. Default: the context, at most 1024.",
)
@click.option(
    "--slots",
    type=click.Choice(["none", "inputs"]),
    default="none",
    show_default=True,
    help="inputs: adapters can also be fed for one call, unfused.",
)
@click.option(
    "--slot-forms",
    multiple=True,
    type=click.Choice(["low_rank", "row_scale"]),
    default=["low_rank"],
    show_default=True,
    help="With --slots inputs: what can be fed. row_scale: DoRA, at one more node per slot.",
)
@click.option("--sites", multiple=True, metavar="GLOB", help="Modules that may get a bottleneck.")
@click.option("--slot-names", multiple=True, metavar="GLOB", help="Slots. Default: all linear.")
@json_option
def command(
    base: str,
    out: Path,
    engines: tuple[str, ...],
    weights: str,
    cache_length: int | None,
    slots: str,
    slot_forms: tuple[str, ...],
    sites: tuple[str, ...],
    slot_names: tuple[str, ...],
    as_json: bool,
) -> None:
    """Export a causal language model to a bundle: plain ONNX or ExecuTorch, a slot table, hashes.

    For any other torch module use edge_lora.export.export_bundle from Python.

    \b
    edge-lora export --base smollm2 -o smollm2-bundle
    edge-lora export --base smollm2 -o smollm2-sites --slots inputs --sites '*.mlp'
    edge-lora export --base smollm2 -o smollm2-et --engine executorch
    """
    from edge_lora.bases import load_model
    from edge_lora.export import export_bundle

    report(f"loading {base}")
    loaded = load_model(base)
    manifest = export_bundle(
        loaded.model,
        out,
        task="causal-lm",
        engines=engines,
        program_weights=cast("Literal['fp32', 'int8-dynamic']", weights),
        cache_length=cache_length,
        slots=cast("Literal['none', 'inputs']", slots),
        slot_forms=slot_forms,
        slot_names=list(slot_names) or None,
        sites=sites,
        base_id=loaded.id,
        tokenizer=loaded.tokenizer,
    )
    size = sum(record.size for record in manifest.files.values())
    facts = {
        "bundle": str(out),
        "base": manifest.base_id,
        "base_fingerprint": manifest.fingerprint,
        "slots": len(manifest.weights),
        **({"sites": len(manifest.sites)} if manifest.sites else {}),
        "size": human_bytes(size),
        "largest_relative_error": dict(manifest.parity),
    }
    print_json(facts) if as_json else print_facts(facts)
