"""Inference under our allocator, base and fused adapter, against a plain ONNX Runtime session."""

from __future__ import annotations

import sys

import onnxruntime as ort

from bench.common import language_feeds, made_up_adapter, manifest_of, report, smollm2_bundle
from edge_lora.runtime import open_bundle
from edge_lora.runtime.bench.measure import interleave


def main(threads: int = 2, runs: int = 60) -> None:
    """Print decode (1 token after 64) and prefill (64 tokens), medians of interleaved runs."""
    folder = smollm2_bundle()
    manifest = manifest_of(folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = str(folder / "onnx" / "model.onnx")
    plain = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rows = []
    with open_bundle(folder, threads=threads) as session:
        session.load_adapter(made_up_adapter(manifest, "random1"), "shira")
        session.load_adapter(made_up_adapter(manifest, "lora16"), "lora")
        for phase, new, past in (("decode 1 after 64", 1, 64), ("prefill 64", 64, 0)):
            feeds = language_feeds(manifest, new, past)
            for fused in ("", "shira", "lora"):
                session.set_adapters([fused] if fused else [])
                samples = interleave(
                    {
                        "plain": lambda f=feeds: plain.run(None, f),
                        "ours": lambda f=feeds: session.run(f),
                    },
                    runs,
                )
                ours, base = samples["ours"].median, samples["plain"].median
                rows.append(
                    {
                        "phase": phase,
                        "fused": fused or "base",
                        "route": session.route,
                        "ours ms": ours,
                        "plain ORT ms": base,
                        "ratio": ours / base,
                    }
                )
    report("latency", rows, f"{threads} threads, {runs} interleaved runs, medians.")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
