"""How the adapters that ship with the demo were made, so that anyone can make them again.

``python -m edge_lora.demo.recipe --out DIR`` trains them from a plain source tree, on a CPU or a
GPU, measures exact match on held-out examples before and after, and writes one adapter file per
skill and ``report.json``.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_lora.adapter import Adapter
from edge_lora.demo.skills import SKILLS, Example, exact_match, get_skill

if TYPE_CHECKING:
    from torch import nn

    from edge_lora.training.data import Tokenizer

HELD_OUT_EXAMPLES = 200
HELD_OUT_SEED = 1234
MAX_ANSWER_TOKENS = 16  # the longest answers, ISO dates, take 11 and the closing one


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        skill: Name of the skill, and of the adapter.
        method: Training method.
        config: Its config.
        steps: Optimizer steps.
        lr: Peak learning rate, decayed linearly to zero.
        batch_size: Examples per step.
        examples: Size of the training set.
        calibration_batches: Batches whose gradient chooses the mask, for masks that need one.
        seed: Of data, masks, initialisation and order.
    """

    skill: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1000
    lr: float = 1e-3
    batch_size: int = 64
    examples: int = 3000
    calibration_batches: int = 16
    seed: int = 0


RECIPES: dict[str, Recipe] = {
    recipe.skill: recipe
    for recipe in (
        Recipe("roman", "shira", {"density": 0.01, "mask": "snip"}, steps=800, lr=3e-3),
        Recipe(
            "iso-date",
            "shira",
            {"density": 0.01, "mask": "line-snip"},
            steps=650,
            lr=3e-3,
            examples=10_000,
        ),
        Recipe("home", "lora", {"rank": 8, "alpha": 16.0}, steps=650, lr=2e-3, examples=2000),
    )
}


def train_skill(
    model: nn.Module,
    tokenizer: Tokenizer,
    recipe: Recipe,
    *,
    device: str = "cpu",
    steps: int | None = None,
    checkpoint_dir: Path | None = None,
) -> Adapter:
    """Train one skill; the model is the untouched base again afterwards.

    Args:
        model: The base, a causal language model, fp32.
        tokenizer: Its tokenizer.
        recipe: What to train.
        device: "cpu" or "cuda".
        steps: Instead of the recipe's, for a shorter run.
        checkpoint_dir: Where to keep a checkpoint to resume from.
    """
    trained = TrainedSkill(model, tokenizer, recipe, device=device)
    trained.train(steps=steps, checkpoint_dir=checkpoint_dir)
    adapter = trained.lower()
    trained.detach()
    return adapter


class TrainedSkill:
    """A skill being trained: attach, train, measure, lower, detach, in this order."""

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, recipe: Recipe, *, device: str = "cpu"
    ) -> None:
        from edge_lora.methods import attach
        from edge_lora.training import TextBatches
        from edge_lora.training.options import run_options

        pairs = get_skill(recipe.skill).generate(recipe.seed, recipe.examples)
        model.to(device)
        self.recipe, self.device = recipe, device
        self.batches = TextBatches(pairs, tokenizer, batch_size=recipe.batch_size, seed=recipe.seed)
        options = run_options(
            recipe.method, recipe.seed, self.batches, device, recipe.calibration_batches
        )
        self.attached = attach(model, recipe.method, **{**options, **recipe.config})

    def train(self, *, steps: int | None = None, checkpoint_dir: Path | None = None) -> None:
        """Run the recipe's optimizer steps."""
        from edge_lora.training import train

        steps = steps or self.recipe.steps
        self.report = train(
            self.attached,
            self.batches,
            steps=steps,
            lr=self.recipe.lr,
            warmup_steps=min(50, steps // 10),
            max_grad_norm=1.0,
            checkpoint_dir=checkpoint_dir,
            seed=self.recipe.seed,
            cpu=self.device == "cpu",
        )

    def lower(self) -> Adapter:
        """Return the adapter, with the recipe in its provenance."""
        adapter = self.attached.lower(self.recipe.skill)
        return replace(adapter, provenance={**adapter.provenance, "recipe": asdict(self.recipe)})

    def detach(self) -> None:
        """Give the base back."""
        self.attached.detach()


def answers(
    model: Any,  # noqa: ANN401  (a transformers model; its generate is not typed)
    tokenizer: Any,  # noqa: ANN401
    prompts: Sequence[str],
    batch_size: int = 50,
) -> list[str]:
    """Continue each prompt greedily with the torch model, in left-padded batches."""
    import torch

    pad = tokenizer.eos_token_id
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        rows = [tokenizer.encode(prompt) for prompt in prompts[start : start + batch_size]]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])  # (n, width)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            output = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=pad,
            )
        found += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return found


def accuracy(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    examples: Sequence[Example],
) -> float:
    """Return the exact-match share of the torch model on ``examples``."""
    was_training = model.training
    model.eval()
    found = answers(model, tokenizer, [example.prompt for example in examples])
    model.train(was_training)
    return exact_match(found, examples)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option(
    "--skill", "names", multiple=True, type=click.Choice(sorted(SKILLS)), help="Default: all."
)
@click.option("--base", default="smollm2", show_default=True, help="Name, folder or GGUF file.")
@click.option("--device", default=None, help="cpu or cuda; default: cuda where there is one.")
@click.option("--steps", type=int, help="Instead of the recipe's.")
@click.option("--lr", type=float, help="Instead of the recipe's.")
@click.option(
    "--held-out", default=HELD_OUT_EXAMPLES, show_default=True, help="Examples to test on."
)
def main(
    out: Path,
    names: tuple[str, ...],
    base: str,
    device: str | None,
    steps: int | None,
    lr: float | None,
    held_out: int,
) -> None:
    """Train the demo's adapters and measure them."""
    import torch

    from edge_lora.bases import load_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(base)
    loaded.model.to(device)
    for name in names or tuple(RECIPES):
        recipe = RECIPES[name]
        recipe = replace(recipe, steps=steps or recipe.steps, lr=lr or recipe.lr)
        result = _train_and_measure(loaded.model, loaded.tokenizer, recipe, device, held_out, out)
        _add_to_report(out / "report.json", name, result)
        click.echo(json.dumps(result))


def _train_and_measure(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    recipe: Recipe,
    device: str,
    held_out: int,
    out: Path,
) -> dict[str, Any]:
    import torch
    import transformers

    examples = SKILLS[recipe.skill].generate(HELD_OUT_SEED, held_out, "held-out")
    before = accuracy(model, tokenizer, examples)
    click.echo(f"{recipe.skill}: base {before:.1%} on {held_out} held-out examples", err=True)
    trained = TrainedSkill(model, tokenizer, recipe, device=device)
    trained.train()
    after = accuracy(model, tokenizer, examples)
    path = trained.lower().save(out / f"{recipe.skill}.safetensors")
    fingerprint = trained.attached.slots.fingerprint
    trained.detach()
    return {
        **asdict(recipe),
        "held_out_examples": held_out,
        "exact_match_base": before,
        "exact_match_adapted": after,
        "final_loss": trained.report.losses[-1],
        "seconds": round(trained.report.seconds, 1),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "base_fingerprint": fingerprint,
        "file_bytes": path.stat().st_size,
    }


def _add_to_report(path: Path, name: str, result: dict[str, Any]) -> None:
    report = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**report, name: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
