"""``edge-lora run``: generate text with a bundle and its adapters, or forecast a stream."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from edge_lora.runtime import Session


class RankType(click.ParamType[int | str]):
    """A number, or ``auto:12ms``."""

    name = "K|auto:MSms"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Return the number or the text; the session reads the latter."""
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if isinstance(value, str) and value.startswith("auto:"):
            return value
        self.fail(f"{value!r} is neither a number nor like auto:12ms", param, ctx)


class RunCommand(click.Command):
    """Generates text, but stands aside for ``--follow`` and ``--input``: a stream to forecast."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse ``args`` as this command's, or as that of streams."""
        options = {arg.partition("=")[0] for arg in args[: _index(args, "--")]}
        if not options & {"--follow", "--input"}:
            return super().make_context(info_name, args, parent, **extra)
        from edge_lora.cli import follow

        return follow.command.make_context(info_name, args, parent, **extra)


def _index(args: list[str], mark: str) -> int:
    return args.index(mark) if mark in args else len(args)


@click.command("run", cls=RunCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, type=AdapterType())
@click.option("--prompt", required=True, help="Text to continue; - reads stdin.")
@click.option("--adapter", "chosen", multiple=True, help="Use only these of ADAPTERS, by name.")
@click.option("--unfused", is_flag=True, help="Feed one adapter beside the weights.")
@click.option(
    "--rank",
    type=RankType(),
    help="Rank of one nested adapter, or with --unfused auto:12ms: the largest that is so fast.",
)
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample. Default: greedy."
)
@click.option("--temperature", default=1.0, show_default=True, help="With --top-p.")
@click.option("--seed", default=0, show_default=True, help="With --top-p.")
@click.option(
    "--follow",
    is_flag=True,
    expose_value=False,
    help="Forecast a stream of CSV instead. Its options: --follow --help.",
)
@engine_option
@threads_option
@route_option
@json_option
def command(
    bundle: Path,
    adapters: tuple[AdapterArgument, ...],
    prompt: str,
    chosen: tuple[str, ...],
    unfused: bool,
    rank: int | str | None,
    max_tokens: int,
    top_p: float | None,
    temperature: float,
    seed: int,
    engine: str,
    threads: int | None,
    route: Any,
    as_json: bool,
) -> None:
    """Generate text with BUNDLE and ADAPTERS, fused with their scales unless --unfused.

    \b
    edge-lora run smollm2-bundle roman=roman.safetensors --prompt "1987 as a Roman numeral:"
    edge-lora run smollm2-bundle a.safetensors:0.7 b.safetensors:0.3 --prompt "Hello"
    """
    used = _select(adapters, chosen)
    if unfused and len(used) != 1:
        raise click.UsageError(f"--unfused takes exactly one adapter, {len(used)} given")
    if unfused and used[0].scale != 1:
        raise click.UsageError(f"--unfused runs an adapter as it is, without {used[0].scale:g}")
    if rank is not None and len(used) != 1:
        raise click.UsageError(f"--rank takes exactly one adapter, {len(used)} given")
    if isinstance(rank, str) and not unfused:
        raise click.UsageError(f"--rank {rank} takes --unfused; give a number to fuse")
    from edge_lora.bundle import MANIFEST, read_manifest
    from edge_lora.runtime import open_bundle
    from edge_lora.runtime.generate import generate
    from edge_lora.runtime.sampling import Sampler, greedy, nucleus
    from edge_lora.runtime.text import tokenizer_of

    sample: Sampler = greedy
    if top_p is not None:
        sample = nucleus(top_p, temperature, seed)
    if not (bundle / MANIFEST).is_file():
        read_manifest(bundle)  # says so: what is no bundle has no tokenizer either
    tokenizer = tokenizer_of(bundle)
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_bundle(bundle, engine, threads=threads, route=route) as session:
        swap = _load(session, used, None if isinstance(rank, str) else rank, fuse=not unfused)
        if unfused and rank is not None:
            rank = session.rank_of(used[0].name, rank)
        generation = generate(
            session,
            [tokenizer.encode(text).ids],
            max_new_tokens=max_tokens,
            sample=sample,
            adapter=used[0].name if unfused else None,
            rank=rank if unfused else None,
        )
        facts = {
            "text": tokenizer.decode(generation.tokens[0]),
            "adapters": {adapter.name: adapter.scale for adapter in used},
            "fused": bool(used) and not unfused,
            "rank": rank,
            "tokens": len(generation.tokens[0]),
            "prefill_ms": generation.prefill_ms,
            "decode_ms": sorted(generation.decode_ms)[len(generation.decode_ms) // 2]
            if generation.decode_ms
            else None,
            "engine": session.engine,
            "state_id": session.state_id,
            **swap,
        }
    if as_json:
        print_json(facts)
        return
    click.echo(facts["text"])
    numbers = (
        f"{key} {facts[key]:.2f}"
        for key in ("swap_ms", "prefill_ms", "decode_ms")
        if facts.get(key)
    )
    report(f"[{facts['tokens']} tokens, route {facts['route']}, {', '.join(numbers)}]")


def _select(
    adapters: tuple[AdapterArgument, ...], chosen: tuple[str, ...]
) -> tuple[AdapterArgument, ...]:
    names = [adapter.name for adapter in adapters]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise click.UsageError(f"two adapters are named {', '.join(repeated)}; use NAME=PATH")
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise click.UsageError(
            f"--adapter {', '.join(unknown)}: not among {', '.join(names) or 'no adapters'}"
        )
    return tuple(a for a in adapters if not chosen or a.name in chosen)


def _load(
    session: Session, used: tuple[AdapterArgument, ...], rank: int | None, *, fuse: bool
) -> dict[str, Any]:
    """Load the adapters, fuse them if asked to, and say what the swap took."""
    for adapter in used:
        session.load_adapter(adapter.path, adapter.name)
    if not used or not fuse:
        return {"route": session.route}
    ranks = [rank] * len(used)
    stats = session.set_adapters([a.name for a in used], [a.scale for a in used], ranks)
    return {
        "route": stats.route,
        "swap_ms": stats.ms,
        "swap_bytes": stats.bytes,
        "rounding_error": stats.rounding_error,
    }
