"""Peak memory and time of a training step: SHiRA values and PEFT LoRA of equal size.

One Llama-shaped model with random weights stays on the device; the contestants take turns on it,
several rounds each, so that a slow minute hurts all of them alike. Run it from a checkout:

    PYTHONPATH=. python bench/train_memory.py --output bench/results/train_memory.json

The default shape is TinyLlama's (1.1B parameters, bf16). All linear layers except the head are
adapted, the optimizer is AdamW, gradient checkpointing is off, LoRA has no dropout (dropout would
only add memory). PEFT appears three times: as it comes (adapter in fp32), under bf16 autocast, and
with its adapter in bf16.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

from edge_lora.methods import attach
from edge_lora.methods.base_slots import default_slots, find_weights

BASELINE = "PEFT LoRA"


@dataclass(frozen=True)
class Row:
    """Medians of one contestant.

    Attributes:
        peak_mib: Largest memory that torch had allocated during a step; None on a CPU.
        step_ms: Forward, backward and optimizer.
        memory_ratio: peak_mib over the baseline's.
        time_ratio: Median over rounds of step_ms over the baseline's in the same round.
    """

    contestant: str
    trainable: int
    peak_mib: float | None
    step_ms: float
    step_ms_rounds: list[float]
    first_loss: float
    last_loss: float
    memory_ratio: float | None = None
    time_ratio: float = 1.0


def make_model(options: argparse.Namespace) -> nn.Module:
    """Return a Llama with random bf16 weights on the device."""
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        intermediate_size=options.ff,
        vocab_size=options.vocab,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16).train()


@contextmanager
def shira(model: nn.Module, mask: str, density: float) -> Iterator[list[nn.Parameter]]:
    """Attach ours."""
    attached = attach(model, "shira", mask=mask, density=density)
    try:
        yield list(attached.parameters())
    finally:
        attached.detach()


@contextmanager
def peft_lora(model: nn.Module, rank: int, in_fp32: bool) -> Iterator[list[nn.Parameter]]:
    """Attach PEFT's LoRA to every linear layer except the head."""
    flags = [p.requires_grad for p in model.parameters()]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=in_fp32)
    try:
        yield [p for p in wrapped.parameters() if p.requires_grad]
    finally:
        wrapped.unload()
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def contestants(model: nn.Module, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return each contestant's way onto the model, and the autocast that it runs under."""
    weights = find_weights(model)
    shapes = [weights[name].shape for name in default_slots(model, weights)]
    lora_parameters = options.rank * sum(out + inn for out, inn in shapes)
    density = lora_parameters / sum(out * inn for out, inn in shapes)
    return {
        BASELINE: partial(peft_lora, model, options.rank, True),
        "PEFT LoRA, bf16 autocast": partial(peft_lora, model, options.rank, True),
        "PEFT LoRA, bf16 adapter": partial(peft_lora, model, options.rank, False),
        "SHiRA values, rand mask": partial(shira, model, "rand", density),
        "SHiRA values, line mask": partial(shira, model, "line", density),
    }


def measure(
    model: nn.Module,
    parameters: list[nn.Parameter],
    ids: Tensor,
    steps: int,
    autocast: AbstractContextManager[object],
) -> tuple[list[float], float | None, list[float]]:
    """Return (ms of each step, peak MiB, losses) after two warm-up steps."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    on_gpu = ids.device.type == "cuda"
    times: list[float] = []
    losses: list[float] = []
    for step in range(steps + 2):
        if on_gpu:
            torch.cuda.synchronize()
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        if step >= 2:
            times.append((time.perf_counter() - started) * 1e3)
        losses.append(loss.item())
        del loss
    return times, torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None, losses


def run(options: argparse.Namespace) -> list[Row]:
    """Let the contestants take turns and return their rows, the baseline first."""
    model = make_model(options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(options.vocab, (options.batch, options.seq), generator=generator)
    ids = ids.to(options.device)
    times: dict[str, list[float]] = {}
    rows: dict[str, Row] = {}
    for round_number in range(options.rounds):
        for name, way_onto in contestants(model, options).items():
            casts = "autocast" in name
            cast = torch.autocast(options.device, torch.bfloat16) if casts else nullcontext()
            with way_onto() as parameters:  # type: ignore[attr-defined]
                trainable = sum(p.numel() for p in parameters)
                steps_ms, peak, losses = measure(model, parameters, ids, options.steps, cast)
            times.setdefault(name, []).append(statistics.median(steps_ms))
            rows[name] = Row(name, trainable, peak, 0.0, [], losses[0], losses[-1])
            print(f"round {round_number + 1}: {name}: {times[name][-1]:.1f} ms", file=sys.stderr)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    return [_with_ratios(rows[name], times, rows[BASELINE]) for name in rows]


def _with_ratios(row: Row, times: dict[str, list[float]], baseline: Row) -> Row:
    own, reference = times[row.contestant], times[BASELINE]
    memory = None
    if row.peak_mib is not None and baseline.peak_mib is not None:
        memory = row.peak_mib / baseline.peak_mib
    return replace(
        row,
        step_ms=statistics.median(own),
        step_ms_rounds=own,
        memory_ratio=memory,
        time_ratio=statistics.median(a / b for a, b in zip(own, reference, strict=True)),
    )


def markdown(rows: list[Row], title: str) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        title,
        "",
        "| contestant | trainable | peak MiB | ratio | ms per step | ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        peak = "n/a" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        memory = "n/a" if row.memory_ratio is None else f"{row.memory_ratio:.3f}"
        cells = [row.contestant, f"{row.trainable:,}", peak, memory]
        cells += [f"{row.step_ms:.1f}", f"{row.time_ratio:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print JSON lines and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {
        "hidden": 2048, "layers": 22, "ff": 5632, "vocab": 32000, "heads": 32, "kv-heads": 4,
        "batch": 4, "seq": 2048, "rank": 16, "steps": 8, "rounds": 3,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write all rows as one JSON file")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    setting = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "base_dtype": "bf16",
        **{name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in numbers},
    }
    rows = run(options)
    records = [{**setting, **asdict(row)} for row in rows]
    for record in records:
        print(json.dumps(record))
    shape = f"{options.layers} layers of {options.hidden}, batch {options.batch} x {options.seq}"
    print(markdown(rows, f"{setting['device']}, torch {setting['torch']}, {shape}"))
    if options.output is not None:
        options.output.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
