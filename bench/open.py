"""Open a bundle (verify, create, find packed weights, self-test) against a plain session."""

from __future__ import annotations

import sys

import onnxruntime as ort

from bench.common import report, smollm2_bundle
from edge_lora.runtime import open_bundle
from edge_lora.runtime.bench.measure import interleave


def main(threads: int = 2, runs: int = 7) -> None:
    """Print the medians; the first open on this device is timed apart."""
    folder = smollm2_bundle()
    model = str(folder / "onnx" / "model.onnx")

    def plain() -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def ours() -> None:
        open_bundle(folder, threads=threads).close()

    samples = interleave({"plain": plain, "ours": ours}, runs, warm_up=1)
    rows = [
        {
            "open": "second time on this device",
            "ours ms": samples["ours"].median,
            "plain ORT session ms": samples["plain"].median,
            "ratio": samples["ours"].median / samples["plain"].median,
        }
    ]
    report("open", rows, f"{threads} threads, {runs} interleaved runs after one warm-up, medians.")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
