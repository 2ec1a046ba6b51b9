"""Fused outputs against sessions over merged weights, and the base after a long random walk."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort

from bench.common import language_feeds, made_up_adapter, manifest_of, report, smollm2_bundle
from edge_lora import Adapter, reference
from edge_lora.forms import matrix_shape
from edge_lora.runtime import Session, open_bundle


def main(steps: int = 1000) -> None:
    """Print one row per promise."""
    folder = smollm2_bundle()
    manifest = manifest_of(folder)
    paths = {k: made_up_adapter(manifest, k) for k in ("random1", "line1", "lora16")}
    feeds = language_feeds(manifest, 5, 3)
    rows = []
    with open_bundle(folder, threads=2) as session:
        before = session.image_sha256()
        for name, path in paths.items():
            session.load_adapter(path, name)
            session.set_adapter(name)
            found = session.run(feeds)
            expected = _merged_run(session, path, feeds)
            equal = all(found[k].tobytes() == expected[k].tobytes() for k in expected)
            rows.append(
                {"promise": f"fused {name} = session of merged weights, to the bit", "kept": equal}
            )
        session.disable_adapters()
        rng = np.random.default_rng(0)
        for _ in range(steps):
            _random_step(session, rng)
        session.disable_adapters()
        kept = session.image_sha256() == before and not session.differing_slots()
        rows.append({"promise": f"base to the byte after {steps} random steps", "kept": kept})
    report("exactness", rows, f"image sha256 {before[:16]}….")


def _random_step(session: Session, rng: np.random.Generator) -> None:
    names = session.adapters
    match rng.integers(4):
        case 0:
            session.disable_adapters()
        case 1:
            session.set_adapters(names[:2], [float(w) for w in rng.normal(size=2)])
        case _:
            session.set_adapter(names[int(rng.integers(len(names)))])


def _merged_run(session: Session, path: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an ordinary session whose weights were merged by the NumPy definition."""
    manifest, options, keep = session.manifest, ort.SessionOptions(), []
    options.intra_op_num_threads = 2
    for slot, delta in Adapter.load(path).deltas.items():
        place, (out_features, in_features) = manifest.stored[slot], matrix_shape(delta.shape)
        count = out_features * in_features
        raw = np.fromfile(session.folder / place.file, np.float32, count, offset=place.offset)
        stored = (in_features, out_features) if place.layout == "io" else delta.shape
        base = raw.reshape(stored).T if place.layout == "io" else raw.reshape(stored)
        merged = reference.apply(np.ascontiguousarray(base), [(f, 1.0) for f in delta.forms])
        array = np.ascontiguousarray(merged.T if place.layout == "io" else merged)
        keep.append((array, ort.OrtValue.ortvalue_from_numpy(array)))
        options.add_initializer(place.initializer, keep[-1][1])
    model = str(session.folder / "onnx" / "model.onnx")
    plain = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in plain.get_outputs()]
    return dict(zip(names, plain.run(names, feeds), strict=True))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
