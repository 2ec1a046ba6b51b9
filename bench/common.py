"""What the benchmarks share: a real bundle, made-up adapters of known size, one way to print."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora import Adapter, BaseIdentity, Delta, LowRank, Sparse, codebook
from edge_lora.bundle import Manifest, read_manifest
from edge_lora.errors import EngineUnavailableError
from edge_lora.forms import Form, matrix_shape

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
RESULTS = Path(__file__).resolve().parent / "results"


def smollm2_bundle(slots: str = "none") -> Path:
    """Return SmolLM2-135M as a bundle, exporting it on first use (about a minute)."""
    folder = OUT / f"smollm2-{slots}"
    if not (folder / "bundle.json").is_file():
        from edge_lora.bases import load_model
        from edge_lora.export import export_bundle

        base = load_model("smollm2")
        export_bundle(base.model, folder, task="causal-lm", slots=slots, tokenizer=base.tokenizer)
    return folder


def made_up_adapter(manifest: Manifest, kind: str, seed: int = 0) -> Path:
    """Write an adapter over all linear layers (not the head) with random values.

    Args:
        manifest: Of the bundle.
        kind: "random1" or "line1" (1 % sparse, fp16), "lora16" (rank 16, fp32), "lora16-1bit".
        seed: Of masks and values.
    """
    rng = np.random.default_rng(seed)
    deltas = {
        name: Delta(
            slot.shape, slot.dtype, (_form(kind, matrix_shape(slot.shape), rng),), slot.slot_hash
        )
        for name, slot in manifest.slots.items()
        if name.startswith("model.layers.")
    }
    adapter = Adapter(
        name=f"{kind}-{seed}",
        method="made up for the benchmark",
        base=BaseIdentity(manifest.fingerprint, manifest.base_id),
        deltas=deltas,
    )
    (OUT / "adapters").mkdir(parents=True, exist_ok=True)
    return adapter.save(OUT / "adapters" / f"{adapter.name}.safetensors")


def _form(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Form:
    out_features, in_features = shape
    size = out_features * in_features
    match kind:
        case "random1":
            index = np.sort(rng.choice(size, size // 100, replace=False)).astype(np.uint32)
        case "line1":
            lines = rng.choice(size // 16, size // 1600, replace=False)
            group, column = np.divmod(lines, in_features)
            rows = group[:, None] * 16 + np.arange(16)
            index = np.sort((rows * in_features + column[:, None]).ravel()).astype(np.uint32)
        case "lora16" | "lora16-1bit":
            a = rng.standard_normal((16, in_features)).astype(np.float32)
            b = rng.standard_normal((16, out_features)).astype(np.float32)
            if kind == "lora16":
                return LowRank(a, b, 1e-3)
            return LowRank(codebook.encode(a, 1), codebook.encode(b, 1), 1e-3)
    return Sparse(index, (rng.standard_normal(index.size) * 1e-2).astype(np.float16))


def compiled(name: str, *sources: str) -> ctypes.CDLL:
    """Build a shared library of files under ``cpp_ext``, as the core is built, and load it."""
    path = OUT / f"lib{name}.so"
    OUT.mkdir(exist_ok=True)
    core = ROOT / "cpp_ext"
    flags = ["-O3", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    command = ["g++", *flags, f"-I{core / 'src'}", *(str(core / s) for s in sources)]
    subprocess.run([*command, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def language_feeds(manifest: Manifest, new: int, past: int) -> dict[str, NDArray[np.generic]]:
    """Return inputs for ``new`` tokens after ``past`` cached ones, batch 1."""
    rng = np.random.default_rng(0)
    feeds: dict[str, NDArray[np.generic]] = {
        "input_ids": rng.integers(0, 40_000, (1, new)),
        "attention_mask": np.ones((1, past + new), np.int64),
        "position_ids": np.arange(past, past + new)[None],
    }
    for spec in manifest.inputs:
        if spec.name.startswith("past."):
            shape = [1, spec.shape[1], past, spec.shape[3]]
            feeds[spec.name] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
    return feeds


def report(name: str, rows: Sequence[Mapping[str, object]], note: str = "") -> None:
    """Print rows as a Markdown table and keep them under ``bench/results/NAME.json``."""
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(_cell(row[c]) for c in columns)} |")
    where = _device()
    engine = f", onnxruntime {where['onnxruntime']}" if "onnxruntime" in where else ""
    print(f"\n{where['processor']}, {where['cores']} cores{engine}. {note}")
    RESULTS.mkdir(exist_ok=True)
    record = {"device": where, "note": note, "rows": [dict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def _device() -> Mapping[str, object]:
    """Name the machine; without the compiled core, which no training needs, in fewer words."""
    try:
        from edge_lora.runtime.bench.measure import device
    except (ImportError, EngineUnavailableError):
        return {"processor": platform.processor() or "unknown", "cores": os.cpu_count() or 0}
    return device()


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def manifest_of(folder: Path) -> Manifest:
    """Return the manifest of a bundle."""
    return read_manifest(folder)
