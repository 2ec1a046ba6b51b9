"""Switch all linear layers of SmolLM2-135M: against a bare loop, PEFT's merge, and reloading.

The bare loop is ``cpp_ext/bench/exchange_loop.cc``: it exchanges the same values with the
same memory and does nothing else. Everything runs in turn in one process.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from bench.common import compiled, made_up_adapter, manifest_of, report, smollm2_bundle
from edge_lora.bases import load_model
from edge_lora.native import live_blocks
from edge_lora.runtime import Session, open_bundle
from edge_lora.runtime.bench.measure import Samples, time_once

if TYPE_CHECKING:
    from peft import PeftModel

KINDS = ("random1", "line1", "lora16")


def main(threads: int = 2, runs: int = 15) -> None:
    """Print medians of interleaved switches."""
    torch.set_num_threads(threads)
    folder = smollm2_bundle()
    manifest = manifest_of(folder)
    peft = _peft_lora()
    with open_bundle(folder, threads=threads) as session:
        for kind in KINDS:
            session.load_adapter(made_up_adapter(manifest, kind), kind)
        bare = {kind: _bare_loop(session, kind, threads) for kind in ("random1", "line1")}
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            for kind in KINDS:
                times.setdefault(kind, []).append(session.set_adapter(kind).ms)
                times.setdefault(f"undo {kind}", []).append(session.disable_adapters().ms)
                if kind in bare:
                    times.setdefault(f"bare {kind}", []).append(bare[kind]())
                    bare[kind]()  # back to the base
            times.setdefault("peft", []).append(time_once(peft.merge_adapter))
            peft.unmerge_adapter()
            for name, prepack in (("reload", True), ("reload unpacked", False)):
                action = _reload(folder, threads, prepack)
                times.setdefault(name, []).append(time_once(action))
        assert session.differing_slots() == []
    median = {name: Samples(tuple(values)).median for name, values in times.items()}
    rows = [
        {
            "adapter": kind,
            "swap ms": median[kind],
            "undo ms": median[f"undo {kind}"],
            "bare loop ms": median.get(f"bare {kind}", "-"),
            "swap / bare loop": median[kind] / median[f"bare {kind}"]
            if f"bare {kind}" in median
            else "-",
            "PEFT LoRA r16 merge / swap": median["peft"] / median[kind],
            "ORT reload / swap": median["reload"] / median[kind],
            "ORT reload, not prepacked / swap": median["reload unpacked"] / median[kind],
        }
        for kind in KINDS
    ]
    report(
        "swap",
        rows,
        f"{threads} threads, {runs} interleaved rounds, medians. PEFT merge "
        f"{median['peft']:.0f} ms, ORT session {median['reload']:.0f} ms, not prepacked "
        f"{median['reload unpacked']:.0f} ms.",
    )


def _peft_lora() -> PeftModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(load_model("smollm2").model, config)


def _reload(folder: Path, threads: int, prepack: bool) -> Callable[[], object]:
    def reload() -> object:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        model = str(folder / "onnx" / "model.onnx")
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    return reload


def _bare_loop(session: Session, kind: str, threads: int) -> Callable[[], float]:
    """Return a call that exchanges exactly what the swap exchanges, and its time in ms."""
    blocks = [
        np.ctypeslib.as_array((ctypes.c_float * (size // 4)).from_address(address))
        for address, size, reserved in live_blocks()
        if reserved and size >= 1 << 16
    ]
    before = [block.copy() for block in blocks]
    session.set_adapter(kind)
    run = 16 if kind.startswith("line") else 1
    parts: list[tuple[NDArray[np.float32], NDArray[np.uint32], NDArray[np.float32]]] = []
    for block, old in zip(blocks, before, strict=True):
        where = np.flatnonzero(block.view(np.uint32) != old.view(np.uint32))
        if run > 1:
            where = (np.unique(where // run)[:, None] * run + np.arange(run)).ravel()
        if where.size:
            parts.append((block, where[::run].astype(np.uint32), block[where].copy()))
    session.disable_adapters()
    library = _library()
    count = len(parts)
    pointers = [
        (ctypes.c_void_p * count)(*(arrays[i].ctypes.data for arrays in parts)) for i in range(3)
    ]
    counts = (ctypes.c_size_t * count)(*(offsets.size for _, offsets, _ in parts))

    def exchange(_keep: object = parts) -> float:
        return float(
            library.el_bench_exchange(
                ctypes.c_size_t(count), *pointers, counts, ctypes.c_size_t(run), threads
            )
        )

    return exchange


def _library() -> ctypes.CDLL:
    library = compiled("exchange_loop", "bench/exchange_loop.cc")
    library.el_bench_exchange.restype = ctypes.c_double
    return library


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
