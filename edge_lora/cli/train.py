"""``edge-lora train``: one adapter from pairs of prompt and completion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edge_lora.cli.output import (
    human_bytes,
    json_option,
    parse_settings,
    print_facts,
    print_json,
    report,
    require_file_place,
)
from edge_lora.cli.tasks import TaskCommand, task_option
from edge_lora.errors import UnsupportedError


@click.command("train", cls=TaskCommand)
@task_option("What to train.")
@click.option(
    "--base", default="smollm2", show_default=True, help="Base: a name, folder or GGUF file."
)
@click.option("--method", default="shira", show_default=True, help="See: edge-lora methods")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the method.")
@click.option(
    "--slot-names", multiple=True, metavar="GLOB", help="Slots to adapt. Default: all linear."
)
@click.option(
    "--data", type=click.Path(exists=True, dir_okay=False), help="JSONL of prompt, completion."
)
@click.option("--skill", help="A skill of the demo instead of --data: roman, iso-date, home.")
@click.option(
    "--examples", default=2000, show_default=True, type=click.IntRange(1), help="Of --skill."
)
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1))
@click.option("--lr", default=1e-3, show_default=True, help="Peak learning rate.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1))
@click.option("--accumulate", default=1, show_default=True, help="Batches per step.")
@click.option("--max-length", default=512, show_default=True, help="Most tokens of an example.")
@click.option(
    "--validate", default=0.1, show_default=True, help="Share of examples to validate on."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="cpu or cuda. Default: cuda where there is one.")
@click.option("--name", help="Name of the adapter. Default: that of the file.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder for checkpoints.")
@click.option("--resume/--fresh", default=True, help="Go on from --checkpoint, or start again.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the loss curve into this file.")
@json_option
def command(
    base: str,
    method: str,
    settings: tuple[str, ...],
    slot_names: tuple[str, ...],
    data: str | None,
    skill: str | None,
    examples: int,
    steps: int,
    lr: float,
    batch_size: int,
    accumulate: int,
    max_length: int,
    validate: float,
    seed: int,
    device: str | None,
    name: str | None,
    out: Path,
    checkpoint: Path | None,
    resume: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Train an adapter and write it to one file; the base is not changed.

    \b
    edge-lora train --skill roman --steps 100 -o roman.safetensors
    edge-lora train --base model/ --data pairs.jsonl --method lora --set rank=8 -o x.safetensors
    """
    if (data is None) == (skill is None):
        raise click.UsageError("give either --data FILE or --skill NAME")
    config = parse_settings(settings)
    require_file_place(out)
    import torch

    from edge_lora.bases import load_model
    from edge_lora.methods import attach, check_options
    from edge_lora.training import TextBatches, split_pairs, train
    from edge_lora.training.options import run_options

    check_options(method, config)  # before minutes of loading
    training, held_out = split_pairs(_pairs(data, skill, examples, seed), validate, seed)
    report(f"loading {base}")
    loaded = load_model(base)
    if loaded.tokenizer is None:
        raise UnsupportedError(f"base {base!r} has no tokenizer, so text cannot be trained on")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)

    def batches_of(pairs: Any, shuffle: bool) -> TextBatches:
        return TextBatches(pairs, loaded.tokenizer, batch_size, max_length, shuffle, seed)

    batches = batches_of(training, True)
    options = run_options(method, seed, batches, device)
    attached = attach(loaded.model, method, list(slot_names) or None, **{**options, **config})
    report(f"training {attached.parameter_count:,} values on {len(training)} examples")
    result = train(
        attached,
        batches,
        steps=steps,
        lr=lr,
        gradient_accumulation=accumulate,
        validation=list(batches_of(held_out, False)) if held_out else None,
        checkpoint_dir=checkpoint,
        resume=resume,
        seed=seed,
        cpu=device == "cpu",
    )
    adapter = attached.lower(name or out.stem)
    recipe = {
        "base": base,
        "data": data or skill,
        "steps": steps,
        "lr": lr,
        "batch_size": batch_size,
    }
    adapter = replace(adapter, provenance={**adapter.provenance, "seed": seed, "training": recipe})
    adapter.save(out)
    if plot is not None:
        result.save_plot(plot)
    facts = {
        "adapter": str(out),
        "method": method,
        "slots": len(adapter.deltas),
        "values": attached.parameter_count,
        "file_size": human_bytes(out.stat().st_size),
        "steps": len(result.steps),
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "best_validation_loss": result.best_validation_loss,
        "seconds": round(result.seconds, 1),
    }
    print_json(facts) if as_json else print_facts(facts)


def _pairs(data: str | None, skill: str | None, examples: int, seed: int) -> list[tuple[str, str]]:
    if skill is not None:
        from edge_lora.demo.skills import get_skill

        return [(e.prompt, e.completion) for e in get_skill(skill).generate(seed, examples)]
    from edge_lora.training import read_pairs

    return read_pairs(str(data))
