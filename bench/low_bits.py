"""Accuracy and file size of 1-bit adapters, trained so and quantised afterwards, on two skills.

Every contestant trains on the same examples for the same steps. Its learning rate is the one of a
few that does best on validation examples; the table has the accuracy on test examples that neither
training nor this choice has seen. Run it from a checkout, on a GPU:

    PYTHONPATH=. python bench/low_bits.py --parallel 16 --output bench/results/low_bits.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

HELD_OUT = {"roman": 390, "iso-date": 1000}
"""Skill -> held-out examples: the first quarter chooses the rate, the others are the test."""
LORA, BILORA = "lora", "bilora"
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32 r32": (LORA, {"rank": 32, "alpha": 64.0}),
    "1-bit r32": (BILORA, {"rank": 32, "bits": 1, "scale": 2.0}),
    "fp32 r1": (LORA, {"rank": 1, "alpha": 2.0}),
}
RATES = {LORA: (1e-3, 2e-3), BILORA: (1e-3, 3e-3)}
QUANTISED_FROM, QUANTISED_TO = "fp32 r32", (8, 4, 2, 1)
SEED = 1234


def examples(skill: str) -> tuple[list[Any], list[Any]]:
    """Return validation and test examples: distinct prompts about facts that no run trains on."""
    from edge_lora.demo.skills import get_skill

    drawn = get_skill(skill).generate(SEED, HELD_OUT[skill], "held-out")
    quarter = len(drawn) // 4
    return drawn[:quarter], drawn[quarter:]


def loss_of(model: Any, tokenizer: Any, pairs: list[Any]) -> float:  # noqa: ANN401
    """Return the mean loss of the completions."""
    import torch

    from edge_lora.training import TextBatches

    batches = TextBatches(pairs, tokenizer, batch_size=64, shuffle=False)
    with torch.no_grad():
        losses = [
            float(model(**{k: v.to(model.device) for k, v in batch.items()}).loss)
            for batch in batches
        ]
    return sum(losses) / len(losses)


def run_one(skill: str, contestant: str, lr: float, base: str, steps: int) -> list[dict[str, Any]]:
    """Train one contestant; return its row, and those of its quantised copies."""
    from dataclasses import replace

    import torch

    from edge_lora.bases import load_model
    from edge_lora.demo.recipe import RECIPES, TrainedSkill, accuracy

    validation, test = examples(skill)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32: many runs share one GPU
    loaded = load_model(base)
    method, config = CONTESTANTS[contestant]
    recipe = replace(RECIPES[skill], method=method, config=config, lr=lr, steps=steps)
    trained = TrainedSkill(loaded.model, loaded.tokenizer, recipe, device=device)
    trained.train()
    loaded.model.eval()

    def measure(name: str, file_bytes: int) -> dict[str, Any]:
        return {
            "skill": skill,
            "contestant": name,
            "lr": lr,
            "validation": accuracy(loaded.model, loaded.tokenizer, validation),
            "test": accuracy(loaded.model, loaded.tokenizer, test),
            "test_loss": loss_of(loaded.model, loaded.tokenizer, test),
            "file_bytes": file_bytes,
            "final_loss": trained.report.losses[-1],
            "seconds": round(trained.report.seconds, 1),
        }

    adapter = trained.attached.lower(skill, dtype="F32")
    rows = [measure(contestant, size_of(adapter))]
    trained.detach()
    if contestant == QUANTISED_FROM:
        from edge_lora.quantise import quantise

        for bits in QUANTISED_TO:
            small = quantise(adapter, bits)
            with merged(loaded.model, small):
                rows.append(measure(f"{contestant}, {bits}-bit afterwards", size_of(small)))
    return rows


def size_of(adapter: Any) -> int:  # noqa: ANN401
    """Return the bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        return int(adapter.save(Path(folder) / "adapter.safetensors").stat().st_size)


@contextmanager
def merged(model: Any, adapter: Any) -> Iterator[None]:  # noqa: ANN401
    """Hold a torch model with a low-rank adapter in its weights; the base comes back afterwards."""
    import torch

    from edge_lora.forms import to_fp32

    parameters = dict(model.named_parameters())
    base = {name: parameters[name].detach().clone() for name in adapter.deltas}
    try:
        for name, delta in adapter.deltas.items():
            weight = parameters[name].data
            for form in delta.forms:
                a, bt = (torch.from_numpy(to_fp32(v)).to(weight.device) for v in (form.a, form.bt))
                weight += bt.T @ a * (form.scale * adapter.alpha)
        yield
    finally:
        for name, weight in base.items():
            parameters[name].data.copy_(weight)


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, per skill and contestant, the run that did best on validation examples."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["skill"], row["contestant"])
        if key not in chosen or row["validation"] > chosen[key]["validation"]:
            chosen[key] = row
    return list(chosen.values())


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--base", default="smollm2", show_default=True)
@click.option("--steps", default=650, show_default=True)
@click.option("--skill", "skills", multiple=True, default=tuple(HELD_OUT), show_default=True)
@click.option("--parallel", default=1, show_default=True, help="Runs at a time.")
@click.option("--one", nargs=3, help="SKILL CONTESTANT LR: this run alone, rows to stdout.")
def main(
    output: Path,
    base: str,
    steps: int,
    skills: tuple[str, ...],
    parallel: int,
    one: tuple[str, str, str] | None,
) -> None:
    """Train every contestant and write the table."""
    if one:
        skill, contestant, lr = one
        rows = run_one(skill, contestant, float(lr), base, steps)
        output.write_text(json.dumps(rows))
        return
    runs = [
        (skill, contestant, lr)
        for skill in skills
        for contestant, (method, _) in CONTESTANTS.items()
        for lr in RATES[method]
    ]

    def start(run: tuple[str, str, float]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "rows.json"
            command = [sys.executable, __file__, "--output", str(part), "--base", base]
            command += ["--steps", str(steps), "--one", run[0], run[1], str(run[2])]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                click.echo(f"{run} failed:\n{done.stderr[-2000:]}", err=True)
                return []
            rows: list[dict[str, Any]] = json.loads(part.read_text())
            for row in rows:
                click.echo(json.dumps(row))
            return rows

    with ThreadPoolExecutor(parallel) as pool:
        rows = [row for some in pool.map(start, runs) for row in some]
    result = {"device": device_name(), "steps": steps, "best": best(rows), "runs": rows}
    output.write_text(json.dumps(result, indent=1) + "\n")


def device_name() -> str:
    """Return the name of what the models trained on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


if __name__ == "__main__":
    main()
