"""SmolLM2-135M in ExecuTorch: against the plain XNNPACK program, and against ONNX Runtime.

Everything runs in turn in one process: the session that is patched, the same program as XNNPACK
loads it by itself (route ``reload``), and an ONNX Runtime session over the same base. All are given
the same adapter file, SHiRA at 1 % of every linear layer.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.common import OUT, language_feeds, made_up_adapter, manifest_of, report, smollm2_bundle
from edge_lora.runtime import Session, open_bundle
from edge_lora.runtime.bench.measure import Samples, device, interleave, time_once
from edge_lora.runtime.generate import Decoder
from edge_lora.runtime.text import tokenizer_of

PROMPT = "The three most important things to know about batteries are"
PHASES = (("decode 1 after 64", 1, 64), ("prefill 64", 64, 0))
NEW_TOKENS = 64
Row = dict[str, object]


def main(threads: int = 2, runs: int = 40) -> None:
    """Print the figures of one number of threads: ExecuTorch has one pool per process."""
    graph, program = smollm2_bundle(), smollm2_program()
    adapter = made_up_adapter(manifest_of(graph), "random1")
    rows = [opening(program, threads)]
    with (
        open_bundle(program, "executorch", threads=threads, route="packed") as ours,
        open_bundle(program, "executorch", threads=threads, route="reload") as plain,
        open_bundle(graph, "onnxruntime", threads=threads, route="packed") as rival,
    ):
        for session in (ours, rival):
            session.load_adapter(adapter, "shira")
        rows += latencies(ours, plain, rival, runs)
        rows += switches(ours, rival, runs)
        told = greedy(ours, rival)
        undone = not ours.differing_slots()
    report(
        f"executorch_{threads}",
        rows,
        f"executorch {device()['executorch']}, {threads} threads, {runs} interleaved rounds, "
        f"medians. Undone to the byte: {undone}. "
        f"Greedy decoding of {NEW_TOKENS} tokens with one adapter file in both engines: {told}",
    )


def smollm2_program() -> Path:
    """Return SmolLM2-135M as an ExecuTorch bundle, exporting it on first use (minutes)."""
    folder = OUT / "smollm2-executorch"
    if not (folder / "bundle.json").is_file():
        from edge_lora.bases import load_model
        from edge_lora.export import export_bundle

        base = load_model("smollm2")
        export_bundle(
            base.model,
            folder,
            task="causal-lm",
            engines=("executorch",),
            tokenizer=base.tokenizer,
        )
    return folder


def opening(folder: Path, threads: int) -> Row:
    """Open a bundle for the first time on a device, and again; both in this process."""
    before = os.environ.get("EDGE_LORA_CACHE")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EDGE_LORA_CACHE"] = cache
        first, *later = (
            time_once(lambda: open_bundle(folder, "executorch", threads=threads).close())
            for _ in range(4)
        )
    if before is None:
        del os.environ["EDGE_LORA_CACHE"]
    else:
        os.environ["EDGE_LORA_CACHE"] = before
    return row("open", "again", "for the first time", {"a": later, "b": [first]}, 0.2)


def latencies(ours: Session, plain: Session, rival: Session, runs: int) -> list[Row]:
    """Time one run, with and without the adapter in the weights."""
    rows = []
    for phase, new, past in PHASES:
        program, graph = program_feeds(new, past), language_feeds(rival.manifest, new, past)
        for fused in ("", "shira"):
            for session in (ours, rival):
                session.set_adapters([fused] if fused else [])
            for session in (ours, plain) if past else ():
                session.run(program_feeds(past, 0))
            of = f"{phase}, {fused or 'base'}"
            # In pairs: ONNX Runtime's threads spin on for a while, into the run that follows.
            mine = ("ours", lambda f=program: ours.run(f))
            heap = ("plain", lambda f=program: plain.run(f))
            other = ("rival", lambda f=graph: rival.run(f))
            for against, pair, bar in (
                ("plain XNNPACK program", (mine, heap), 1.02),
                ("ONNX Runtime", (mine, other), None),
            ):
                first, second = interleave(dict(pair), runs).values()
                times = {"a": first.ms, "b": second.ms}
                rows.append(row(of, "packed", against, times, bar))
    for session in (ours, rival):
        session.disable_adapters()
    return rows


def switches(ours: Session, rival: Session, runs: int) -> list[Row]:
    """Time the switch from the base to the adapter, and back."""
    times: dict[str, list[float]] = {"in a": [], "in b": [], "out a": [], "out b": []}
    for _ in range(runs):
        for name, session in (("a", ours), ("b", rival)):
            times[f"in {name}"].append(session.set_adapter("shira").ms)
            times[f"out {name}"].append(session.disable_adapters().ms)
    return [
        row(
            f"swap SHiRA 1 % {way}",
            "packed",
            "ONNX Runtime",
            {name: times[f"{way} {name}"] for name in "ab"},
            1.3,
        )
        for way in ("in", "out")
    ]


def greedy(ours: Session, rival: Session) -> str:
    """Decode with both engines, both along the tokens of the latter; say where they differ."""
    prompt = tokenizer_of(rival.folder).encode(PROMPT).ids
    for session in (ours, rival):
        session.set_adapter("shira")
    decoders = [Decoder(session, [prompt]) for session in (ours, rival)]
    differing = []
    largest = 0.0
    for step in range(NEW_TOKENS):
        found, expected = (decoder.step()[0] for decoder in decoders)
        largest = max(largest, float(np.abs(found - expected).max()))
        if found.argmax() != expected.argmax():
            top = np.sort(expected)[-2:]
            differing.append(f"token {step}: first and second are {top[1] - top[0]:.2g} apart")
        for decoder in decoders:
            decoder.append(expected.argmax(keepdims=True))
    for session in (ours, rival):
        session.disable_adapters()
    told = "; ".join(differing) or "all equal"
    return f"{told}. Largest difference of logits: {largest:.2g}."


def program_feeds(new: int, past: int) -> dict[str, NDArray[np.generic]]:
    """Return inputs for ``new`` tokens after ``past``; which ones does not matter."""
    ids = np.random.default_rng(0).integers(0, 40_000, (1, new))
    return {"input_ids": ids, "start": np.array([past], np.int64)}


def row(
    figure: str, a: str, b: str, times: Mapping[str, Sequence[float]], bar: float | None = None
) -> Row:
    """Compare two lists of times in ms by their medians."""
    medians = {name: Samples(tuple(ms)).median for name, ms in times.items()}
    return {
        "figure": figure,
        "ours": a,
        "ms": medians["a"],
        "against": b,
        "its ms": medians["b"],
        "ratio": medians["a"] / medians["b"],
        "must reach": bar or "-",
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
