"""``edge-lora convert``: an adapter into fewer bits, a lower rank or another project's file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from edge_lora.cli.output import (
    human_bytes,
    json_option,
    print_facts,
    print_json,
    print_table,
    report,
    require_place,
    threads_option,
)
from edge_lora.errors import UnsupportedError

if TYPE_CHECKING:
    from edge_lora.adapter import Adapter
    from edge_lora.codebook import Book, Group
    from edge_lora.slot_errors import SlotError
    from edge_lora.squeeze import Squeezed

Target = Literal["edge-lora", "peft", "gguf", "onnx"]
SUFFIXES: dict[str, Target] = {
    ".safetensors": "edge-lora",
    ".gguf": "gguf",
    ".onnx_adapter": "onnx",
}
WORST = 5  # slots to show
LARGE_ERROR = 0.5  # relative, from which on the user is told
ROUNDING = 1e-12  # relative; what lies below is that of computing the error


class GroupType(click.ParamType[Any]):
    """Parses "tensor", "row" or a number from 1."""

    name = "tensor|row|N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | int:
        """Return the group; anything else is a usage error."""
        if value in ("tensor", "row") or isinstance(value, int):
            return cast("str | int", value)
        if not str(value).isdecimal() or not 1 <= int(value) < 2**32:
            self.fail(f"{value!r} is not 'tensor', 'row' or a number from 1 to 4294967295")
        return int(value)


@dataclass(frozen=True)
class Recipe:
    """What to do, as the options say."""

    target: Target
    bundle: Path | None
    name: str | None
    bits: str | None
    group: str | int | None
    book: str | None
    rank: int | None
    energy: float | None


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        original: The adapter as it was read.
        converted: The adapter as it was read back from what was written.
        squeezed: What squeezing did to each slot; empty without.
        errors: Of each slot.
    """

    original: Adapter
    converted: Adapter
    squeezed: list[Squeezed]
    errors: list[SlotError]


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    type=click.Choice(["edge-lora", "peft", "gguf", "onnx"]),
    help="Default: by the suffix of OUT: .safetensors, .gguf, .onnx_adapter, else a PEFT folder.",
)
@click.option("--bits", type=click.Choice(["1", "2", "4", "8"]), help="Code the values.")
@click.option(
    "--group",
    type=GroupType(),
    help="What shares a mean and a spread, with --bits.  [default: tensor]",
)
@click.option(
    "--book",
    type=click.Choice(["gauss_l1", "lloyd_max"]),
    help="Levels of the codes, with --bits.  [default: gauss_l1]",
)
@click.option("--rank", type=click.IntRange(1), help="Squeeze to this rank at most.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Squeeze each slot to the least rank that keeps this share of its energy.",
)
@click.option("--base", help="A bundle: bind to it, and compare the outputs of both in it.")
@click.option(
    "--prompt", "prompts", multiple=True, help="Text for the comparison; may be repeated."
)
@click.option("--name", help="Name of the new adapter. Default: that of SOURCE.")
@threads_option
@json_option
def command(
    source: Path,
    out: Path,
    target: Target | None,
    bits: str | None,
    group: str | int | None,
    book: str | None,
    rank: int | None,
    energy: float | None,
    base: str | None,
    prompts: tuple[str, ...],
    name: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Convert SOURCE, an adapter of ours, of PEFT or a GGUF one, and write it to OUT.

    Squeezing comes before coding. What was written is read back and compared with SOURCE: the
    error of each slot, and with --base the outputs of a live session.

    \b
    edge-lora convert roman.safetensors small.safetensors --bits 4
    edge-lora convert peft-folder/ x.safetensors --base smollm2-bundle --energy 0.99
    edge-lora convert roman.safetensors roman.gguf --base smollm2-bundle
    """
    target = target or _target_of(out)
    bundle = Path(base) if base is not None else None
    recipe = Recipe(target, bundle, name, bits, group, book, rank, energy)
    _require_sense(recipe, prompts)
    from edge_lora.cli.equivalence import compare, takes_text
    from edge_lora.interop.files import kind_of, size_of

    kind = kind_of(source)
    _require_place(source, out, target)
    if bundle is not None and prompts and not takes_text(bundle):
        raise UnsupportedError(f"bundle '{bundle}' takes no text, so there is no --prompt for it")
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        staged = Path(folder) / out.name
        done = _convert(source, staged, recipe)
        facts = {
            "name": done.converted.name,
            "from": kind,
            "to": target,
            "out": str(out),
            "base": done.converted.base.id,
            "slots": len(done.converted.deltas),
            "values_before": _values(done.original),
            "values": _values(done.converted),
            "bytes_before": size_of(source),
            "bytes": size_of(staged),
            **_errors(done),
        }
        if bundle is not None:
            report(f"comparing both in {bundle}")
            onnx = staged if target == "onnx" else None
            facts["equivalence"] = compare(
                bundle, done.original, done.converted, prompts, threads, onnx
            )
        report(f"writing {out}")
        _place(staged, out)
    _warn(facts)
    if as_json:
        slots = [{"slot": e.slot, "relative_error": e.relative} for e in done.errors]
        print_json({**facts, "slot_errors": slots, "squeezed": [asdict(s) for s in done.squeezed]})
        return
    _print(facts, done)


def _target_of(out: Path) -> Target:
    """Return what the suffix of ``out`` means; a folder, of PEFT, has none."""
    if out.suffix and out.suffix not in SUFFIXES and not out.is_dir():
        known = ", ".join(SUFFIXES)
        raise click.UsageError(
            f"OUT ends in {out.suffix!r}, which is none of {known}; say what it is with --to"
        )
    return SUFFIXES.get(out.suffix, "peft")


def _convert(source: Path, staged: Path, recipe: Recipe) -> Conversion:
    """Read, change, write to ``staged`` and read back."""
    from edge_lora.interop.files import read_any
    from edge_lora.quantise import quantise
    from edge_lora.slot_errors import slot_errors
    from edge_lora.squeeze import squeeze

    report(f"reading {source}")
    original = read_any(source, recipe.bundle)
    adapter = original if recipe.name is None else replace(original, name=recipe.name)
    squeezed: list[Squeezed] = []
    if recipe.rank is not None or recipe.energy is not None:
        report("squeezing")
        adapter, squeezed = squeeze(adapter, recipe.rank, recipe.energy)
    if recipe.bits is not None:
        group = cast("Group", recipe.group or "tensor")
        book = cast("Book", recipe.book or "gauss_l1")
        adapter = quantise(adapter, int(recipe.bits), group, book)
    _write(adapter, staged, recipe)
    written = adapter
    if recipe.target != "onnx":
        written = replace(read_any(staged, recipe.bundle), name=adapter.name)  # PEFT keeps no name
    return Conversion(original, written, squeezed, slot_errors(original, written))


def _write(adapter: Adapter, out: Path, recipe: Recipe) -> None:
    bundle = recipe.bundle
    match recipe.target:
        case "edge-lora":
            adapter.save(out)
        case "peft":
            from edge_lora.interop.peft_export import to_peft

            to_peft(adapter, out, bundle)
        case "gguf":
            from edge_lora.interop.gguf import to_gguf
            from edge_lora.interop.gguf_names import gguf_base

            assert bundle is not None
            to_gguf(adapter, out, gguf_base(bundle))
        case "onnx":
            from edge_lora.runtime.onnx_adapter import to_onnx_adapter

            assert bundle is not None
            to_onnx_adapter(adapter, out, bundle)


def _place(staged: Path, out: Path) -> None:
    """Put what was written where it belongs, now that nothing can go wrong any more."""
    if not staged.is_dir():
        os.replace(staged, out)
        return
    out.mkdir(exist_ok=True)
    for file in staged.iterdir():
        os.replace(file, out / file.name)


def _require_sense(recipe: Recipe, prompts: Sequence[str]) -> None:
    """Refuse options that do not go together, as usage errors."""
    target = recipe.target
    if recipe.rank is not None and recipe.energy is not None:
        raise click.UsageError("give either --rank or --energy")
    if recipe.bits is None and (recipe.group or recipe.book):
        raise click.UsageError("--group and --book say how to code values: give --bits too")
    if recipe.bits is not None and target != "edge-lora":
        raise click.UsageError(f"--bits is for our own files; {target} files hold no codes")
    if target in ("gguf", "onnx") and recipe.bundle is None:
        raise click.UsageError(f"--to {target} needs --base BUNDLE, which says how weights lie")
    if prompts and recipe.bundle is None:
        raise click.UsageError("--prompt needs --base BUNDLE to run it in")


def _require_place(source: Path, out: Path, target: Target) -> None:
    """Refuse to write over the source, or over what is of another kind."""
    if out.exists() and out.samefile(source):
        raise UnsupportedError(f"OUT is SOURCE, '{source}'; give another name")
    require_place(out)
    if target != "peft" and out.is_dir():
        raise UnsupportedError(f"'{out}' is a folder, and {target} is a file; give another name")
    if target == "peft" and out.exists() and not (out / "adapter_config.json").is_file():
        if out.is_dir() and not any(out.iterdir()):
            return
        raise UnsupportedError(f"'{out}' exists and is no PEFT folder; give another name")


def _values(adapter: Adapter) -> int:
    from edge_lora.forms import values_of

    forms = [form for delta in adapter.deltas.values() for form in delta.forms]
    return sum(values.size for form in forms for values in values_of(form).values())


def _errors(done: Conversion) -> dict[str, Any]:
    """Return the error over all slots and, if squeezed, the ranks and the energy that is gone."""
    from edge_lora.slot_errors import total_error

    facts: dict[str, Any] = {"relative_error": total_error(done.errors)}
    if done.squeezed:
        norms = {e.slot: e.norm**2 for e in done.errors}
        energy = sum(norms[s.slot] for s in done.squeezed) or 1.0
        ranks = [s.rank for s in done.squeezed if s.rank]
        facts["ranks"] = [min(ranks), max(ranks)]
        facts["discarded_energy"] = sum(s.discarded * norms[s.slot] for s in done.squeezed) / energy
        facts["left_whole"] = sum(1 for s in done.squeezed if not s.rank)
    return facts


def _print(facts: dict[str, Any], done: Conversion) -> None:
    shown = {**facts, "bytes_before": human_bytes(facts["bytes_before"])}
    ratio = facts["bytes"] / facts["bytes_before"]
    shown["bytes"] = f"{human_bytes(facts['bytes'])} ({ratio:.3g} times as many)"
    shown["relative_error"] = f"{facts['relative_error']:.3g}"
    if "discarded_energy" in facts:
        low, high = facts["ranks"]
        shown["ranks"] = f"{low} to {high}"
        shown["discarded_energy"] = f"{facts['discarded_energy']:.3g}"
    shown.pop("equivalence", None)
    print_facts({name.replace("_", " "): value for name, value in shown.items()})
    worst = sorted(done.errors, key=lambda e: e.relative, reverse=True)[:WORST]
    if worst[0].relative > ROUNDING:
        ranks = {s.slot: s.rank for s in done.squeezed}
        rows = [[e.slot, ranks.get(e.slot) or "", f"{e.relative:.3g}"] for e in worst]
        print_table(["slot", "rank", "relative error"], rows, "the largest errors")
    if "equivalence" in facts:
        rows = [
            [
                row["target"],
                f"{row['largest_difference']:.3g}",
                f"{row['effect']:.3g}",
                _told_texts(row),
            ]
            for row in facts["equivalence"]
        ]
        columns = ["target", "largest difference", "effect of the adapter", "greedy texts"]
        if not any(row[-1] for row in rows):  # a base that takes no text
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        print_table(columns, rows, "outputs, original against converted")


def _warn(facts: dict[str, Any]) -> None:
    """Say on stderr what nobody may want."""
    if facts["relative_error"] > LARGE_ERROR:
        report(
            f"note: the deltas are {facts['relative_error']:.0%} off. Use more bits or a higher "
            "rank, and see with --base what it does to outputs"
        )
    if facts["bytes"] >= facts["bytes_before"] and facts["to"] == facts["from"]:
        report("note: the result is no smaller")


def _told_texts(row: dict[str, Any]) -> str:
    if "texts" not in row:
        return ""
    firsts = [str(first) for first in row["first_differences"] if first is not None]
    differ = f", others differ from token {', '.join(firsts)}" if firsts else ""
    return f"{row['same_texts']} of {row['texts']} the same{differ}"
